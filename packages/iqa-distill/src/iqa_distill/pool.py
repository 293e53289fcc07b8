"""A teacher's images where no human has scored any: distorted crops of pristine ones, labelled by a full-reference measure."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from iqa_distill.distortions import DISTORTIONS, TID2013_DISTORTIONS, distort_level
from iqa_distill.gmsd import gmsd

Bytes = NDArray[np.uint8]

VERSION = 1  # of the pictures: a cache of another one is refused
MARGIN = 32  # pixels around a crop that are distorted too, so that a codec's blocks start anywhere


class SyntheticPool(NamedTuple):
    """n distorted crops.

    ``images`` uint8 (n, crop, crop, 3); ``labels`` float64 (n,), minus GMSD to mean 0 and standard deviation 1, higher is better;
    ``kinds`` int64 (n,), the distortion's place in the list of them; ``references`` int64 (n,), the row of the pristine image.
    """

    images: Bytes
    labels: NDArray[np.float64]
    kinds: NDArray[np.int64]
    references: NDArray[np.int64]


def make_pool(
    references: Sequence[Bytes],
    per_reference: int,
    *,
    crop: int,
    kinds: Sequence[str] = tuple(TID2013_DISTORTIONS.values()),
    seed: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
) -> SyntheticPool:
    """``per_reference`` random crops of each pristine image, each with a random distortion at a random level between 1 and 5.

    The labels are no human's. They are as good as GMSD is: blind to colour, so that distortions of colour or brightness alone
    count as slight ones.

    Args:
        references: uint8 (height, width, 3), each at least ``crop`` pixels a side.
        per_reference: crops of each.
        crop: side, pixels, at least 32.
        kinds: names of ``DISTORTIONS`` to draw from. Default: the nine of TID2013.
        seed: 0 or more.
        workers: processes. None: one for each core. The pool is the same for any number.
        cache: an .npz file to read the pool from, or to keep it in if there is none yet.

    Raises:
        ValueError: for no references, one that is too small, an unknown kind, a count below 1, a pool whose labels are all
            equal, or if ``cache`` was written for other arguments or is no such file.
    """
    unknown = sorted(set(kinds) - set(DISTORTIONS))
    if unknown or not kinds:
        raise ValueError(f"no distortions {unknown}: expected some of {', '.join(DISTORTIONS)}")
    if not references or per_reference < 1 or crop < 32:
        numbers = f"{len(references)}, {per_reference} and {crop}"
        raise ValueError(f"expected a reference, a crop of each and 32 pixels a side, at least: got {numbers}")
    for row, reference in enumerate(references):
        if min(reference.shape[:2]) < crop:
            raise ValueError(f"reference {row} is {reference.shape[:2]}, smaller than the crop of {crop} pixels")
    pixels = sha256()
    for reference in references:
        pixels.update(repr(reference.shape).encode() + np.ascontiguousarray(reference).tobytes())
    about = {"version": VERSION, "seed": seed, "per_reference": per_reference, "crop": crop, "kinds": list(kinds)}
    about["references"] = pixels.hexdigest()[:16]
    if cache is not None and Path(cache).exists():
        return _load(Path(cache), about)
    pool = _draw(references, per_reference, crop, list(kinds), seed, workers)
    if cache is not None:
        _save(Path(cache), about, pool)
    return pool


def _draw(
    references: Sequence[Bytes], each: int, crop: int, kinds: list[str], seed: int, workers: int | None
) -> SyntheticPool:
    rows = range(len(references))
    tasks = [(reference, each, crop, kinds, [seed, row]) for row, reference in enumerate(references)]
    with ProcessPoolExecutor(workers) as processes:
        drawn = list(tqdm(processes.map(_of_one, tasks), "pool", len(tasks), unit="image", dynamic_ncols=True))
    images, measured, chosen = (np.concatenate(part) for part in zip(*drawn, strict=True))
    if measured.std() == 0:
        raise ValueError("all crops of the pool measure the same: give more of them, or references with more detail")
    labels = (measured.mean() - measured) / measured.std()
    return SyntheticPool(images, labels, chosen, np.repeat(np.array(rows), each))


def _of_one(
    task: tuple[Bytes, int, int, list[str], list[int]],
) -> tuple[Bytes, NDArray[np.float64], NDArray[np.int64]]:
    """Crops of one reference, their GMSD and the numbers of their kinds."""
    reference, each, crop, kinds, seed = task
    rng = np.random.default_rng(seed)
    images, measured, chosen = (
        np.empty((each, crop, crop, 3), np.uint8),
        np.empty(each),
        rng.integers(len(kinds), size=each),
    )
    for i in range(each):
        window = _cut(reference, crop + MARGIN, rng)
        distorted = distort_level(window, kinds[chosen[i]], rng.uniform(1, 5), [*seed, i])
        both = _cut(np.concatenate([distorted, window], axis=2), crop, rng)
        images[i], measured[i] = both[..., :3], gmsd(both[..., :3], both[..., 3:])
    return images, measured, chosen


def _cut(image: Bytes, side: int, rng: np.random.Generator) -> Bytes:
    """A random square of ``side`` pixels, or less where the image is smaller."""
    height, width = image.shape[:2]
    y, x = rng.integers(0, (max(0, height - side) + 1, max(0, width - side) + 1))
    return image[y : y + side, x : x + side]


def _save(path: Path, about: dict[str, object], pool: SyntheticPool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **pool._asdict())
    temporary.replace(path)


def _load(path: Path, about: dict[str, object]) -> SyntheticPool:
    try:
        with np.load(path, allow_pickle=False) as file:
            known = json.loads(str(file["about"]))
            pool = SyntheticPool(*(file[name] for name in SyntheticPool._fields))
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no file of a synthetic pool ({error}): delete it, or name another") from None
    for key, value in about.items():
        if known.get(key) != value:
            raise ValueError(f"{path} was made with {key} {known.get(key)}, now {value}: delete it, or name another")
    return pool
