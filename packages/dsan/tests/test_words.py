from pickle import dumps, loads

import numpy as np
import pytest
import torch
from dsan.images import fit
from dsan.readers import Crops
from dsan.words import MixedWords, WidthBuckets, Words
from PIL import Image
from torch.utils.data import DataLoader


class Shade(int):
    """A file of one shade of grey, if that is below 200; else a damaged one."""

    def read(self):
        if self >= 200:
            return b"damaged"
        return b"P5 %d 20 255\n" % width(self) + bytes([self]) * 20 * width(self)


def width(shade):
    return 20 + 2 * shade


def crops(*shades, boxes=None):
    return Crops([f"{s}.pgm" for s in shades], [f"w{s}" for s in shades], [Shade(s) for s in shades], boxes)


class TestWords:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_one_width(self, in_memory):
        words = Words(crops(3, 1, 2), in_memory=in_memory)
        batch = words.__getitems__([2, 0, -1])
        assert (batch.images.shape, batch.images.dtype, batch.widths) == ((3, 1, 32, 100), torch.uint8, None)
        assert batch.images[:, 0, 5, 50].tolist() == [2, 3, 2]
        assert (batch.labels, batch.index.tolist(), batch.boxes, len(batch)) == (["w2", "w3", "w2"], [2, 0, 2], None, 3)
        assert (words[1].labels, len(words), words.widths.tolist()) == (["w1"], 3, [100] * 3)
        with pytest.raises(IndexError):
            words.__getitems__([3])

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_widths_of_their_own(self, in_memory):
        words = Words(crops(3, 10), keep_ratio=True, channels=3, in_memory=in_memory)
        assert words.widths.tolist() == [42, 64]
        batch = words.__getitems__([0, 1])
        assert (batch.images.shape, batch.widths.tolist()) == ((2, 3, 32, 64), [42, 64])
        assert (batch.images[0, :, :, 42:] == 128).all()
        assert words[0].images.shape == (1, 3, 32, 44)
        assert [array.shape[2] for array in words.arrays()] == [42, 64]
        assert words.arrays([1])[0][0, 0, 0] == 10

    def test_memory_decides(self, monkeypatch):
        assert Words(crops(1))._fitted is not None
        monkeypatch.setattr("dsan.words.MOST_IN_MEMORY", 2 * 3200)
        assert Words(crops(1, 2))._fitted is None

    def test_select(self):
        words = Words(crops(*range(10))).select([7, 3, 3])
        batch = words.__getitems__([2, 0])
        assert (batch.labels, batch.index.tolist(), words.names) == (["w3", "w7"], [2, 0], ["7.pgm", "3.pgm", "3.pgm"])
        assert words.select([0]).labels == ["w7"]

    def test_workers(self):
        for words in (Words(crops(1, 2, 3), in_memory=False), loads(dumps(Words(crops(1, 2, 3), keep_ratio=True)))):
            loader = DataLoader(words, 2, num_workers=1, collate_fn=lambda batch: batch, multiprocessing_context="fork")
            assert [batch.labels for batch in loader] == [["w1", "w2"], ["w3"]]

    def test_to(self):
        batch = Words(crops(1, 2), keep_ratio=True).__getitems__([0, 1]).to("meta")
        assert {batch.images.device.type, batch.widths.device.type, batch.index.device.type} == {"meta"}
        assert batch.labels == ["w1", "w2"]


class TestDamage:
    SHADES = (*range(60), 250, *range(60, 120))

    def test_left_out_of_memory(self, caplog):
        words = Words(crops(*self.SHADES))
        assert (len(words), words.labels[59:61], words.names[60], len(words.widths)) == (
            120,
            ["w59", "w60"],
            "60.pgm",
            120,
        )
        [line] = [record.getMessage() for record in caplog.records]
        assert line.startswith("1 of 121 crops cannot be read, the first: 250: not an image that can be read (BMP, ")
        assert line.endswith("; left out")

    def test_replaced_by_the_next(self, caplog):
        words = Words(crops(*self.SHADES), keep_ratio=True, in_memory=False)
        batch = words.__getitems__([60, 61, 60])
        assert (batch.labels, batch.index.tolist()) == (["w60"] * 3, [61] * 3)
        assert len(caplog.records) == 1
        assert words.arrays([60, 1])[0].shape == (1, 32, 16)
        part = words.select([5, 60, 7])  # by the next one of the part: never by one that is held out
        assert part[1].labels == ["w7"]

    def test_too_many(self):
        for in_memory in (True, False):
            with pytest.raises(ValueError, match=r"more than 1% of the crops are corrupt: 1 of 3 crops cannot be read"):
                Words(crops(1, 250, 2), in_memory=in_memory)[1]


