import numpy as np
import pytest
from dsan import sample
from dsan.images import Size


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(sample, "TRAIN", 30)
    monkeypatch.setattr(sample, "TEST", 12)


def test_is_always_the_same_and_its_parts_differ():
    (train, test), (again, tested) = sample.sample_words(Size()), sample.sample_words(Size())
    assert (len(train), len(test)) == (30, 12)
    for one, other in ((train, again), (test, tested)):
        assert one.labels == other.labels
        assert np.array_equal(one.arrays(), other.arrays())
    seen = {array.tobytes() for array in train.arrays()}
    assert len(seen) == 30
    assert not any(array.tobytes() in seen for array in test.arrays())


def test_words_have_boxes_and_the_size_that_is_asked_for():
    train, _ = sample.sample_words(Size(width=64, channels=3))
    batch = train.__getitems__(range(30))
    assert batch.images.shape == (30, 3, 32, 64)
    assert batch.widths is None
    assert [len(boxes) for boxes in batch.boxes] == [len(label) for label in batch.labels]
    assert all(boxes[:, 2:].min() > 0 and (boxes[:, 0] + boxes[:, 2]).max() <= 70 for boxes in batch.boxes)


def test_proportions_can_be_kept():
    train, _ = sample.sample_words(Size(keep_ratio=True))
    assert len(set(train.widths.tolist())) > 10
