"""Which images to learn from and which to judge on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from papercore.lab.cli import flag

from disco.images import Images as Images
from disco.images import Undecoded, decoded
from disco.readers import Pictures, read

SMALL, DEFAULT_SIZE = 64, 224  # pixels
MARGIN = 256 / 224  # of a decoded image's side to a view's, as is usual for ImageNet
MOST_IN_MEMORY = 2**32  # bytes of all decoded images


@dataclass
class DataOptions:
    """Which images."""

    data: str = flag(
        "sample; cifar10 (in $PAPERCORE_DATA/disco); a folder of images, labelled if it is train/CLASS/... and test/CLASS/...; "
        "tar archives of such a folder or WebDataset shards (file, folder, pattern, or several parted by commas); an .npz file; "
        "torchvision:NAME:ROOT; hub:NAME[:CONFIG]",
        "sample",
    )
    image_size: int | None = flag("side of the views, pixels; by default the images' own up to 64, else 224", None)
    decode_size: int | None = flag(
        "side of the centre squares that images are decoded to, pixels; by default 256/224 of image_size, or the images' own "
        "if all are squares of one size up to 64",
        None,
    )
    max_train: int | None = flag("train on at most so many images, of all classes alike", None)
    max_test: int | None = flag("judge on at most so many images, of all classes alike", None)
    validation: float = flag(
        "share of each class's training images to hold out and judge on instead of the test images, to tune by", 0.0
    )

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("decode_size", 1), ("max_train", 2), ("max_test", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is a share, 0 <= validation < 1; got {self.validation}")


@dataclass
class Splits:
    """The parts of a data set.

    Args:
        train: to learn from. test: to judge on, the validation images if these are asked for; None if there are none.
        image_size: side of the views to train on, pixels.
    """

    train: Images
    test: Images | None = None
    image_size: int = DEFAULT_SIZE


def load_data(options: DataOptions) -> Splits:
    """Read the data and choose among them; the same options give the same images everywhere.

    Images that take up to 4 GiB, training and test together, are decoded now and kept in memory; corrupt ones are left out, with
    a warning. ``max_train`` and ``max_test`` take the first so many of a fixed random order in which classes take turns, so that
    fewer images are a part of more. Validation images are held out before that.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as :func:`disco.readers.read`.
        ValueError: for more than 1 % of corrupt images, fewer than two images to train on, and a share that holds no image out.

    >>> splits = load_data(DataOptions(max_train=100))
    >>> len(splits.train), splits.train.labels.bincount().tolist(), splits.image_size
    (100, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10], 16)
    """
    train, test = read(options.data)
    chosen = np.arange(len(train))
    if options.validation:
        test = train
        chosen, held_out = _hold_out(train.labels, len(train), options.validation, options.data)
    else:
        held_out = np.arange(0 if test is None else len(test))
    train = _part(train, chosen, options.max_train)
    test = None if test is None else _part(test, held_out, options.max_test)
    if len(train) < 2:
        raise ValueError(f"{options.data}: training needs at least 2 images, but there are {len(train)}")
    parts = [part for part in (train, test) if part is not None]
    side = options.decode_size or _own_side(parts) or round(MARGIN * (options.image_size or DEFAULT_SIZE))
    lazy = sum(map(len, parts)) * 3 * side**2 > MOST_IN_MEMORY
    images = [
        Images(Undecoded(part, side), part.label_tensor, part.classes) if lazy else decoded(part, side)
        for part in parts
    ]
    size = options.image_size or (side if side <= SMALL else DEFAULT_SIZE)
    return Splits(images[0], images[1] if test is not None else None, size)


def channel_statistics(images: Images, most: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the three channels over all pixels, for values in [0, 1].

    Args:
        images: of these, ``most`` at even distances.

    Returns:
        (mean, std), each of three numbers. A deviation is at least 1/255, so that one can divide by it.

    >>> channel_statistics(Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 4, 4)))
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int))
    count, total, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(chosen), 256):
        values = images.__getitems__(chosen[start : start + 256].tolist())["images"].double() / 255
        count += values.numel() // 3
        total += values.sum((0, 2, 3))
        squares += values.square().sum((0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=255**-2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


# Choosing


def _turns(labels: Sequence[int] | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random order, and in this order how many of the same class come before each."""
    order = np.random.default_rng(0).permutation(count)
    classes = np.zeros(count, int) if labels is None else np.asarray(labels)[order]
    by_class = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[by_class], classes[by_class])
    before = np.empty(count, int)
    before[by_class] = np.arange(count) - starts
    return order, before


def _hold_out(labels: Sequence[int] | None, count: int, share: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (kept, held out): of each class its share, but at least one image of each is kept."""
    order, before = _turns(labels, count)
    classes = np.zeros(count, int) if labels is None else np.asarray(labels)
    sizes = np.bincount(classes, minlength=1)
    held_out = before < np.minimum(np.round(share * sizes), sizes - 1)[classes[order]]
    if not held_out.any():
        raise ValueError(f"{name}: a share of {share} of the training images holds out none; raise validation")
    return np.sort(order[~held_out]), np.sort(order[held_out])


def _part(pictures: Pictures, positions: np.ndarray, most: int | None) -> Pictures:
    part = pictures.select(positions.tolist())
    if most is None or most >= len(part):
        return part
    order, before = _turns(part.labels, len(part))
    return part.select(np.sort(order[np.argsort(before, kind="stable")[:most]]).tolist())


def _own_side(parts: Sequence[Pictures]) -> int | None:
    """The side of all pictures if they are squares of one size up to 64; large ones are not all opened."""
    side = None
    for part in parts:
        for i in range(len(part)):
            try:
                with part.open(i) as picture:
                    width, height = picture.size
            except Exception:  # corrupt; told when it is decoded
                continue
            if width != height or width > SMALL or side not in (None, width):
                return None
            side = width
    return side
