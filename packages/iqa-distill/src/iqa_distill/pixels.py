"""Decoded images in one piece of memory, or of a file: each is decoded once, however many crops are drawn."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Int, UInt8
from numpy.lib import format as npy
from papercore.lab.files import write_json
from torch import Tensor
from tqdm.auto import tqdm

from iqa_distill.images import listed, reflect_to

logger = logging.getLogger(__name__)

CHUNK = 32  # images that are decoded before they are written

Open = Callable[[int], np.ndarray]


class Pixels:
    """Images of any sizes, uint8 RGB; ``pixels[i]`` is a view (3, height, width).

    Args:
        buffer: uint8 (n,), in which each image lies as (3, height, width). names: of the images.
        shapes: int64 (images, 2), height and width. offsets: int64 (images,), where each starts.

    >>> pixels = Pixels.of([np.zeros((40, 60, 3), np.uint8), np.ones((32, 32, 3), np.uint8)], ["a", "b"])
    >>> len(pixels), pixels[1].shape, pixels.select([1]).names
    (2, torch.Size([3, 32, 32]), ['b'])
    """

    def __init__(self, buffer: Tensor, names: Sequence[str], shapes: np.ndarray, offsets: np.ndarray) -> None:
        self.buffer, self.names, self.shapes, self.offsets = buffer, list(names), shapes, offsets

    @classmethod
    def of(cls, arrays: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> Pixels:
        """A copy of decoded images.

        Raises:
            ValueError: for other arrays than uint8 (height, width, 3), and for more or fewer names than images.
        """
        if len(arrays) != len(names):
            raise ValueError(f"{len(arrays)} images, but {len(names)} names")
        for name, array in zip(names, arrays, strict=True):
            _check(array, name)
        return _packed([array.transpose(2, 0, 1) for array in arrays], names)

    @classmethod
    def decode(
        cls, names: Sequence[str], open: Open, cache: Path | None = None, skip_bad: bool = False
    ) -> tuple[Pixels, list[int]]:
        """Decode each image once, in several threads.

        Args:
            names: of the images. open: number of an image -> uint8 (height, width, 3).
            cache: an ``.npy`` file, with a JSON file beside it, that keeps the decoded pixels as they are. Images then stay on
                disk, mapped to memory. A file that is there is used if it holds these names and, by the first and the last
                image, what ``open`` gives. A run that was cut off leaves none.
            skip_bad: leave out what cannot be read.

        Returns:
            The images, and the numbers of those left out.

        Raises:
            ValueError: for an image that cannot be read, naming it; if none can; for a cache of other images.
        """
        if cache is None:
            images, skipped = [], []
            for i, array in _decoded(names, open, skip_bad):
                if array is None:
                    skipped.append(i)
                else:
                    images.append(array)
            return _packed(images, _without(names, skipped)), skipped
        if cache.suffix != ".npy":
            raise ValueError(f"{cache}: the file of decoded pixels must end in .npy")
        if not (cache.exists() and _index(cache).exists()):
            _write(cache, names, open, skip_bad)
        return _mapped(cache, names, open, skip_bad)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 height width"]:
        height, width = self.shapes[index].tolist()
        start = int(self.offsets[index])
        return self.buffer[start : start + 3 * height * width].view(3, height, width)

    def select(self, indices: Sequence[int] | np.ndarray) -> Pixels:
        """The images at these places, in this order; no pixel is copied."""
        chosen = np.asarray(indices, np.int64)
        return Pixels(self.buffer, [self.names[i] for i in chosen], self.shapes[chosen], self.offsets[chosen])

    def to(self, device: torch.device | str) -> Pixels:
        """All on a device; crops are then cut there."""
        return Pixels(self.buffer.to(device), self.names, self.shapes, self.offsets)

    def crops(
        self, index: Int[Tensor, " batch"], size: int, generator: torch.Generator, flip: bool = True
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """A random crop of each of these images, flipped left to right half of the time.

        Nothing else is done to them: another size, blur or colour would change the quality that is to be learnt.

        Args:
            index: numbers of images. size: of a crop, pixels; a smaller image is padded, see
                :func:`iqa_distill.images.reflect_to`. generator: three numbers are drawn for each crop.
        """
        draws = torch.rand(len(index), 3, dtype=torch.float64, generator=generator, device=generator.device)
        crops = []
        for i, (down, across, turn) in zip(index.tolist(), draws.tolist(), strict=True):
            image = reflect_to(self[i], size, size)
            y, x = int(down * (image.shape[1] - size + 1)), int(across * (image.shape[2] - size + 1))
            crop = image[:, y : y + size, x : x + size]
            crops.append(
                crop.flip(-1) if flip and turn < 0.5 else crop
            )  # one by one: several times faster than in a batch
        return torch.stack(crops)


def _check(array: np.ndarray, name: str) -> None:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name}: expected uint8 (height, width, 3), got {array.dtype} {array.shape}")


def _without(names: Sequence[str], skipped: Sequence[int]) -> list[str]:
    left_out = set(skipped)
    return [name for i, name in enumerate(names) if i not in left_out]


def _decoded(names: Sequence[str], open: Open, skip_bad: bool) -> Iterator[tuple[int, np.ndarray | None]]:
    """(Number, uint8 (3, height, width), or None if it is to be left out) of each image, in order."""

    def decode(i: int) -> np.ndarray | None:
        try:
            image = open(i)
            _check(image, names[i])
        except (ValueError, OSError) as error:
            if skip_bad:
                return None
            raise ValueError(f"{names[i]} cannot be read: {error}; --skip_bad leaves such images out") from None
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    skipped: list[str] = []
    with (
        ThreadPool(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(names), desc="decode", unit=" images", delay=2, leave=False) as bar,
    ):
        for start in range(0, len(names), CHUNK):
            for i, image in enumerate(pool.map(decode, range(start, min(start + CHUNK, len(names)))), start):
                if image is None:
                    skipped.append(names[i])
                yield i, image
                bar.update()
    if skipped:
        logger.warning("%d of %d images cannot be read and are left out: %s", len(skipped), len(names), listed(skipped))
    if len(skipped) == len(names):
        raise ValueError("none of the images can be read")


def _layout(shapes: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Shapes, and where images start; one more number says where the last ends."""
    sizes = np.asarray(shapes, np.int64).reshape(-1, 2)
    return sizes, np.concatenate([[0], np.cumsum(3 * sizes.prod(1))])


