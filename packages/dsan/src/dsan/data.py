"""Which words to learn from and which to judge on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from papercore.lab.cli import flag

from dsan.charset import CTCCharset
from dsan.images import Size as Size
from dsan.readers import Crops, audit, audit_labels, join, read_crops
from dsan.words import MixedWords as MixedWords
from dsan.words import WidthBuckets as WidthBuckets
from dsan.words import WordBatch as WordBatch
from dsan.words import Words as Words

IIIT5K = "iiit5k"
MOST_BACKGROUNDS = 500  # real crops whose text is filled in, for synthetic words

Frames = Callable[[int], int]
Set = TypeVar("Set", Crops, Words)


@dataclass
class DataOptions:
    """Which word crops."""

    data: list[str] = flag(
        "sample (rendered), alone; or to train on, joined: iiit5k (its 2000 training crops, in $PAPERCORE_DATA/dsan), LMDB "
        "folders, folders or zips with gt.txt or labels.json; none: synthetic words alone",
        ["sample"],
    )
    test: list[str] | None = flag("crops to judge on, as data; sample and iiit5k bring their own", None)
    validation: int = flag("hold so many training crops out, to choose a model by", 200)
    max_train: int | None = flag("train on at most so many crops, synthetic ones not counted", None)
    max_test: int | None = flag("judge on at most so many crops", None)
    on_infeasible: str = flag(
        "of labels that need more frames than their crop makes: raise an error, or skip them", "raise"
    )
    synthetic: int = flag(
        "draw so many words to train on as well; every fourth on a training crop without its text, where its boxes are known",
        0,
    )
    synthetic_seed: int = flag("of these words", 0)
    synthetic_cache: str | None = flag("file (.npz) to keep the drawn words in, for the next run", None)
    real_share: float = flag(
        "of the crops of an epoch, where there are synthetic ones, 0 to 1: whichever are too few are repeated (ours: 0.25)",
        0.25,
    )
    words: str | None = flag("text file (.txt, .txt.gz) of words to draw; by default some built in", None)
    fonts: str | None = flag("folder of fonts to draw with; by default the system's", None)

    def __post_init__(self) -> None:
        if self.data == ["none"]:  # a flag cannot be an empty list
            self.data = []
        for name, least in (("validation", 0), ("max_train", 1), ("max_test", 1), ("synthetic", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.real_share < 1:
            raise ValueError(f"real_share is a share, 0 < real_share < 1; got {self.real_share}")
        if self.on_infeasible not in ("raise", "skip"):
            raise ValueError(f"on_infeasible must be raise or skip, got {self.on_infeasible!r}")
        if not self.data and not self.synthetic:
            raise ValueError("there is nothing to train on: give --data, or --synthetic")


@dataclass
class Splits:
    """The parts of a data set, with labels normalised.

    Args:
        train: to learn from. validation: to choose a model by. test: to judge on. None: there are none.
        audit: lines that say what was read, dropped and changed.
    """

    train: Words
    validation: Words | None
    test: Words | None
    audit: list[str]


def load_words(options: DataOptions, charset: CTCCharset, size: Size, frames: Frames | None) -> Splits:
    """Read the data and choose among them; the same options give the same crops everywhere.

    Validation crops are held out of the real crops, or of the synthetic ones if there are no others, by a fixed random order;
    ``max_train`` and ``max_test`` take the first so many of such an order, so that fewer crops are a part of more. Test crops are
    neither raised for nor dropped because of their frames.

    Args:
        charset: of the labels. size: of the crops. frames: width of a crop, pixels -> frames T; None: any label fits.

    Raises:
        ValueError: as :func:`dsan.readers.read_crops`, :func:`dsan.readers.audit` and :class:`Words`; for ``iiit5k`` without
            $PAPERCORE_DATA, ``sample`` beside other data, more validation crops than there are, and as the synthesis.
        OSError: for what is missing.
    """
    lines: list[str] = []
    real = test = validation = None
    backgrounds = None
    if options.data == ["sample"]:
        real, test = _sample(charset, size, frames, options.on_infeasible, lines)
        real, validation = _hold_out(real, options.validation, options.max_train)
    elif options.data:
        crops, report = audit(
            read_data(options.data),
            charset,
            frames,
            size,
            options.on_infeasible,
            f"to train on, {' '.join(options.data)}",
        )
        lines += report.lines()
        crops, held_out = _hold_out(crops, options.validation, options.max_train)
        backgrounds = crops
        real, validation = _fitted(crops, size), None if held_out is None else _fitted(held_out, size)
    if options.test or (options.test is None and IIIT5K in options.data):
        data = options.test or [IIIT5K]
        crops, report = audit(read_data(data, "test"), charset, size=size, data=f"to judge on, {' '.join(data)}")
        lines += report.lines()
        test = _fitted(_first(crops, options.max_test), size)
    elif test is not None:
        test = _first(test, options.max_test)
    train = real
    if options.synthetic:
        synthetic = _synthetic(options, charset, size, frames, backgrounds, lines)
        if real is None:
            train, validation = _hold_out(synthetic, options.validation, None)
        else:
            train = _mixed(real, synthetic, options.real_share)
            lines.append(
                f"an epoch: {train.counts[0]:,} real crops out of {len(real):,}, {train.counts[1]:,} synthetic ones out of "
                f"{len(synthetic):,}"
            )
    assert train is not None
    return Splits(train, validation, test, lines)


def read_data(data: Sequence[str], split: str = "train") -> Crops:
    """The crops of all these, joined.

    Args:
        data: paths for :func:`dsan.readers.read_crops`; ``iiit5k`` is the file of ``split`` (train or test) in
            $PAPERCORE_DATA/dsan.

    Raises:
        ValueError: for ``iiit5k`` without that variable, ``sample``, which has no files, and as :func:`dsan.readers.read_crops`.
    """
    return join([read_crops(_path(name, split)) for name in data])


def _path(name: str, split: str) -> str:
    if name == "sample":
        raise ValueError("data sample brings its own test crops, and cannot be joined with other data: give it alone")
    if name != IIIT5K:
        return name
    if "PAPERCORE_DATA" not in os.environ:
        raise ValueError(f"data iiit5k reads $PAPERCORE_DATA/dsan/iiit5k_{split}.zip: set PAPERCORE_DATA")
    return str(Path(os.environ["PAPERCORE_DATA"]) / "dsan" / f"iiit5k_{split}.zip")


def _fitted(crops: Crops, size: Size) -> Words:
    return Words(crops, **vars(size))


def _first(words: Set, most: int | None) -> Set:
    """At most so many, in their order."""
    if most is None or most >= len(words):
        return words
    return words.select(np.sort(np.random.default_rng(0).permutation(len(words))[:most]).tolist())


def _hold_out(words: Set, validation: int, most: int | None) -> tuple[Set, Set | None]:
    """(At most so many to train on, those held out)."""
    if validation >= len(words):
        raise ValueError(
            f"--validation {validation} holds out all {len(words)} training crops; give a smaller number, or 0"
        )
    order = np.random.default_rng(0).permutation(len(words))
    kept = words.select(np.sort(order[validation:]).tolist())
    return _first(kept, most), words.select(np.sort(order[:validation]).tolist()) if validation else None


def _audited(
    words: Words, data: str, charset: CTCCharset, frames: Frames | None, on_infeasible: str, lines: list[str]
) -> Words:
    kept, labels, report = audit_labels(
        words.names, words.labels, charset, frames, lambda i: int(words.widths[i]), on_infeasible, data
    )
    lines += report.lines()
    if not kept:
        raise ValueError(f"{'; '.join(lines)}: nothing is left; check the charset {charset.characters!r}")
    words = words.select(kept)
    words.labels = labels
    return words


def _sample(
    charset: CTCCharset, size: Size, frames: Frames | None, on_infeasible: str, lines: list[str]
) -> tuple[Words, Words]:
    from dsan.sample import sample_words

    train, test = sample_words(size)
    train = _audited(train, "to train on, sample", charset, frames, on_infeasible, lines)
    return train, _audited(test, "to judge on, sample", charset, None, on_infeasible, lines)


def _synthetic(
    options: DataOptions, charset: CTCCharset, size: Size, frames: Frames | None, crops: Crops | None, lines: list[str]
) -> Words:
    from dsan.fonts import find_fonts
    from dsan.synthetic import SyntheticWords, backgrounds_from, render_words
    from dsan.vocabulary import read_words

    backgrounds = None
    if crops is not None and crops.boxes is not None:
        whole = [i for i, label in enumerate(crops.labels) if len(crops.boxes[i]) == len(label)]
        backgrounds = backgrounds_from(crops.select(whole), MOST_BACKGROUNDS)
    engine = SyntheticWords(
        None if options.words is None else read_words(options.words),
        None if options.fonts is None else find_fonts(options.fonts),
        seed=options.synthetic_seed,
        height=size.height,
        width=None if size.keep_ratio else size.width,
        characters=charset.characters,
        backgrounds=backgrounds,
    )
    drawn = render_words(options.synthetic, engine, cache=options.synthetic_cache)
    words = Words.from_arrays(_coloured(drawn.images, size), drawn.labels, drawn.boxes)
    return _audited(words, "to train on, synthetic", charset, frames, "skip", lines)  # nobody can mend them


def _coloured(images: np.ndarray | list[np.ndarray], size: Size) -> np.ndarray | list[np.ndarray]:
    """Grey crops (height, w) with all channels: views."""
    if isinstance(images, np.ndarray):
        return np.broadcast_to(images[:, None], (len(images), size.channels, *images.shape[1:]))
    return [np.broadcast_to(image[None], (size.channels, *image.shape)) for image in images]


def _mixed(real: Words, synthetic: Words, share: float) -> MixedWords:
    """Each crop once or more often, so that the real ones have this share."""
    number = max(len(real), round(share / (1 - share) * len(synthetic)))
    others = max(len(synthetic), round((1 - share) / share * number))
    return MixedWords(
        [real, synthetic], [np.resize(np.arange(len(real)), number), np.resize(np.arange(len(synthetic)), others)]
    )