class TestBoxes:
    def test_are_in_pixels_of_the_fitted_crop(self):
        boxes = [np.array([[2, 5, 4, 10], [10, 0, 13, 20]], np.float32), np.zeros((0, 4), np.float32)]
        words = Words(crops(3, 1, boxes=boxes), keep_ratio=True)  # 26 x 20 to 42 x 32
        batch = words.__getitems__([0, 1])
        x, y = 42 / 26, 32 / 20
        np.testing.assert_allclose(
            batch.boxes[0], [[2 * x, 5 * y, 4 * x, 10 * y], [10 * x, 0, 13 * x, 20 * y]], rtol=1e-6
        )
        assert batch.boxes[1].shape == (0, 4)

    def test_turn_with_a_tall_crop(self):
        """A white character on black: its box must hold it after turning."""
        picture = np.zeros((60, 20), np.uint8)
        picture[5:15, 3:18] = 255
        one = crops(0, boxes=[np.array([[3, 5, 15, 10]] * 2, np.float32)])
        one.open = lambda i: Image.fromarray(picture)
        found = Words(one, width=60, height=20, rotate_tall=True, in_memory=False)[0]
        x, y, w, h = found.boxes[0][0].astype(int)
        inside = found.images[0, 0, y : y + h, x : x + w]
        assert (inside.shape, int(inside.min())) == ((15, 10), 255)
        assert int((found.images > 0).sum()) == 150

    def test_that_do_not_fit_the_label_are_left_out(self):
        words = Words.from_arrays(
            np.zeros((2, 1, 32, 100), np.uint8), ["ab", "cd"], [np.zeros((2, 4)), np.zeros((1, 4))]
        )
        assert [len(own) for own in words.__getitems__([0, 1]).boxes] == [2, 0]


class TestArrays:
    def test_of_different_widths(self):
        words = Words.from_arrays([np.full((1, 32, w), w, np.uint8) for w in (20, 40)], ["a", "b"])
        batch = words.__getitems__([1, 0])
        assert (batch.widths.tolist(), batch.images[1, 0, 0, [19, 20]].tolist()) == ([40, 20], [20, 128])

    @pytest.mark.parametrize(
        ("arrays", "labels", "boxes", "message"),
        [
            (
                np.zeros((2, 32, 100), np.uint8),
                "ab",
                None,
                r"crops must be uint8 \(1 or 3, height, width\), got 2 of uint8 \(32, 100\)",
            ),
            (np.zeros((2, 1, 32, 100)), "ab", None, "got 2 of float64"),
            ([], "", None, "got 0 of"),
            (np.zeros((2, 1, 32, 100), np.uint8), "a", None, "2 crops, but 1 labels"),
            (np.zeros((1, 1, 32, 100), np.uint8), "a", [], "1 crops, but 1 labels and 0 of boxes"),
        ],
    )
    def test_wrong_ones(self, arrays, labels, boxes, message):
        with pytest.raises(ValueError, match=message):
            Words.from_arrays(arrays, labels, boxes)

    def test_mixed(self):
        real = Words(crops(1, 2), keep_ratio=True)
        drawn = Words.from_arrays([np.full((1, 32, 100), 9, np.uint8)], ["x"], [np.ones((1, 4), np.float32)])
        words = MixedWords([real, drawn], [[1, 0, 1], [0]])
        batch = words.__getitems__([3, 0, 1])
        assert (words.counts, words.labels, words.widths.tolist()) == (
            [3, 1],
            ["w2", "w1", "w2", "x"],
            [39, 36, 39, 100],
        )
        assert (batch.labels, batch.widths.tolist(), batch.index.tolist()) == (
            ["x", "w2", "w1"],
            [100, 39, 36],
            [3, 0, 1],
        )
        assert batch.images[:, 0, 5, 5].tolist() == [9, 2, 1]
        assert [len(own) for own in batch.boxes] == [1, 0, 0]


class TestBuckets:
    widths = np.random.default_rng(0).integers(16, 400, 1003)

    def test_every_position_once_and_neighbours_in_width(self):
        order = list(WidthBuckets(self.widths, 8, seed=3))
        assert sorted(order) == list(range(1003))
        assert len(WidthBuckets(self.widths, 8)) == 1003
        spread = [np.ptp(self.widths[order[i : i + 8]]) for i in range(0, 1000, 8)]
        assert np.median(spread) < 15
        assert np.corrcoef(np.arange(1000), self.widths[order[:1000]])[0, 1] < 0.3  # batches are in no order

    def test_seed_and_epoch_make_the_order(self):
        buckets = WidthBuckets(self.widths, 8, seed=3)
        first = list(buckets)
        assert first == list(buckets) == list(WidthBuckets(self.widths, 8, seed=3))
        buckets.set_epoch(1)
        assert first != list(buckets)
        assert first != list(WidthBuckets(self.widths, 8, seed=4))
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            WidthBuckets(self.widths, 0)

    def test_batches_waste_less(self):
        words = Words.from_arrays([np.zeros((1, 2, w), np.uint8) for w in self.widths], ["a"] * 1003)
        loader = DataLoader(words, 8, sampler=WidthBuckets(words.widths, 8), collate_fn=lambda batch: batch)
        wasted = 1 - self.widths.sum() / sum(batch.images.shape[3] * len(batch) for batch in loader)
        assert wasted < 0.06


def test_what_a_batch_has_is_what_fit_makes():
    words = Words(crops(7), in_memory=False)
    np.testing.assert_array_equal(words[0].images[0].numpy(), fit(crops(7).open(0)))
