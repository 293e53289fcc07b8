import numpy as np
import pytest
import torch
from disco.data import DataOptions, Images, Splits, channel_statistics, load_data
from PIL import Image


def load(data, **options):
    return load_data(DataOptions(str(data), **options))


@pytest.fixture
def labelled(tmp_path):
    """300 training images of the classes 0, 1, 2 (200, 80, 20 of them) and 30 test images; each has colours of its own."""
    labels = np.repeat([0, 1, 2], [200, 80, 20])
    labels = labels[np.random.default_rng(1).permutation(300)]
    number = np.arange(330, dtype=np.uint16)
    images = np.zeros((330, 6, 6, 3), np.uint8)
    images[..., 0], images[..., 1] = (number % 256)[:, None, None], (number // 256)[:, None, None]
    arrays = {"images": images[:300], "labels": labels, "test_images": images[300:], "test_labels": np.arange(30) % 3}
    np.savez(tmp_path / "x.npz", **arrays)
    np.savez(tmp_path / "unlabelled.npz", images=images[:300], test_images=images[300:])
    return tmp_path / "x.npz"


def numbers(images):
    """Which of the fixture's images these are."""
    return (images.pixels[:, 0, 0, 0].int() + 256 * images.pixels[:, 1, 0, 0].int()).tolist()


def folder(root, sizes, train=8, test=0):
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", sizes[i % len(sizes)], (10 * i, 0, 0)).save(path)
    return root


class TestSizes:
    @pytest.mark.parametrize(
        ("sizes", "options", "side", "image_size"),
        [
            ([(32, 32)], {}, 32, 32),
            ([(64, 64)], {}, 64, 64),
            ([(65, 65)], {}, 256, 224),
            ([(32, 30)], {}, 256, 224),
            ([(32, 32), (28, 28)], {}, 256, 224),
            ([(32, 32)], {"image_size": 28}, 32, 28),
            ([(32, 32)], {"image_size": 224}, 32, 224),
            ([(90, 70)], {"image_size": 112}, 128, 112),
            ([(90, 70)], {"image_size": 112, "decode_size": 112}, 112, 112),
            ([(90, 70)], {"decode_size": 40}, 40, 40),
            ([(32, 32)], {"decode_size": 96}, 96, 224),
        ],
    )
    def test_side_of_images_and_of_views(self, tmp_path, sizes, options, side, image_size):
        splits = load(folder(tmp_path, sizes, test=4), **options)
        assert splits.train.pixels.shape == (8, 3, side, side)
        assert splits.test.pixels.shape == (4, 3, side, side)
        assert splits.image_size == image_size

    def test_train_and_test_images_have_one_size(self, tmp_path):
        folder(tmp_path, [(32, 32)])
        Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
        for name in "ab":
            (tmp_path / "test" / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "test" / name / "x.png")
        assert load(tmp_path, image_size=14).test.pixels.shape[-1] == 16

    def test_large_sets_are_decoded_when_asked_for_and_are_the_same(self, tmp_path, monkeypatch):
        folder(tmp_path, [(50, 40)], test=4)
        eager = load(tmp_path, image_size=28)
        monkeypatch.setattr("disco.data.MOST_IN_MEMORY", 12 * 3 * 32 * 32 - 1)
        lazy = load(tmp_path, image_size=28)
        for a, b in ((eager.train, lazy.train), (eager.test, lazy.test)):
            assert a.pixels is not None
            assert b.pixels is None
            assert torch.equal(a.pixels, b.__getitems__(range(len(b)))["images"])
            assert torch.equal(a.labels, b.labels)
        monkeypatch.setattr("disco.data.MOST_IN_MEMORY", 12 * 3 * 32 * 32)
        assert load(tmp_path, image_size=28).train.pixels is not None

    def test_a_corrupt_image_does_not_hide_the_common_size(self, tmp_path):
        folder(tmp_path, [(32, 32)], train=110)
        (tmp_path / "train" / "a" / "0.png").write_bytes(b"corrupt")
        splits = load(tmp_path)
        assert splits.train.pixels.shape == (109, 3, 32, 32)
        assert splits.train.labels.bincount().tolist() == [54, 55]


class TestChoice:
    @pytest.mark.parametrize("most", [3, 10, 60, 75])
    def test_fewer_images_are_balanced(self, labelled, most):
        splits = load(labelled, max_train=most, max_test=7)
        counts = splits.train.labels.bincount(minlength=3).tolist()
        assert sum(counts) == most
        assert max(counts) - min(counts) <= 1 or counts[2] == 20
        assert sorted(splits.test.labels.bincount().tolist()) == [2, 2, 3]

    def test_labels_stay_with_their_images(self, labelled):
        whole, few = load(labelled), load(labelled, max_train=50, validation=0.3)
        for part in (few.train, few.test):
            assert whole.train.labels[numbers(part)].tolist() == part.labels.tolist()

    @pytest.mark.parametrize("name", ["x.npz", "unlabelled.npz"])
    def test_fewer_are_a_part_of_more_and_always_the_same(self, labelled, name):
        path = labelled.with_name(name)
        chosen = [set(numbers(load(path, max_train=n).train)) for n in (5, 40, 200, 300, 1000)]
        assert [len(c) for c in chosen] == [5, 40, 200, 300, 300]
        assert chosen[0] < chosen[1] < chosen[2] < chosen[3] == set(range(300))
        assert set(numbers(load(path, max_train=40).train)) == chosen[1]
        assert chosen[1] != set(range(40))

    def test_the_order_of_the_data_is_kept(self, labelled):
        found = numbers(load(labelled, max_train=40).train)
        assert found == sorted(found)

    @pytest.mark.parametrize("share", [0.1, 0.5])
    def test_validation_takes_the_place_of_test(self, labelled, share):
        splits = load(labelled, validation=share)
        assert splits.test.labels.bincount().tolist() == [200 * share, 80 * share, 20 * share]
        assert sorted(numbers(splits.train) + numbers(splits.test)) == list(range(300))
        assert numbers(load(labelled, validation=share).test) == numbers(splits.test)

    def test_validation_does_not_depend_on_max_train(self, labelled):
        whole, few = load(labelled, validation=0.2), load(labelled, validation=0.2, max_train=30, max_test=12)
        assert set(numbers(few.train)) < set(numbers(whole.train))
        assert set(numbers(few.test)) < set(numbers(whole.test))
        assert few.train.labels.bincount().tolist() == [10, 10, 10]
        assert few.test.labels.bincount().tolist() == [4, 4, 4]

    def test_unlabelled_validation(self, labelled):
        splits = load(labelled.with_name("unlabelled.npz"), validation=0.2)
        assert (len(splits.train), len(splits.test), splits.test.labels) == (240, 60, None)
        assert sorted(numbers(splits.train) + numbers(splits.test)) == list(range(300))

    def test_each_class_keeps_an_image(self, labelled):
        splits = load(labelled, validation=0.999)
        assert splits.train.labels.bincount().tolist() == [1, 1, 1]
        with pytest.raises(
            ValueError, match=r"a share of 0.001 of the training images holds out none; raise validation"
        ):
            load(labelled, validation=0.001)

    def test_without_a_test_split_there_is_none(self, tmp_path):
        assert load(folder(tmp_path, [(32, 32)])).test is None
        assert len(load(tmp_path, validation=0.25).test) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train": 1}, "max_train must be at least 2, got 1"),
        ({"max_test": 0}, "max_test must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"decode_size": -3}, "decode_size must be at least 1, got -3"),
        ({"validation": 1.0}, "validation is a share, 0 <= validation < 1; got 1.0"),
        ({"validation": -0.1}, "validation is a share"),
        ({"validation": float("nan")}, "validation is a share"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_one_image_is_not_enough(tmp_path):
    with pytest.raises(ValueError, match="training needs at least 2 images, but there are 1"):
        load(folder(tmp_path, [(32, 32)], train=1))


def test_the_sample_is_the_default():
    splits = load_data(DataOptions())
    assert (splits.train.pixels.shape, splits.test.pixels.shape) == ((1437, 3, 16, 16), (360, 3, 16, 16))
    assert (splits.image_size, splits.train.classes) == (16, tuple("0123456789"))
    assert splits.test.classes == splits.train.classes


def test_splits_of_own_images():
    images = Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert Splits(images).test is None


class TestStatistics:
    def test_they_are_those_of_all_pixels(self):
        images = Images(torch.randint(0, 256, (700, 3, 5, 5), dtype=torch.uint8))
        values = images.pixels.double() / 255
        mean, std = channel_statistics(images)
        np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(std, values.std((0, 2, 3), correction=0), rtol=1e-12)

    def test_fewer_images_are_spread_over_the_set(self):
        pixels = torch.zeros(1000, 3, 2, 2, dtype=torch.uint8)
        pixels[500:] = 255
        mean, std = channel_statistics(Images(pixels), most=10)
        assert mean == std == (0.5, 0.5, 0.5)

    def test_a_constant_channel_can_be_divided_by(self):
        mean, std = channel_statistics(Images(torch.full((3, 3, 2, 2), 51, dtype=torch.uint8)))
        np.testing.assert_allclose(mean, 0.2)
        np.testing.assert_allclose(std, 1 / 255)
