"""Sets of fitted crops and their batches: in memory, or decoded when they are asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from dsan.images import LEAST_WIDTH, Size, collate, fit
from dsan.readers import Crops

logger = logging.getLogger(__name__)

MOST_IN_MEMORY = 2**31  # bytes of a set's fitted crops
MOST_CORRUPT = 0.01  # of a set's crops

Fitted = tuple[np.ndarray, np.ndarray | None]  # pixels (channels, height, width), boxes (n, 4)


@dataclass
class WordBatch:
    """Crops side by side.

    Args:
        images: uint8 (b, channels, height, W). widths: int64 (b,), columns that are a crop's own; None: all W of each.
        labels: texts. index: int64 (b,), positions in the set.
        boxes: of each crop float32 (characters, 4): x, y, width, height in pixels of ``images``; (0, 4) where not known. None: of
            no crop.
    """

    images: Tensor
    widths: Tensor | None
    labels: list[str]
    index: Tensor
    boxes: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """Its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """For a DataLoader that pins memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Self:
        widths = None if self.widths is None else move(self.widths)
        return replace(self, images=move(self.images), widths=widths, index=move(self.index))


class Words(Dataset[WordBatch]):
    """Fitted crops of words; a list of positions gives a batch, one position a batch of one.

    Args:
        crops: with labels as a recogniser is to read them; see :func:`dsan.readers.audit`.
        height, width, channels, keep_ratio, max_width, rotate_tall: see :class:`dsan.images.Size`.
        in_memory: whether to decode all crops now; None: if they take less than 2 GiB.

    Attributes:
        names: of the crops. labels: texts. widths: int64 (n,), of the fitted crops, pixels.

    Raises:
        ValueError: if more than 1 % of the crops cannot be decoded, now or in a batch. Up to 1 % are left out if all are decoded
            now, else each is replaced by the next one; a warning says how many, and names the first.

    >>> words = Words.from_arrays(np.zeros((5, 1, 32, 100), np.uint8), list("abcde"))
    >>> batch = words.__getitems__([3, 1])
    >>> batch.images.shape, batch.widths, batch.labels, batch.index
    (torch.Size([2, 1, 32, 100]), None, ['d', 'b'], tensor([3, 1]))
    """

    names: Sequence[str]
    labels: list[str]
    widths: np.ndarray
    _fitted: Sequence[Any] | _Arrays | None

    def __init__(
        self,
        crops: Crops,
        *,
        height: int = 32,
        width: int = 100,
        channels: int = 1,
        keep_ratio: bool = False,
        max_width: int = 800,
        rotate_tall: bool = False,
        in_memory: bool | None = None,
    ) -> None:
        self._size = Size(height, width, channels, keep_ratio, max_width, rotate_tall)
        self._crops, self._fitted = crops, None
        self._corrupt: dict[int, Exception] = {}  # that this process has met
        self.names, self.labels = crops.names, crops.labels
        self.widths = np.full(len(crops), width)
        if keep_ratio:
            self.widths = np.array(_in_threads(self._width, len(crops), "read sizes"), np.int64)
        if in_memory is None:
            in_memory = channels * height * int(self.widths.sum()) < MOST_IN_MEMORY
        if in_memory:
            self._decode_all()

    @classmethod
    def from_arrays(
        cls, arrays: Sequence[np.ndarray] | np.ndarray, labels: Sequence[str], boxes: Sequence[np.ndarray] | None = None
    ) -> Words:
        """Of crops that are fitted already.

        Args:
            arrays: uint8 (n, channels, height, width), or n of (channels, height, w). labels: as a recogniser is to read them.
            boxes: of each crop (characters, 4): x, y, width, height in its pixels.

        Raises:
            ValueError: for another type or shape, or different numbers of crops, labels and boxes.
        """
        first = arrays[0] if len(arrays) else np.empty(0)
        if first.dtype != np.uint8 or first.ndim != 3 or first.shape[0] not in (1, 3):
            raise ValueError(
                f"crops must be uint8 (1 or 3, height, width), got {len(arrays)} of {first.dtype} {first.shape}"
            )
        if len(labels) != len(arrays) or (boxes is not None and len(boxes) != len(arrays)):
            others = "" if boxes is None else f" and {len(boxes)} of boxes"
            raise ValueError(f"{len(arrays)} crops, but {len(labels)} labels{others}")
        words = cls.__new__(cls)
        words._fitted = _Arrays(arrays, boxes)
        words._size = Size(first.shape[1], first.shape[2], first.shape[0])
        words.names, words.labels = [f"crop {i}" for i in range(len(labels))], list(labels)
        same = isinstance(arrays, np.ndarray)
        words.widths = np.full(len(labels), first.shape[2]) if same else np.array([a.shape[2] for a in arrays])
        return words

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> WordBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> WordBatch:
        """A batch. Boxes are left out of it where there are more or fewer than characters.

        Raises:
            IndexError: for a position beyond the set.
        """
        rows = [range(len(self))[i] for i in indices]
        fitted = []
        for n in range(len(rows)):
            while (found := self._get(rows[n])) is None:
                rows[n] = (rows[n] + 1) % len(self)
            fitted.append(found)
        images, widths = collate([array for array, _ in fitted])
        labels = [self.labels[i] for i in rows]
        boxes = None
        if any(own is not None for _, own in fitted):
            none = np.zeros((0, 4), np.float32)
            boxes = [
                none if own is None or len(own) != len(text) else own
                for (_, own), text in zip(fitted, labels, strict=True)
            ]
        same = bool((widths == images.shape[3]).all())
        return WordBatch(images, None if same else widths, labels, torch.tensor(rows), boxes)

    def arrays(self, positions: Iterable[int] | None = None) -> list[np.ndarray]:
        """The crops at these positions (None: all), each uint8 (channels, height, w); one that is corrupt is black."""
        arrays = []
        for i in range(len(self)) if positions is None else positions:
            found = self._get(i)
            blank = (self._size.channels, self._size.height, self.widths[i])
            arrays.append(np.zeros(blank, np.uint8) if found is None else found[0])
        return arrays

    def select(self, positions: Sequence[int]) -> Words:
        """The crops at these positions, in this order; positions count anew."""
        return MixedWords([self], [positions])

    def _get(self, index: int) -> Fitted | None:
        """A crop, or None if it is corrupt."""
        if self._fitted is not None:
            return self._fitted[index]
        if index in self._corrupt:
            return None
        try:
            return self._decoded(index)
        except ValueError as error:
            self._corrupt[index] = error
            told = self._told()
            if len(self._corrupt) == 1:
                logger.warning("%s; it is replaced by the next one, and so will others be", told)
            return None

    def _decoded(self, index: int) -> Fitted:
        picture, boxes = self._crops.open(index), self._crops.boxes
        array = fit(picture, **asdict(self._size))
        return array, None if boxes is None else _fitted_boxes(boxes[index], picture.size, array.shape, self._size)

    def _decode_all(self) -> None:
        def decode(index: int) -> Fitted | None:
            try:
                return self._decoded(index)
            except ValueError as error:
                self._corrupt[index] = error
                return None

        fitted = _in_threads(decode, len(self), "decode")
        if self._corrupt:
            logger.warning("%s; left out", self._told())
        kept = [i for i, crop in enumerate(fitted) if crop is not None]
        self._fitted, self.widths = [fitted[i] for i in kept], self.widths[kept]
        self.names, self.labels = [self.names[i] for i in kept], [self.labels[i] for i in kept]

    def _width(self, index: int) -> int:
        pixels = self._crops.size(index)
        return LEAST_WIDTH if pixels is None else self._size.fitted_width(*pixels)

    def _told(self) -> str:
        """A line about the corrupt crops; an error if they are too many."""
        line = (
            f"{len(self._corrupt)} of {len(self)} crops cannot be read, the first: {self._corrupt[min(self._corrupt)]}"
        )
        if len(self._corrupt) > MOST_CORRUPT * len(self):
            raise ValueError(f"more than {MOST_CORRUPT:.0%} of the crops are corrupt: {line}")
        return line


class MixedWords(Words):
    """Crops of several sets as one, one set after the other.

    Args:
        parts: the sets. positions: for each set the positions of its crops, any of them as often as you like.

    Attributes:
        counts: how many crops are of each set.

    >>> one = Words.from_arrays(np.zeros((1, 1, 32, 100), np.uint8), ["a"])
    >>> two = Words.from_arrays(np.zeros((2, 1, 32, 100), np.uint8), ["b", "c"])
    >>> MixedWords([one, two], [[0, 0], [1]]).labels
    ['a', 'a', 'c']
    """

    def __init__(self, parts: Sequence[Words], positions: Sequence[Sequence[int] | np.ndarray]) -> None:
        self.parts, self._fitted, self._size = list(parts), None, parts[0]._size
        chosen = [np.asarray(own, np.int64) for own in positions]
        self._part = np.repeat(np.arange(len(parts)), [len(own) for own in chosen])
        self._position = np.concatenate(chosen)
        pairs = list(zip(parts, chosen, strict=True))
        self.counts = [len(own) for own in chosen]
        self.names = [part.names[i] for part, own in pairs for i in own]
        self.labels = [part.labels[i] for part, own in pairs for i in own]
        self.widths = np.concatenate([part.widths[own] for part, own in pairs])

    def _get(self, index: int) -> Fitted | None:
        return self.parts[self._part[index]]._get(int(self._position[index]))


class WidthBuckets(Sampler[int]):
    """Every position once, crops of like width together, in another order each epoch.

    Crops are shuffled and sorted by width within pools of 50 batches; then the batches are shuffled. What is left over, if the
    batches do not come out even, stands at the end.

    Args:
        widths: of the crops. batch_size: how many following positions make a batch. seed: of the order, along with the epoch.

    >>> list(WidthBuckets([30, 10, 30, 10], 2, seed=1))
    [1, 3, 0, 2]
    """

    pool = 50  # batches

    def __init__(self, widths: Sequence[int] | np.ndarray, batch_size: int, *, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.widths, self.batch_size, self.seed = np.asarray(widths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Give the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.widths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.widths))
        whole = len(order) // self.batch_size * self.batch_size
        batches: list[np.ndarray] = []
        for start in range(0, whole, self.pool * self.batch_size):
            pool = order[start : min(start + self.pool * self.batch_size, whole)]
            pool = pool[np.argsort(self.widths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.batch_size)
        for i in random.permutation(len(batches)):
            yield from batches[i].tolist()
        yield from order[whole:].tolist()


class _Arrays:
    """Fitted crops that are not a list already, such as a large array."""

    def __init__(self, arrays: Sequence[np.ndarray] | np.ndarray, boxes: Sequence[np.ndarray] | None) -> None:
        self.arrays, self.boxes = arrays, boxes

    def __getitem__(self, index: int) -> Fitted:
        return self.arrays[index], None if self.boxes is None else self.boxes[index]


def _fitted_boxes(boxes: np.ndarray, picture: tuple[int, int], shape: tuple[int, ...], size: Size) -> np.ndarray:
    """In pixels of the fitted crop of this shape (channels, height, width)."""
    if size.turns(*picture):
        x, y, width, height = boxes.T
        boxes = np.stack([y, picture[0] - x - width, height, width], 1)
        picture = picture[::-1]
    scale = np.array([shape[2] / picture[0], shape[1] / picture[1]] * 2)
    return (boxes * scale).astype(np.float32)


def _in_threads(work: Callable[[int], Any], count: int, title: str) -> list[Any]:
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        done = pool.imap(work, range(count), chunksize=64)
        return list(tqdm(done, title, count, unit=" crops", delay=2, leave=False))
