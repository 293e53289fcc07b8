import gzip
import io
import json
import os
import sys
import types

import numpy as np
import pytest
from dsan.charset import CTCCharset
from dsan.convert import write_crops
from dsan.data import DataOptions, Size, Words, load_words, read_data
from PIL import Image

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
CHARSET, SIZE = CTCCharset(), Size()


def png(shade):
    file = io.BytesIO()
    Image.new("L", (40, 16), shade).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def words(tmp_path):
    """A zip of 30 crops, whose shade says which one it is."""
    write_crops(tmp_path / "words.zip", "zip", [(f"{i}.png", png(i), f"W{i}") for i in range(30)])
    return str(tmp_path / "words.zip")


def load(data, frames=None, charset=CHARSET, size=SIZE, **options):
    return load_words(DataOptions(data, **{"validation": 0} | options), charset, size, frames)


def agree(words):
    return all(label == f"w{array[0, 0, 0]}" for label, array in zip(words.labels, words.arrays(), strict=True))


class TestSplits:
    def test_validation_is_held_out(self, words):
        splits = load([words], validation=7)
        train, held_out = splits.train.labels, splits.validation.labels
        assert (len(train), len(held_out), splits.test) == (23, 7, None)
        assert sorted(train + held_out) == sorted(f"w{i}" for i in range(30))
        assert agree(splits.train)
        assert agree(splits.validation)
        again = load([words], validation=7, max_train=9)
        assert again.validation.labels == held_out
        assert len(again.train) == 9
        assert set(load([words], validation=7, max_train=4).train.labels) < set(again.train.labels) < set(train)

    def test_test(self, words):
        splits = load([words], test=[words, words], max_test=11)
        assert (len(splits.train), splits.validation, len(splits.test)) == (30, None, 11)
        assert splits.audit == [
            f"to train on, {words}: 30 crops, 30 kept", "  30 labels lower-cased ('W0' is now 'w0')",
            f"to judge on, {words} {words}: 60 crops, 60 kept", "  60 labels lower-cased ('W0' is now 'w0')",
        ]  # fmt: skip
        for part in (splits.train, splits.test):
            assert agree(part)

    def test_sizes(self, words):
        size = Size(keep_ratio=True, channels=3)
        assert load([words], size=size).train.__getitems__([0, 1]).images.shape == (2, 3, 32, 80)

    def test_labels_that_do_not_fit(self, words):
        """Test words are judged whatever they need."""
        with pytest.raises(
            ValueError, match=r"to train on, .*: crop 10 \(10.png\) has label 'W10', which needs T >= 3 frames"
        ):
            load([words], frames=lambda width: width // 50)
        splits = load([words], frames=lambda width: width // 50, on_infeasible="skip", test=[words])
        assert (len(splits.train), len(splits.test)) == (10, 30)
        assert "  20 dropped: too long for the frames (10.png, 'W10': needs 3, has 2)" in splits.audit

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"validation": 30}, "--validation 30 holds out all 30 training crops"),
            ({"data": ["sample", "x"]}, "data sample brings its own test crops"),
            ({"data": []}, "nothing to train on: give --data, or --synthetic"),
            ({"data": ["none"]}, "nothing to train on: give --data, or --synthetic"),
            ({"validation": -1}, "validation must be at least 0"),
            ({"max_test": 0}, "max_test must be at least 1"),
            ({"real_share": 1.0}, "real_share is a share, 0 < real_share < 1; got 1.0"),
            ({"on_infeasible": "drop"}, "on_infeasible must be raise or skip, got 'drop'"),
        ],
    )
    def test_wrong_options(self, words, options, message):
        with pytest.raises(ValueError, match=message):
            load(**{"data": [words]} | options)

    def test_iiit5k_needs_its_folder(self, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        with pytest.raises(ValueError, match=r"reads \$PAPERCORE_DATA/dsan/iiit5k_test.zip: set PAPERCORE_DATA"):
            read_data(["iiit5k"], "test")


class TestSample:
    @pytest.fixture(autouse=True)
    def sample(self, monkeypatch):
        def sample_words(size):
            shape = (size.channels, size.height, size.width)
            return [
                Words.from_arrays(np.full((n, *shape), n, np.uint8), [f"{i:02}a" for i in range(n)]) for n in (20, 10)
            ]

        monkeypatch.setitem(sys.modules, "dsan.sample", types.SimpleNamespace(sample_words=sample_words))

    def test_parts(self):
        splits = load(["sample"], validation=5, max_test=4)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [15, 5, 4]
        assert splits.audit == ["to train on, sample: 20 crops, 20 kept", "to judge on, sample: 10 crops, 10 kept"]

    def test_another_charset(self):
        splits = load(["sample"], charset=CTCCharset("1"))
        assert (len(splits.train), splits.train.labels[:3], splits.test.labels) == (11, ["1", "1", "11"], ["1"])
        with pytest.raises(ValueError, match=r"nothing is left; check the charset 'z'"):
            load(["sample"], charset=CTCCharset("z"))

    def test_frames(self):
        with pytest.raises(ValueError, match=r"crop 0 \(crop 0\) has label '00a', which needs T >= 4 frames"):
            load(["sample"], frames=lambda width: 2)


class TestSynthetic:
    @pytest.mark.parametrize(("share", "real", "synthetic"), [(0.75, 60, 20), (0.25, 30, 90)])
    def test_shares(self, words, share, real, synthetic):
        splits = load([words], synthetic=20, real_share=share)
        assert (len(splits.train), splits.train.counts) == (real + synthetic, [real, synthetic])
        assert splits.audit[-1] == f"an epoch: {real} real crops out of 30, {synthetic} synthetic ones out of 20"
        assert len(set(splits.train.labels[:real])) == 30  # each real crop is there
        batch = splits.train.__getitems__([0, real, real + 19])
        assert batch.images.shape == (3, 1, 32, 100)
        assert [len(own) for own in batch.boxes] == [0, *map(len, batch.labels[1:])]

    def test_alone(self, tmp_path):
        (tmp_path / "list.txt").write_text("bookkeeper\n")
        options = {"synthetic": 60, "words": str(tmp_path / "list.txt"), "frames": lambda width: 12}
        splits = load([], validation=5, **options, synthetic_cache=str(tmp_path / "drawn.npz"))
        assert len(splits.validation) == 5
        assert splits.train.labels
        assert "bookkeeper" not in splits.train.labels  # it needs 13 frames
        assert "too long for the frames" in splits.audit[1]
        again = load([], validation=5, **options, synthetic_cache=str(tmp_path / "drawn.npz"))
        np.testing.assert_array_equal(again.train.arrays([3])[0], splits.train.arrays([3])[0])
        other = load([], validation=5, **options, synthetic_seed=1)
        assert other.train.labels != splits.train.labels

    def test_sizes(self):
        train = load([], synthetic=5, size=Size(keep_ratio=True, channels=3)).train
        assert len(set(train.widths.tolist())) > 1
        assert {array.shape[:2] for array in train.arrays()} == {(3, 32)}

    def test_training_crops_without_their_text_are_backgrounds(self, words, tmp_path, monkeypatch):
        """But never those that are held out."""
        with gzip.open(tmp_path / "words_chars.jsonl.gz", "wt") as file:
            for i in range(30):
                file.write(json.dumps({"name": f"{i}.png", "boxes": [[1, 1, 2, 4]] * len(f"W{i}")}) + "\n")
        seen = []
        from dsan.synthetic import backgrounds_from

        def spy(crops, count):
            seen.extend(crops.labels)
            return backgrounds_from(crops, count)

        monkeypatch.setattr("dsan.synthetic.backgrounds_from", spy)
        splits = load([words], synthetic=3, validation=6)
        assert sorted(seen) == sorted(set(splits.train.labels[: splits.train.counts[0]]))
        assert not set(seen) & set(splits.validation.labels)


@REAL
def test_iiit5k():
    splits = load(["iiit5k"], validation=200, max_train=50, max_test=60, frames=lambda width: width // 4)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [50, 200, 60]
    assert splits.audit[0] == "to train on, iiit5k: 2,000 crops, 2,000 kept"
    assert splits.audit[2] == "to judge on, iiit5k: 3,000 crops, 3,000 kept"
    batch = splits.train.__getitems__(range(50))
    assert [len(own) for own in batch.boxes] == [len(label) for label in batch.labels]
