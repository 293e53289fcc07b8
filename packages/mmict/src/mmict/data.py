"""Which samples to learn from and which to judge on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from papercore.lab.cli import flag

from mmict.readers import read_easyvqa, read_emoji48, read_samples
from mmict.sample import render_shapes
from mmict.samples import Samples

SAMPLE = 2400  # pictures
BUILT_IN = ("sample", "sample-vqa", "emoji48", "easyvqa")


@dataclass
class DataOptions:
    """Which pictures and texts."""

    data: str = flag(
        "sample (captions of rendered shapes), sample-vqa (questions about them); emoji48 or easyvqa (in $PAPERCORE_DATA/mmict); "
        "a .jsonl or .json file of rows (image, images or frames; text, or question and answer), of TRL's messages or LLaVA's "
        "conversations; COCO's captions; or VQAv2's questions, with --annotations",
        "sample",
    )
    annotations: str | None = flag("VQAv2's second file, of the answers", None)
    image_root: str | None = flag(
        "where paths of images start; by default the folder of the file that names them", None
    )
    test: str | None = flag(
        "file to judge on; by default the rows of data whose split is test, or else test_share of it", None
    )
    test_annotations: str | None = flag("VQAv2's second file, of the file to judge on", None)
    test_share: float = flag("share of the groups to judge on, where the data has no split and no --test", 0.1)
    validation: float = flag(
        "share of the training groups to hold out and judge on instead of the test samples, to tune by; data that has validation "
        "samples gives those",
        0.0,
    )
    max_train: int | None = flag("train on at most so many samples", None)
    max_test: int | None = flag("judge on at most so many samples of each part", None)
    frames: int = flag("use at most so many frames of a video, evenly spread", 8)
    on_bad: str = flag("of rows that are wrong: error, or skip with a warning", "error")
    split_seed: int = flag("of the random choice of groups and samples, 0 or more", 0)

    def __post_init__(self) -> None:
        for name in ("test_share", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share, 0 <= {name} < 1; got {getattr(self, name)}")
        for name, least in (("max_train", 1), ("max_test", 1), ("frames", 1), ("split_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be error or skip, got {self.on_bad!r}")
        if self.test_annotations is not None and self.test is None:
            raise ValueError("test_annotations belong to the questions to judge on: give --test too")
        if self.data in BUILT_IN:
            for name in ("annotations", "image_root", "test"):
                if getattr(self, name) is not None:
                    raise ValueError(f"data {self.data} brings its own: leave out --{name}")


@dataclass
class Splits:
    """The parts of a data set.

    Args:
        train: to learn from, and to draw demonstrations from.
        tests: to judge on, by name: test, emoji48's test_seen and test_new; or, to tune by, validation, or val_seen and val_new.
    """

    train: Samples
    tests: dict[str, Samples]


def load_samples(options: DataOptions) -> Splits:
    """Read the data and choose among it; the same options give the same samples everywhere.

    What is drawn is whole groups, so that none is on both sides; ``max_train`` and ``max_test`` take the first so many samples
    of a fixed random order, so that fewer are a part of more. A split that the data brings is kept as it is; if it has
    validation samples but none to test on, those are judged on.

    Raises:
        ValueError, OSError: as :func:`mmict.readers.read_samples`.
        ValueError: if nothing is left to train on; for fixed demonstrations that are not among the training samples, or of the
            same group (:meth:`mmict.samples.Samples.check_demos`).

    >>> splits = load_samples(DataOptions(max_train=100, max_test=20))
    >>> len(splits.train), {name: len(test) for name, test in splits.tests.items()}
    (100, {'test': 20})
    """
    parts = _parts(options)
    train = parts.pop("train")
    held_out = {name: part for name, part in parts.items() if name.startswith("val")}
    tests = {name: part for name, part in parts.items() if name not in held_out}
    if held_out and (options.validation or not tests):
        tests = held_out
    elif options.validation:
        train, held = _hold_out(train, options.validation, options)
        tests = {"validation": held}
    train = _finish(train, options.max_train, options)
    tests = {name: _finish(test, options.max_test, options) for name, test in tests.items()}
    for part in (train, *tests.values()):
        part.check_demos(train)
    return Splits(train, tests)


def _parts(options: DataOptions) -> dict[str, Samples]:
    """Training samples and others, as the data has them, or drawn."""
    if options.data == "emoji48":
        return read_emoji48()
    if options.data == "easyvqa":
        return read_easyvqa()
    if options.data in BUILT_IN:
        samples = render_shapes(SAMPLE, questions=options.data == "sample-vqa")
    else:
        samples = _read(options.data, options.annotations, options)
    names = np.array(samples.splits or ["train"] * len(samples))
    parts = {str(name): samples.select(np.flatnonzero(names == name)) for name in np.unique(names)}
    if "train" not in parts:
        raise ValueError(f"{options.data}: no row has the split train, so nothing is left to train on")
    if options.test is not None:
        parts["test"] = _read(options.test, options.test_annotations, options)
    elif samples.splits is None and options.test_share:
        parts["train"], parts["test"] = _hold_out(samples, options.test_share, options)
    return parts


def _read(path: str, annotations: str | None, options: DataOptions) -> Samples:
    return read_samples(path, annotations, options.image_root, "skip" if options.on_bad == "skip" else "error")


def _hold_out(samples: Samples, share: float, options: DataOptions) -> tuple[Samples, Samples]:
    """(Kept, held out), at least one group each."""
    groups = np.unique(samples.groups)
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise ValueError(
            f"{options.data}: {len(groups)} group(s) cannot be parted; with a share of {share} nothing is left to train on"
        )
    chosen = _random(options).permutation(len(groups))[:count]
    held = np.isin(samples.groups, groups[chosen])
    return samples.select(np.flatnonzero(~held)), samples.select(np.flatnonzero(held))


def _finish(samples: Samples, most: int | None, options: DataOptions) -> Samples:
    """At most so many samples, with at most so many frames."""
    rows = np.arange(len(samples))
    if most is not None and most < len(samples):
        rows = np.sort(_random(options).permutation(len(samples))[:most])
    frames = [_spread(each, options.frames) for each in samples.frames]
    return replace(samples, frames=frames).select(rows)


def _spread(frames: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The middles of so many equal stretches."""
    if len(frames) <= most:
        return frames
    return tuple(frames[int((i + 0.5) * len(frames) / most)] for i in range(most))


def _random(options: DataOptions) -> np.random.RandomState:
    return np.random.RandomState(options.split_seed)  # numpy keeps its numbers; a Generator's may change
