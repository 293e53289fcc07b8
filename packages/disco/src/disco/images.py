"""Sets of square images of one size: in memory, or decoded when they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from disco.decode import square
from disco.readers import Pictures

logger = logging.getLogger(__name__)

MOST_CORRUPT = 0.01  # of a set's images


class Images(Dataset[dict[str, Tensor]]):
    """Square images of one size. A list of indices gives a whole batch.

    Args:
        images: uint8 (images, 3, side, side), or :class:`Undecoded` ones.
        labels: int64 (images,), numbers of classes, or None. classes: their names.

    Attributes:
        pixels: all images, uint8 (images, 3, side, side), where they are in memory, else None.

    Raises:
        ValueError: for images of another shape or type, and for labels that are more or fewer than they.

    >>> images = Images(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5), tuple("abcde"))
    >>> batch = images.select([4, 2]).__getitems__([0])
    >>> batch["images"].shape, batch["index"], batch["labels"]
    (torch.Size([1, 3, 8, 8]), tensor([0]), tensor([4]))
    """

    def __init__(self, images: Tensor | Undecoded, labels: Tensor | None = None, classes: Sequence[str] = ()) -> None:
        if isinstance(images, Tensor) and (
            images.dtype != torch.uint8
            or images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] != images.shape[3]
        ):
            raise ValueError(f"images must be uint8 (images, 3, side, side), not {images.dtype} {tuple(images.shape)}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images, but labels of shape {tuple(labels.shape)}")
        self._images, self.labels, self.classes = images, labels, tuple(classes)
        self.pixels = images if isinstance(images, Tensor) else None

    @property
    def side(self) -> int:
        """Of each image, pixels."""
        return self._images.side if isinstance(self._images, Undecoded) else self._images.shape[-1]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            ``images``, uint8 (batch, 3, side, side); ``index``, int64 (batch,), their positions in this set, and ``labels``,
            int64 (batch,), if it has any. A corrupt image that is decoded only now is replaced by the next one, index and
            label included.

        Raises:
            ValueError: if more than 1 % of the images are corrupt. IndexError: for a position beyond the set.
        """
        index = torch.as_tensor(indices)
        if isinstance(self._images, Tensor):
            images = self._images[index]
        else:
            images, index = self._images.decode(index.tolist())
        batch = {"images": images, "index": index}
        return batch if self.labels is None else batch | {"labels": self.labels[index]}

    def select(self, indices: Sequence[int] | Tensor) -> Images:
        """The images at these positions, in this order; positions count anew."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return Images(self._images[index], None if self.labels is None else self.labels[index], self.classes)


class Undecoded:
    """Pictures that are decoded when they are asked for, in any worker of a DataLoader.

    Args:
        pictures: see :class:`disco.readers.Pictures`. side: of the squares, pixels.
    """

    def __init__(self, pictures: Pictures, side: int) -> None:
        self.pictures, self.side = pictures, side
        self.corrupt: dict[int, Exception] = {}  # that this process has met

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Tensor) -> Undecoded:
        return Undecoded(self.pictures.select(index.tolist()), self.side)

    def decode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images, and their positions: another one where a corrupt image is replaced by the next."""
        positions = [range(len(self))[i] for i in indices]
        images = []
        for n in range(len(positions)):
            while (image := self._image(positions[n])) is None:
                positions[n] = (positions[n] + 1) % len(self)
            images.append(image)
        return torch.stack(images), torch.tensor(positions)

    def _image(self, index: int) -> Tensor | None:
        if index in self.corrupt:
            return None
        try:
            with self.pictures.open(index) as picture:
                return square(picture, self.side)
        except Exception as error:  # Pillow raises anything for a broken file
            self.corrupt[index] = error
            told = _told(self.pictures, self.corrupt)
            if len(self.corrupt) == 1:
                logger.warning("%s; it is replaced by the next one, and so will others be", told)
            return None


def decoded(pictures: Pictures, side: int) -> Images:
    """Pictures as images in memory; corrupt ones are left out, with one warning.

    Raises:
        ValueError: if more than 1 % are corrupt.
    """
    pixels = torch.empty(len(pictures), 3, side, side, dtype=torch.uint8)
    corrupt: dict[int, Exception] = {}

    def decode(index: int) -> None:
        try:
            with pictures.open(index) as picture:
                pixels[index] = square(picture, side)
        except Exception as error:  # Pillow raises anything for a broken file
            corrupt[index] = error

    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        done = pool.imap_unordered(decode, range(len(pictures)), chunksize=64)
        for _ in tqdm(done, "decode", len(pictures), unit=" images", delay=2, leave=False):
            pass
    if corrupt:
        logger.warning("%s; left out", _told(pictures, corrupt))
        kept = [i for i in range(len(pictures)) if i not in corrupt]
        pixels, pictures = pixels[kept], pictures.select(kept)
    return Images(pixels, pictures.label_tensor, pictures.classes)


def _told(pictures: Pictures, corrupt: Mapping[int, Exception]) -> str:
    """A line about the corrupt images; an error if they are too many."""
    first = min(corrupt)
    line = (
        f"{len(corrupt)} of {len(pictures)} images cannot be read, the first {pictures.names[first]}: {corrupt[first]}"
    )
    if len(corrupt) > MOST_CORRUPT * len(pictures):
        raise ValueError(f"more than {MOST_CORRUPT:.0%} of the images are corrupt: {line}")
    return line
