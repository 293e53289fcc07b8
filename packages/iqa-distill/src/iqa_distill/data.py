"""Which images to learn from and which to judge on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from papercore.lab.cli import flag
from papercore.lab.images import FORMATS
from PIL import Image
from torch import Tensor

from iqa_distill.images import Preprocessing, ScoreScale, listed, open_rgb
from iqa_distill.pixels import Pixels
from iqa_distill.readers import PARTS, RatedImages, read_ratings, read_references

SAMPLE, RESYNTH = "sample", "tid2013-resynth"
DEIQT_KONIQ = (512, 384)  # height, width: DEIQT's code turns the sides of KonIQ-10k's landscapes round


@dataclass
class DataOptions:
    """Which images, and how they are cut."""

    data: str = flag(
        "sample (photographs distorted here, no human scores); tid2013-resynth (human scores; made once from $PAPERCORE_DATA); a "
        "CSV with image,mos[,reference][,split]; or a folder of LIVE, CSIQ, TID2013, KADID-10k, LIVEC, KonIQ-10k, LIVEFB or SPAQ",
        SAMPLE,
    )
    references: str | None = flag(
        "pool of pristine images to compare with: a folder, or bsds (in $PAPERCORE_DATA); by default originals of the training "
        "images, if the data has them, and bsds for tid2013-resynth",
        None,
    )
    test_share: float = flag(
        "share of the references to judge on, or of the images where references are unknown; not for data with a split",
        0.2,
    )
    validation: float = flag("share of the other references or images to hold out, to choose a model by", 0.0)
    split_seed: int = flag("of the split, 0 or more", 0)
    train_references: int | None = flag("train on the images of so many references only", None)
    crop_size: int | None = flag(
        "side of the square crops, pixels, a multiple of 16 (DEIQT: 224); by default the network's own", None
    )
    crops: int = flag("crops of each image in an epoch, and in a test score (DEIQT: 10)", 10)
    resize: list[int] | None = flag(
        "HEIGHT WIDTH to resize every image to, pixels; by default 384 512 for KonIQ-10k, as they are for others", None
    )
    deiqt_compat: bool = flag("resize KonIQ-10k to 512 384 (height, width) as DEIQT's code does, which distorts", False)
    resynth: str = flag("folder that tid2013-resynth is made in, 0.5 GB", "runs/iqa-resynth")
    pixel_cache: str | None = flag(
        "file (.npy) to keep decoded images in, for the next run and for data larger than the memory", None
    )
    skip_bad: bool = flag("leave out images that cannot be read, and list them, instead of stopping", False)
    lower_better: bool | None = flag("whether low scores are good; by default for LIVE and CSIQ alone", None)

    def __post_init__(self) -> None:
        for name in ("test_share", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share, 0 <= {name} < 1; got {getattr(self, name)}")
        if self.split_seed < 0 or self.crops < 1:
            raise ValueError(f"split_seed must be at least 0, crops at least 1; got {self.split_seed} and {self.crops}")
        if self.resize is not None and len(self.resize) != 2:
            raise ValueError(f"resize takes HEIGHT WIDTH, two numbers; got {self.resize}")
        if self.train_references is not None and self.train_references < 1:
            raise ValueError(f"train_references must be at least 1, got {self.train_references}")


@dataclass
class Rated:
    """Decoded images with scores.

    Args:
        pixels: the images. scores: float64 (n,), higher is better.
        references: of each the name of its pristine image or scene; None: unknown. ids: of each a hash of its pixels.
        names: of the images. distortions: of each the kind; None: unknown.
    """

    pixels: Pixels
    scores: np.ndarray
    references: list[str] | None
    ids: list[str]
    names: list[str]
    distortions: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)


class ReferencePool:
    """Pristine images to compare with.

    Args:
        pixels: the images. ids: of each its name as a reference; folder, suffix of an image file, and case do not matter.

    Raises:
        ValueError: for fewer than 2 images.
    """

    def __init__(self, pixels: Pixels, ids: Sequence[str]) -> None:
        if len(pixels) < 2:
            raise ValueError(f"a reference pool needs at least 2 images, got {len(pixels)}")
        self.pixels, self.ids = pixels, list(ids)
        known, codes = np.unique([reference_id(name) for name in ids], return_inverse=True)
        self._code = {str(name): i for i, name in enumerate(known)}
        self._order = torch.from_numpy(np.argsort(codes, kind="stable"))  # rows of one reference side by side
        self._starts = np.searchsorted(np.sort(codes), np.arange(len(known) + 1))

    def __len__(self) -> int:
        return len(self.pixels)

    def draw(self, own: Sequence[str | None], generator: torch.Generator) -> Int[Tensor, " batch"]:
        """A random row of the pool for each image, but never its own pristine original: what is compared is not aligned.

        Args:
            own: the reference of each image; None, or one that the pool has not: any row.

        Raises:
            ValueError: if nothing but an image's own reference is in the pool.
        """
        codes = [None if name is None else self._code.get(reference_id(name)) for name in own]
        starts, ends = (
            torch.tensor([0 if code is None else int(self._starts[code + end]) for code in codes], dtype=torch.int64)
            for end in (0, 1)
        )
        left = len(self) - (ends - starts)
        if len(codes) and int(left.min()) == 0:
            raise ValueError(f"the reference pool has nothing but {self.ids[0]}: no other image to compare with")
        draws = torch.rand(len(codes), dtype=torch.float64, generator=generator, device=generator.device).cpu()
        place = (draws * left).long()
        return self._order[torch.where(place >= starts, place + ends - starts, place)]


def reference_id(name: str) -> str:
    """A reference's name without folder, suffix of an image file and upper case.

    >>> reference_id("refs/I01.BMP"), reference_id("scene.1")
    ('i01', 'scene.1')
    """
    path = Path(name.lower())
    return path.stem if Image.registered_extensions().get(path.suffix) in FORMATS else path.name


@dataclass
class Splits:
    """The parts of a data set.

    Args:
        train: to learn from. validation: to choose a model by. test: to judge on. None: there are none.
        pool: pristine images to compare with; None: the data has none and no other was named.
        scale: of the training scores.
        resize: (height, width) that all images have been resized to, pixels; None: none has been.
    """

    train: Rated
    validation: Rated | None
    test: Rated | None
    pool: ReferencePool | None
    scale: ScoreScale
    resize: tuple[int, int] | None


def load_ratings(options: DataOptions) -> Splits:
    """Read the data, split it, and decode every image once; the same options give the same parts everywhere.

    Raises:
        ValueError: as :func:`iqa_distill.readers.read_ratings`, :func:`split`, :meth:`iqa_distill.pixels.Pixels.decode` and
            :meth:`iqa_distill.images.ScoreScale.of`. OSError: for what is missing.
    """
    rated = read_data(options)
    fitting = Preprocessing(resize=_size(options, rated))
    parts = split(rated, options)
    used = np.arange(len(rated)) if options.pixel_cache else np.sort(np.concatenate(parts))  # one file for all splits
    pixels, skipped = Pixels.decode(
        [rated.names[i] for i in used],
        lambda n: fitting.resized(rated.open(int(used[n]))),
        Path(options.pixel_cache) if options.pixel_cache else None,
        options.skip_bad,
    )
    place = {int(i): n for n, i in enumerate(np.delete(used, skipped))}
    train, validation, test = (_part(rated, pixels, place, part) for part in parts)
    if train is None:
        raise ValueError(f"{options.data}: no image is left to train on")
    scale = ScoreScale.of(train.scores, rated.low, rated.high)
    pool = _pool(options, rated, parts[0])
    return Splits(train, validation, test, pool, scale, fitting.resize)


def read_data(options: DataOptions) -> RatedImages:
    """All images that ``options.data`` names, with their scores; none is decoded yet.

    Raises:
        ValueError: as :func:`iqa_distill.readers.read_ratings`.
    """
    if options.data == SAMPLE:
        from iqa_distill.sample import sample_ratings

        return sample_ratings()
    if options.data == RESYNTH:
        from iqa_distill.resynth import read_resynth

        return read_resynth(options.resynth)
    return read_ratings(options.data, lower_better=options.lower_better)


def _size(options: DataOptions, rated: RatedImages) -> tuple[int, int] | None:
    if options.deiqt_compat and rated.resize is None:
        raise ValueError("deiqt_compat is about the size of KonIQ-10k's images; this is other data")
    if options.resize is not None:
        return options.resize[0], options.resize[1]
    return DEIQT_KONIQ if options.deiqt_compat else rated.resize


def _part(rated: RatedImages, pixels: Pixels, place: dict[int, int], part: np.ndarray) -> Rated | None:
    part = np.array([i for i in part if i in place], np.int64)
    if not len(part):
        return None
    chosen, own = rated.select(part), pixels.select([place[int(i)] for i in part])
    return Rated(own, chosen.scores, chosen.references, hashes(own), chosen.names, chosen.distortions)


def hashes(pixels: Pixels) -> list[str]:
    """Of each image 16 hexadecimal digits that depend on its pixels alone."""

    def one(i: int) -> str:
        shape = repr(pixels.shapes[i].tolist()).encode()
        return hashlib.sha1(shape + pixels[i].numpy().tobytes(), usedforsecurity=False).hexdigest()[:16]

    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        return pool.map(one, range(len(pixels)))


# Pools


def load_pool(name: str) -> ReferencePool:
    """The pristine images of a folder, or of the word "bsds".

    Raises:
        ValueError: as :func:`iqa_distill.readers.read_references`.
    """
    files = read_references(name)
    return _decoded_pool([file.name for file in files], files)


def _pool(options: DataOptions, rated: RatedImages, train: np.ndarray) -> ReferencePool | None:
    """The one that was named; or the originals of the training images: none that a test image shows."""
    if options.references is not None or options.data == RESYNTH:
        return load_pool(options.references or "bsds")
    names = sorted(set(rated.select(train).references or ()))
    if len(names) < 2:
        return None
    if options.data == SAMPLE:
        from iqa_distill.sample import sample_references

        images = sample_references()
        return ReferencePool(Pixels.of([images[name] for name in names], names), names)
    return None if rated.pristine is None else _decoded_pool(names, [Path(rated.pristine[name]) for name in names])


def _decoded_pool(names: Sequence[str], files: Sequence[Path]) -> ReferencePool:
    pixels, _ = Pixels.decode([str(file) for file in files], lambda i: open_rgb(files[i]))
    return ReferencePool(pixels, names)


# Splits


def split(rated: RatedImages, options: DataOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the images to train, validate and test on; (n,) each, in order.

    Images of one reference always fall on the same side; where references are unknown each image is by itself. A split that
    the data brings is kept, and ``validation`` then applies only if it has no validation part. What is drawn depends on the
    names, ``split_seed`` and the shares alone, and ``train_references`` takes the first so many of a fixed random order, so that
    fewer references are a part of more.

    Raises:
        ValueError: for a given split that puts a reference on two sides, or has nothing to train on; shares that leave a part
            without images; ``train_references`` that are more than there are, or of data without references.
    """
    units = np.array(rated.names if rated.references is None else rated.references)
    what = "images" if rated.references is None else "references"
    order = np.unique(units)
    random = np.random.RandomState(options.split_seed)  # numpy keeps its numbers; a Generator's may change
    order = order[random.permutation(len(order))]
    if rated.splits is None:
        held = _share(options.test_share, order)
        testing, order = order[:held], order[held:]
        part = np.where(np.isin(units, testing), "test", "train").astype("U10")
    else:
        part = np.array(rated.splits, "U10")
        _refuse_shared(units, part)
    given = bool((part == "validation").any())
    order = order[np.isin(order, units[part == "train"])]
    held = 0 if given else _share(options.validation, order)
    part[np.isin(units, order[:held])] = "validation"
    order = order[held:]
    if not len(order):
        raise ValueError(f"no {what} are left to train on: give smaller shares, --test_share and --validation")
    if options.train_references is not None:
        if rated.references is None:
            raise ValueError("train_references counts references, but this data has none: give a column reference")
        if options.train_references > len(order):
            raise ValueError(f"train_references {options.train_references}: there are {len(order)} to train on")
        part[(part == "train") & ~np.isin(units, order[: options.train_references])] = ""
    train, validation, test = (np.flatnonzero(part == name) for name in PARTS)
    return train, validation, test


def _share(share: float, units: np.ndarray) -> int:
    """At least one, if any are wanted at all."""
    return max(1, round(share * len(units))) if share else 0


def _refuse_shared(units: np.ndarray, part: np.ndarray) -> None:
    pairs = np.unique(np.stack([units, part]), axis=1)[0]
    names, counts = np.unique(pairs, return_counts=True)
    shared = names[counts > 1].tolist()
    if shared:
        raise ValueError(
            f"the split has references on two sides, which makes scores look better than they are: {listed(shared)}; "
            "leave the column split out to have it drawn by reference"
        )


def check_leakage(teacher_ids: Sequence[str], test_ids: Sequence[str]) -> None:
    """Refuse to test on images that a teacher was trained on.

    Args:
        teacher_ids, test_ids: :attr:`Rated.ids`, of pixels as they were trained on: resized, if they were.

    Raises:
        ValueError: if any is in both, with their number and one of them.
    """
    shared = sorted(set(teacher_ids) & set(test_ids))
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(set(test_ids))} test images were trained on by a teacher, for instance the one with id "
            f"{shared[0]}: train the teacher on the training part of the same split"
        )
