import numpy as np
from disco.sample import sample
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier


def test_sample_is_all_of_the_digits_and_always_the_same():
    images, labels, test_images, test_labels = sample()
    again = sample()
    assert all((a == b).all() for a, b in zip(again, (images, labels, test_images, test_labels), strict=True))
    assert (images.shape, test_images.shape) == ((1437, 3, 16, 16), (360, 3, 16, 16))
    assert images.dtype == test_images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert (images[:, 0] == images[:, 1]).all()
    assert (images[:, 0] == images[:, 2]).all()
    counts = np.bincount(labels) + np.bincount(test_labels)
    assert (counts == np.bincount(load_digits().target)).all()
    assert np.bincount(test_labels).min() >= 25


def test_no_test_image_is_trained_on():
    images, _, test_images, _ = sample()
    seen = {image.tobytes() for image in images}
    assert not any(image.tobytes() in seen for image in test_images)


def test_the_digits_can_be_told_apart():
    images, labels, test_images, test_labels = sample()
    nearest = KNeighborsClassifier(1).fit(images.reshape(len(images), -1), labels)
    assert nearest.score(test_images.reshape(len(test_images), -1), test_labels) > 0.95
