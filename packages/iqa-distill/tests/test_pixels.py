import json

import numpy as np
import pytest
import torch
from iqa_distill import pixels as module
from iqa_distill.pixels import Pixels

RANDOM = np.random.default_rng(0)
SHAPES = [(40, 60), (33, 32), (90, 35)]
ARRAYS = [RANDOM.integers(0, 256, (*shape, 3), np.uint8) for shape in SHAPES]
NAMES = ["a", "b", "c"]


def chw(array):
    return torch.from_numpy(array).movedim(2, 0)


def agree(pixels, arrays=ARRAYS):
    return len(pixels) == len(arrays) and all(torch.equal(pixels[i], chw(array)) for i, array in enumerate(arrays))


class Opened:
    """ARRAYS, and how often each has been opened; an array that is None cannot be."""

    def __init__(self, arrays=ARRAYS):
        self.arrays, self.times = arrays, [0] * len(arrays)

    def __call__(self, i):
        self.times[i] += 1
        if self.arrays[i] is None:
            raise ValueError("it is damaged")
        return self.arrays[i]


class TestPixels:
    def test_of(self):
        pixels = Pixels.of(ARRAYS, NAMES)
        assert agree(pixels)
        assert pixels.shapes.tolist() == [list(shape) for shape in SHAPES]
        assert pixels.names == NAMES
        assert pixels.buffer.numel() == sum(array.size for array in ARRAYS)

    def test_select_shares_the_memory(self):
        pixels = Pixels.of(ARRAYS, NAMES)
        chosen = pixels.select([2, 0]).select(np.array([0, 1, 0]))
        assert agree(chosen, [ARRAYS[2], ARRAYS[0], ARRAYS[2]])
        assert chosen.names == ["c", "a", "c"]
        assert chosen[0].data_ptr() == pixels[2].data_ptr()

    def test_to(self):
        assert agree(Pixels.of(ARRAYS, NAMES).to("cpu"))

    def test_wrong_arrays(self):
        with pytest.raises(ValueError, match=r"b: expected uint8 \(height, width, 3\), got float64"):
            Pixels.of([ARRAYS[0], ARRAYS[1] / 255], ["a", "b"])
        with pytest.raises(ValueError, match="3 images, but 2 names"):
            Pixels.of(ARRAYS, ["a", "b"])


class TestCrops:
    pixels = Pixels.of(ARRAYS, NAMES)

    def draw(self, index, size=32, seed=0, **options):
        return self.pixels.crops(torch.tensor(index), size, torch.Generator().manual_seed(seed), **options)

    def test_each_is_a_crop_of_its_image_or_its_mirror_image(self):
        index = [0, 1, 2, 1, 0] * 8
        crops = self.draw(index)
        assert (crops.shape, crops.dtype) == ((40, 3, 32, 32), torch.uint8)
        flipped = 0
        for i, crop in zip(index, crops, strict=True):
            windows = self.pixels[i].unfold(1, 32, 1).unfold(2, 32, 1)
            same, mirrored = (
                (windows == form[:, None, None]).all(-1).all(-1).all(0).any() for form in (crop, crop.flip(-1))
            )
            assert same != mirrored
            flipped += int(mirrored)
        assert 8 < flipped < 32

    def test_by_seed(self):
        assert torch.equal(self.draw([0, 2]), self.draw([0, 2]))
        assert not torch.equal(self.draw([0, 2]), self.draw([0, 2], seed=1))

    def test_draws_do_not_depend_on_sizes(self):
        """So that a crop's place does not move when another image changes."""
        assert torch.equal(self.draw([1, 2])[1], self.draw([0, 2])[1])

    def test_without_flip_all_places_occur(self):
        crops = self.draw([1] * 60, flip=False)
        places = {tuple(crop[:, 0, 0].tolist()) for crop in crops}
        assert places == {tuple(self.pixels[1][:, y, 0].tolist()) for y in (0, 1)}

    def test_small_images_are_padded(self):
        with pytest.warns(UserWarning, match="padded by reflection"):
            crops = self.draw([1], 40, flip=False)
        assert any(torch.equal(crops[0, :, y : y + 33, 4:36], self.pixels[1]) for y in (3, 4))