def _packed(images: list[np.ndarray], names: Sequence[str]) -> Pixels:
    """Arrays (3, height, width), which are taken out of their list one by one, so that memory holds each once."""
    shapes, offsets = _layout([image.shape[1:] for image in images])
    buffer = np.empty(offsets[-1], np.uint8)
    for i in reversed(range(len(images))):
        image = images.pop()
        buffer[offsets[i] : offsets[i + 1]].reshape(image.shape)[...] = image
    return Pixels(torch.from_numpy(buffer), names, shapes, offsets[:-1])


# The file of decoded pixels


def _index(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.json")


def _write(cache: Path, names: Sequence[str], open: Open, skip_bad: bool) -> None:
    """The pixels, image after image, under another name until all are there; then names and shapes."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    _index(cache).unlink(missing_ok=True)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}")
    shapes, skipped, size = [], [], 0
    try:
        with temporary.open("wb") as file:
            _write_header(file, 0)
            for i, image in _decoded(names, open, skip_bad):
                if image is None:
                    skipped.append(i)
                    continue
                file.write(image.data)
                shapes.append(image.shape[1:])
                size += image.size
            file.seek(0)
            _write_header(file, size)  # as long as before: the format leaves room for the number
        temporary.replace(cache)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(_index(cache), {"names": list(names), "skipped": skipped, "shapes": shapes})


def _write_header(file: BinaryIO, size: int) -> None:
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (size,)})


def _mapped(cache: Path, names: Sequence[str], open: Open, skip_bad: bool) -> tuple[Pixels, list[int]]:
    try:
        index = json.loads(_index(cache).read_text(encoding="utf-8"))
        known, skipped = index["names"], index["skipped"]
        shapes, offsets = _layout(index["shapes"])
        buffer = np.load(cache, mmap_mode="c", allow_pickle=False)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{cache}: damaged ({error}); delete it and {_index(cache).name}") from None
    remedy = f"delete it and {_index(cache).name}, or name another file with --pixel_cache"
    if known != list(names):
        raise ValueError(f"{cache} holds other images ({len(known)}, not these {len(names)}): {remedy}")
    if buffer.shape != (offsets[-1],) or buffer.dtype != np.uint8 or len(shapes) + len(skipped) != len(names):
        raise ValueError(f"{cache}: its size is not that of its images: {remedy}")
    if skipped and not skip_bad:
        raise ValueError(
            f"{cache} lacks images that could not be read, --skip_bad leaves them out: {listed([names[i] for i in skipped])}"
        )
    pixels = Pixels(torch.from_numpy(buffer), _without(names, skipped), shapes, offsets[:-1])
    kept = [i for i in range(len(names)) if i not in set(skipped)]
    for place in (0, -1):
        image = torch.from_numpy(open(kept[place])).movedim(2, 0)
        if not torch.equal(pixels[place], image):
            raise ValueError(
                f"{cache} holds other pixels of {pixels.names[place]} than are there now, by another file or size: {remedy}"
            )
    return pixels, skipped
