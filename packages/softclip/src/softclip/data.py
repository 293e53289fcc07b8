"""Which pairs to learn from and which to judge on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from papercore.lab.cli import flag

from softclip.readers import Fields, Pairs, Record, find_shards, read_csv, read_shards, to_pairs
from softclip.sample import render_scenes

SAMPLE_TRAIN, SAMPLE_TEST = 2000, 500  # scenes
EMOJI = Fields("json:tags", "json:root", "json:subgroup")
KINDS = "sample, emoji, WebDataset shards (a .tar file, a folder of them, 'a-*.tar', 'a-{0000..0003}.tar') or a .csv or .tsv file"


@dataclass
class DataOptions:
    """Which image-text pairs."""

    data: str = flag(
        "sample (rendered scenes); emoji (in $PAPERCORE_DATA/softclip); WebDataset shards (.tar file, folder, pattern such as "
        "'a-*.tar' or 'a-{0000..0003}.tar'); or a .csv or .tsv file of image paths and captions",
        "sample",
    )
    test: str | None = flag(
        "shards or a table to judge on; by default the test*.tar of a folder that has train*.tar", None
    )
    tags_field: str | None = flag(
        "names of what is in an image: json:KEY or a suffix in shards, a column of a table", None
    )
    group_field: str | None = flag(
        "pairs with the same value are about the same thing, such as one image's captions", None
    )
    label_field: str | None = flag("class, for zero-shot classification", None)
    roi_field: str | None = flag(
        "array of a vector for each region: a suffix such as roi.npy, or a column of paths", None
    )
    csv_img_key: str = flag("column of image paths", "filepath")
    csv_caption_key: str = flag("column of captions", "title")
    csv_separator: str = flag("between columns", "\t")
    max_train: int | None = flag("train on at most so many pairs", None)
    max_test: int | None = flag("judge on at most so many pairs", None)
    validation: float = flag(
        "share of the training groups to hold out and judge on instead of the test pairs, to tune by", 0.0
    )

    def __post_init__(self) -> None:
        for name, least in (("max_train", 2), ("max_test", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is a share, 0 <= validation < 1; got {self.validation}")


@dataclass
class Splits:
    """The parts of a data set: pairs to learn from, and to judge on (None if there are none)."""

    train: Pairs
    test: Pairs | None = None


def load_pairs(options: DataOptions) -> Splits:
    """Read the data and choose among them; the same options give the same pairs everywhere.

    ``validation`` holds out whole groups (without groups, images), and ``max_train`` and ``max_test`` take the first so many of a
    fixed random order, so that fewer pairs are a part of more. The scenes of ``sample`` have tags, groups, labels and boxes; for
    ``emoji`` tags_field, group_field and label_field are json:tags, json:root and json:subgroup unless given.

    Raises:
        ValueError, OSError: as :func:`softclip.readers.read_shards` and :func:`softclip.readers.read_csv`.
        ValueError: for data of another kind, emoji without $PAPERCORE_DATA, fields or test data for the sample, fewer than two
            pairs to train on, and a share that holds no group out.

    >>> splits = load_pairs(DataOptions(max_train=100))
    >>> len(splits.train), len(splits.test)
    (100, 500)
    """
    train, test = _sample(options) if options.data == "sample" else _read(options)
    if options.validation:
        train, test = _hold_out(train, options)
    train = _part(train, options.max_train)
    if len(train) < 2:
        raise ValueError(f"{options.data}: training needs at least 2 pairs, but there are {len(train)}")
    return Splits(train, None if test is None else _part(test, options.max_test))


def _sample(options: DataOptions) -> tuple[Pairs, Pairs]:
    for name in ("test", "tags_field", "group_field", "label_field", "roi_field"):
        if getattr(options, name) is not None:
            raise ValueError(f"data sample brings its own tags, groups, labels and test scenes: leave out --{name}")
    return render_scenes(SAMPLE_TRAIN, seed=0), render_scenes(SAMPLE_TEST, seed=1)


def _read(options: DataOptions) -> tuple[Pairs, Pairs | None]:
    data = options.data
    fields = Fields(options.tags_field, options.group_field, options.label_field, options.roi_field)
    if data == "emoji":
        if "PAPERCORE_DATA" not in os.environ:
            raise ValueError("data emoji reads the shards in $PAPERCORE_DATA/softclip: set PAPERCORE_DATA")
        data = str(Path(os.environ["PAPERCORE_DATA"]) / "softclip")
        fields = Fields(*(given or usual for given, usual in zip(fields, EMOJI, strict=True)))
    train, test = _records(data, fields, options)
    if options.test is not None:
        rest, test = _records(options.test, fields, options)
        test = test or rest
    pairs = to_pairs([train, test], fields)
    return pairs[0], pairs[1] if test else None


def _records(data: str, fields: Fields, options: DataOptions) -> tuple[Sequence[Record], Sequence[Record]]:
    """To train on, to test on."""
    if data.endswith((".csv", ".tsv")):
        columns = {"image": options.csv_img_key, "caption": options.csv_caption_key}
        return read_csv(data, fields, **columns, separator=options.csv_separator), []
    if not (data.endswith(".tar") or Path(data).is_dir()):
        if Path(data).exists():
            raise ValueError(f"{data}: not a kind of data that can be read; expected {KINDS}")
        raise FileNotFoundError(f"{data}: no such file or folder; expected {KINDS}")
    train, test = find_shards(data)
    return read_shards(train, fields), read_shards(test, fields)


def _hold_out(pairs: Pairs, options: DataOptions) -> tuple[Pairs, Pairs]:
    """(Kept, held out)."""
    units = pairs.names if pairs.groups is None else pairs.groups
    _, unit = np.unique([str(name) for name in units], return_inverse=True)
    count = int(unit.max()) + 1
    chosen = np.random.default_rng(0).permutation(count)[: round(options.validation * count)]
    if not len(chosen):
        raise ValueError(
            f"{options.data}: a share of {options.validation} of {count} groups holds out none; raise validation"
        )
    held_out = np.isin(unit, chosen)
    return pairs.select(np.flatnonzero(~held_out).tolist()), pairs.select(np.flatnonzero(held_out).tolist())


def _part(pairs: Pairs, most: int | None) -> Pairs:
    if most is None or most >= len(pairs):
        return pairs
    return pairs.select(np.sort(np.random.default_rng(0).permutation(len(pairs))[:most]).tolist())