class TestDecode:
    def test_in_memory(self):
        opened = Opened()
        pixels, skipped = Pixels.decode(NAMES, opened)
        assert agree(pixels)
        assert (skipped, opened.times) == ([], [1, 1, 1])

    def test_more_than_a_chunk(self):
        arrays = [np.full((32, 32, 3), i, np.uint8) for i in range(70)]
        pixels, _ = Pixels.decode(list(map(str, range(70))), arrays.__getitem__)
        assert agree(pixels, arrays)

    @pytest.mark.parametrize("cached", [False, True])
    def test_unreadable(self, tmp_path, cached, caplog):
        """Trap 12: an error that names the file, or it is left out and listed; never noise in its place."""
        cache = tmp_path / "x.npy" if cached else None
        opened = Opened([ARRAYS[0], None, ARRAYS[2]])
        with pytest.raises(ValueError, match="b cannot be read: it is damaged; --skip_bad leaves such images out"):
            Pixels.decode(NAMES, opened, cache)
        assert not list(tmp_path.iterdir())
        for _ in range(2):
            pixels, skipped = Pixels.decode(NAMES, opened, cache, skip_bad=True)
            assert agree(pixels, [ARRAYS[0], ARRAYS[2]])
            assert (skipped, pixels.names) == ([1], ["a", "c"])
        assert "1 of 3 images cannot be read and are left out: b" in caplog.text
        if cached:
            with pytest.raises(ValueError, match=r"lacks images that could not be read.*: b$"):
                Pixels.decode(NAMES, opened, cache)

    def test_none_readable(self):
        with pytest.raises(ValueError, match="none of the images can be read"):
            Pixels.decode(["a"], Opened([None]), skip_bad=True)


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path):
        Pixels.decode(NAMES, Opened(), tmp_path / "folder" / "x.npy")
        return tmp_path / "folder" / "x.npy"

    def test_is_used(self, cache):
        """Trap 15: pixels are as they were. The first and the last image are looked at again, the others are not."""
        opened = Opened()
        pixels, _ = Pixels.decode(NAMES, opened, cache)
        assert agree(pixels)
        assert opened.times == [1, 0, 1]
        assert sorted(file.name for file in cache.parent.iterdir()) == ["x.npy", "x.npy.json"]
        assert isinstance(np.load(cache, mmap_mode="r", allow_pickle=False), np.memmap)

    def test_crops_equal_those_of_memory(self, cache):
        found, expected = (
            Pixels.decode(NAMES, Opened(), file)[0].crops(torch.arange(3), 32, torch.Generator().manual_seed(0))
            for file in (cache, None)
        )
        assert torch.equal(found, expected)

    def test_of_others_is_refused(self, cache):
        with pytest.raises(ValueError, match="holds other images"):
            Pixels.decode(["a", "b", "d"], Opened(), cache)
        resized = [*ARRAYS[:2], ARRAYS[2][:40]]
        with pytest.raises(ValueError, match=r"holds other pixels of c .* by another file or size: delete it"):
            Pixels.decode(NAMES, Opened(resized), cache)

    def test_of_another_size_is_refused(self, cache):
        np.save(cache, np.zeros(7, np.uint8))
        with pytest.raises(ValueError, match="its size is not that of its images"):
            Pixels.decode(NAMES, Opened(), cache)

    @pytest.mark.parametrize("part", ["x.npy", "x.npy.json"])
    def test_cut_short_is_refused(self, cache, part):
        file = cache.with_name(part)
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"x\.npy: damaged .*; delete it and x\.npy\.json"):
            Pixels.decode(NAMES, Opened(), cache)

    def test_pickle_is_refused(self, cache):
        np.save(cache, np.array([{}], object))  # as a pickle
        with pytest.raises(ValueError, match="damaged"):
            Pixels.decode(NAMES, Opened(), cache)

    def test_a_run_that_is_cut_off_leaves_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "CHUNK", 1)

        def opened(i):
            if i == 2:
                raise RuntimeError("stop")
            return ARRAYS[i]

        with pytest.raises(RuntimeError, match="stop"):
            Pixels.decode(NAMES, opened, tmp_path / "x.npy")
        assert not list(tmp_path.iterdir())
        assert agree(Pixels.decode(NAMES, Opened(), tmp_path / "x.npy")[0])

    def test_without_its_index_it_is_made_anew(self, cache):
        cache.with_name("x.npy.json").unlink()
        np.save(cache, np.zeros(7, np.uint8))
        assert agree(Pixels.decode(NAMES, Opened(), cache)[0])
        assert json.loads(cache.with_name("x.npy.json").read_text())["names"] == NAMES

    def test_suffix(self, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.npy"):
            Pixels.decode(NAMES, Opened(), tmp_path / "x.bin")
