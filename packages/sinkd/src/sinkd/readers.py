"""Data sets: the sample, GLUE and SuperGLUE folders, intent sets, files of one's own, and the Hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from papercore.lab.cli import flag

from sinkd.sample import sample
from sinkd.tasks import INTENTS, TASKS, Examples, Task, generic, task_name

logger = logging.getLogger(__name__)

TEST_SHARE, VALIDATION_SHARE, MOST_VALIDATION = 0.2, 0.1, 1000
PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("#1 String", "#2 String"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
)
SINGLES = ("sentence", "text")
LABELS = ("label", "Quality", "is_duplicate", "gold_label", "score", "category")
COLA = ["source", "label", "mark", "sentence"]  # its labelled files have no header


@dataclass
class DataOptions:
    """Where the texts come from."""

    data: str = flag(
        "sample; a task (sst2, cola, rte, ... in $PAPERCORE_DATA/sinkd/NAME or --data_dir); a GLUE or SuperGLUE folder; a "
        ".jsonl, .csv or .tsv file of texts and labels; or hub:NAME[:CONFIG]",
        "sample",
    )
    data_dir: str | None = flag("folder of the task's files, or one that holds the task's folder", None)
    task: str | None = flag(
        "the task, if the name of the data does not tell it; regression, for a file of numbers", None
    )
    text: str = flag("file or hub: column of the text", "text")
    text_pair: str | None = flag("file or hub: column of the second text", None)
    label: str = flag("file or hub: column of the label", "label")
    test_data: str | None = flag("file to test on; without it a fifth of the rows is held out", None)
    max_train: int | None = flag("train on at most so many rows, chosen by seed", None)
    max_test: int | None = flag("test on at most so many rows, chosen by seed", None)

    @property
    def name(self) -> str:
        """A short name of the data, for folders and titles."""
        return re.sub(r"[^\w.-]+", "-", Path(self.data.removeprefix("hub:")).name.split(".")[0]) or "data"


@dataclass
class Splits:
    """The parts of a data set.

    Args:
        train: to learn from. validation: held out from the official training part, to choose hyper-parameters by.
        test: what results are reported on: the official development set where the test labels are secret.
        unlabelled: the official test texts, for submission files. extra: further test sets by name.
    """

    train: Examples
    validation: Examples
    test: Examples
    unlabelled: Examples | None = None
    extra: dict[str, Examples] = field(default_factory=dict)


def load(options: DataOptions, seed: int) -> Splits:
    """Read the data and split it; the same options and seed give the same rows.

    Raises:
        ValueError: for a file that is not what it should be, naming it, the line and the column.
        FileNotFoundError: if there is none. ModuleNotFoundError: for ``hub:`` without the ``datasets`` library.

    >>> splits = load(DataOptions(max_train=100), seed=0)
    >>> len(splits.train), splits.train.task.name
    (100, 'sample')
    """
    for name in ("max_train", "max_test"):
        limit = getattr(options, name)
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    path = Path(options.data)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if options.data == "sample":
        train, test = sample(seed)
        splits = Splits(*_hold_out(train, VALIDATION_SHARE, seed, "sample"), test)
    elif options.data.startswith("hub:"):
        splits = _hub(options, seed)
    elif suffix in READERS:
        splits = _plain(options, seed)
    elif path.is_dir() or task_name(options.data):
        splits = _folder(options, seed)
    else:
        raise ValueError(
            f"data {options.data!r} is no folder, .jsonl, .csv or .tsv file, nor one of sample, {', '.join((*TASKS, *INTENTS))}"
        )
    splits.train = _thin(splits.train, options.max_train, seed)
    splits.test = _thin(splits.test, options.max_test, seed)
    splits.extra = {name: _thin(part, options.max_test, seed) for name, part in splits.extra.items()}
    return splits


def _thin(examples: Examples, most: int | None, seed: int) -> Examples:
    if most is None or len(examples) <= most:
        return examples
    chosen = np.random.default_rng([seed, 2]).permutation(len(examples))[:most]
    return examples.select(sorted(chosen.tolist()))


def _hold_out(
    examples: Examples, share: float, seed: int, name: str, most: int | None = None
) -> tuple[Examples, Examples]:
    """(kept, held out): of each class its share, but at least one row of each is kept."""
    order = np.random.default_rng([seed, 1]).permutation(len(examples))
    if examples.labels is not None and examples.task.labels is not None:
        labels = np.asarray(examples.labels)[order]
        order = order[np.argsort(labels, kind="stable")]
        first = np.unique(np.sort(labels), return_index=True)[1]
    else:
        first = np.array([0])
    free = np.delete(order, first)
    if not len(free):
        raise ValueError(f"{name}: {len(examples)} rows of {len(first)} classes are too few to hold any out")
    n = min(max(1, round(share * len(examples))), len(free), len(free) if most is None else most)
    held_out = free[((np.arange(n) + 0.5) * len(free) / n).astype(int)]  # every so many of rows sorted by class
    kept = np.setdiff1d(np.arange(len(examples)), held_out)
    return examples.select(kept.tolist()), examples.select(np.sort(held_out).tolist())


class _Table:
    """Rows of a file or data set, each a dictionary with the number of its line."""

    def __init__(self, name: str, rows: list[tuple[int, dict[str, Any]]], unit: str = "line") -> None:
        if not rows:
            raise ValueError(f"{name}: no rows")
        self.name, self.rows, self.unit = name, rows, unit
        self.columns = list(rows[0][1])

    def values(self, column: str) -> Iterator[tuple[str, Any]]:
        """(place, value) of each row; the place is for messages."""
        if column not in self.columns:
            raise ValueError(f"{self.name}: column {column!r} is missing; it has {', '.join(map(str, self.columns))}")
        for number, row in self.rows:
            yield f"{self.name}, {self.unit} {number}", row.get(column)

    def texts(self, column: str, may_be_empty: bool = False) -> list[str]:
        texts = []
        for place, value in self.values(column):
            if not isinstance(value, str) and value is not None:
                raise ValueError(f"{place}: column {column!r} is a {type(value).__name__}, not a text")
            text = (value or "").strip()
            if not text and not may_be_empty:
                raise ValueError(f"{place}: column {column!r} is empty")
            texts.append(text)
        return texts

    def ids(self) -> list[Any]:
        """The official numbers where there are any, for submission files."""
        column = next((name for name in ("index", "idx", "id") if name in self.columns), None)
        if column is None:
            return list(range(len(self.rows)))
        return [int(v) if isinstance(v, str) and v.isdecimal() else v for _, v in self.values(column)]

    def find(self, columns: Sequence[str]) -> str:
        """The first of these columns that there is; else the first, which the error then names."""
        return next((name for name in columns if name in self.columns), columns[0])


# Files to tables


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as UTF-8") from None


def _read_tsv(path: Path, header: list[str] | None = None, skip_broken: bool = False) -> _Table:
    """Without csv quoting, as GLUE's files are written: a quotation mark is part of the text."""
    lines = [line.removesuffix("\r").split("\t") for line in _text(path).split("\n")]
    numbered = [(number, fields) for number, fields in enumerate(lines, 1) if fields != [""]]
    if header is None and numbered:
        header = numbered.pop(0)[1]
    rows, broken = [], 0
    for number, fields in numbered:
        if len(fields) == len(header or []):
            rows.append((number, dict(zip(header or [], fields, strict=True))))
        elif skip_broken:
            broken += 1
        else:
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields, expected {len(header or [])} "
                "(quotation marks protect no tabs in .tsv files; .csv files may quote)"
            )
    if broken:
        logger.warning("%s: left out %d rows with a wrong number of fields", path, broken)
    return _Table(str(path), rows)


def _read_csv(path: Path) -> _Table:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        header = next(reader, [])
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise csv.Error(f"{len(fields)} fields, expected {len(header)}")
            if fields:
                rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return _Table(str(path), rows)


def _read_jsonl(path: Path) -> _Table:
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a {type(row).__name__} where an object was expected")
        rows.append((number, row))
    return _Table(str(path), rows)


READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}


def _read(path: Path) -> _Table:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in READERS:
        raise ValueError(f"{path}: a {suffix or 'nameless'} file; expected {', '.join(READERS)}")
    return READERS[suffix](path)


# Labels


def _distinct(tables: Sequence[_Table], column: str) -> tuple[str, ...]:
    """The labels that occur, sorted; as numbers if all are whole numbers."""
    found: set[str] = set()
    for table in tables:
        for place, value in table.values(column):
            if value is None or not str(value).strip():
                raise ValueError(f"{place}: column {column!r} is empty")
            found.add(str(value).strip())
    names = sorted(found)
    whole = all(re.fullmatch(r"[+-]?\d+", name) for name in names)
    if len(names) > 1000 and not whole and all(_number(name) is not None for name in names):
        raise ValueError(
            f"{tables[0].name}: column {column!r} has {len(names)} different numbers; say --task regression"
        )
    if len(names) < 2:
        raise ValueError(f"{tables[0].name}: every row has the label {names[0]!r}; a classifier needs two")
    return tuple(sorted(names, key=int) if whole else names)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _labels(table: _Table, column: str, task: Task) -> list[int] | list[float]:
    """Numbers of the classes; values may be their names, or for known tasks their numbers."""
    if task.labels is None:
        numbers = []
        for place, value in table.values(column):
            number = _number(value)
            if number is None:
                raise ValueError(f"{place}: column {column!r} is {value!r}, not a finite number")
            numbers.append(number)
        return numbers
    known = {name.lower() if task.name in TASKS else name: i for i, name in enumerate(task.labels)}
    if task.name in TASKS:
        known |= {str(i): i for i in range(len(task.labels))}
    labels = []
    for place, value in table.values(column):
        name = str(value).strip()
        label = known.get(name.lower() if task.name in TASKS else name)
        if label is None:
            shown = ", ".join(task.labels[:10]) + (", ..." if len(task.labels) > 10 else "")
            whose = task.name if task.name in TASKS else "the training data"
            raise ValueError(f"{place}: label {name!r} is not among those of {whose}: {shown}")
        labels.append(label)
    return labels


# Tables to examples


def _examples(table: _Table, task: Task, options: DataOptions | None = None, labelled: bool = True) -> Examples:
    """The examples of a table; ``options`` name its columns where they are not a known task's own."""
    choices: list[tuple[str, ...]] | None = None
    if task.name == "copa":
        columns: tuple[str, str | None] = ("premise", "question")
        choices = list(zip(table.texts("choice1"), table.texts("choice2"), strict=True))
    else:
        columns = _text_columns(table, task, options)
    may_be_empty = task.name == "qqp"  # some of the official rows are
    first = table.texts(columns[0], may_be_empty)
    second = None if columns[1] is None else table.texts(columns[1], may_be_empty)
    if task.name == "wic":
        first = [f"{word}: {text}" for word, text in zip(table.texts("word"), first, strict=True)]
    label = table.find(LABELS) if options is None else options.label
    return Examples(task, first, second, _labels(table, label, task) if labelled else None, table.ids(), choices)


def _text_columns(table: _Table, task: Task, options: DataOptions | None) -> tuple[str, str | None]:
    if options is not None and (task.name not in TASKS or options.text != "text" or "text" in table.columns):
        if task.pair and options.text_pair is None:
            raise ValueError(
                f"{table.name}: {task.name} has pairs of texts; give the second one's column by --text_pair"
            )
        return options.text, options.text_pair
    if not task.pair:
        return table.find(SINGLES), None
    pair = next((pair for pair in PAIRS if set(pair) <= set(table.columns)), None)
    if pair is None:
        raise ValueError(f"{table.name}: no pair of text columns for {task.name}; it has {', '.join(table.columns)}")
    return pair


# Folders of known tasks


class _Layout(NamedTuple):
    train: tuple[str, ...]
    test: tuple[str, ...]
    unlabelled: str | None = None
    extra: tuple[str, ...] = ()


LAYOUTS = (
    _Layout(("train_part1.tsv", "train_part2.tsv"), ("dev.tsv",), "test.tsv"),
    _Layout(("in_domain_train.tsv",), ("in_domain_dev.tsv", "out_of_domain_dev.tsv")),
    _Layout(("train.tsv",), ("dev_matched.tsv",), "test_matched.tsv", ("dev_mismatched.tsv", "test_mismatched.tsv")),
    _Layout(("train.tsv",), ("dev.tsv",), "test.tsv"),
    _Layout(("train.csv",), ("dev.csv",), "test.csv"),
    _Layout(("train.csv",), ("test.csv",)),
    _Layout(("train.jsonl",), ("val.jsonl",), "test.jsonl"),
    _Layout(("msr_paraphrase_train.txt",), ("msr_paraphrase_test.txt",)),
)


def _folder(options: DataOptions, seed: int) -> Splits:
    name = task_name(options.task or Path(options.data).resolve().name)
    if name is None:
        raise ValueError(f"{options.data}: name its task by --task, one of {', '.join((*TASKS, *INTENTS))}")
    if options.data_dir is not None:
        root = Path(options.data_dir)
    elif Path(options.data).is_dir():
        root = Path(options.data)
    elif "PAPERCORE_DATA" in os.environ:
        root = Path(os.environ["PAPERCORE_DATA"]) / "sinkd" / name
    else:
        raise ValueError(
            f"--data {options.data} reads $PAPERCORE_DATA/sinkd/{name}: set PAPERCORE_DATA, or give --data_dir"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    root = next((sub for sub in sorted(root.iterdir()) if sub.is_dir() and _name_of(sub) == name), root)
    if name == "clinc150":
        return _clinc150(root, seed)
    layout = next((x for x in LAYOUTS if all((root / file).exists() for file in (*x.train, *x.test))), None)
    if layout is None:
        wanted = "; or ".join(", ".join((*x.train, *x.test)) for x in LAYOUTS)
        raise FileNotFoundError(f"{root}: not the files of {name}; expected {wanted}")
    tables = {file: _read_known(root / file, name) for file in (*layout.train, *layout.test)}
    if name in TASKS:
        task = TASKS[name]
    else:
        task = Task(
            name,
            _distinct([tables[file] for file in layout.train], tables[layout.train[0]].find(LABELS)),
            ("accuracy",),
            False,
        )

    def part(files: Sequence[str]) -> Examples:
        return _joined([_examples(tables[file], task) for file in files])

    train, validation = _hold_out(part(layout.train), VALIDATION_SHARE, seed, str(root), MOST_VALIDATION)
    splits = Splits(train, validation, part(layout.test))
    if layout.unlabelled and (root / layout.unlabelled).exists():
        splits.unlabelled = _examples(_read_known(root / layout.unlabelled, name), task, labelled=False)
    for file in layout.extra:
        if (root / file).exists():
            key = Path(file).stem.removeprefix("dev_")
            splits.extra[key] = _examples(_read_known(root / file, name), task, labelled=file.startswith("dev"))
    return splits


def _name_of(folder: Path) -> str | None:
    """The known task a folder is named after; None for any other."""
    try:
        return task_name(folder.name)
    except ValueError:
        return None


def _read_known(path: Path, name: str) -> _Table:
    if path.suffix not in (".tsv", ".txt"):
        return _read(path)
    headless = name == "cola" and path.name != "test.tsv"
    return _read_tsv(path, COLA if headless else None, skip_broken=name == "qqp")


def _joined(parts: Sequence[Examples]) -> Examples:
    """One part of several files of single texts; rows are numbered anew."""
    if len(parts) == 1:
        return parts[0]
    first = [text for part in parts for text in part.first]
    labels: Any = [label for part in parts for label in part.labels or []]
    return Examples(parts[0].task, first, None, labels, list(range(len(first))))


def _clinc150(root: Path, seed: int) -> Splits:
    """The in-scope intents; the official validation part serves as such."""
    path = next((root / file for file in ("data_full.json.gz", "data_full.json") if (root / file).exists()), None)
    if path is None:
        raise FileNotFoundError(f"{root}: no data_full.json or data_full.json.gz")
    try:
        content = json.loads(_text(path))
        tables = [
            _Table(
                f"{path}, {part}", [(i, {"text": t, "label": y}) for i, (t, y) in enumerate(content[part], 1)], "row"
            )
            for part in ("train", "val", "test")
        ]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not CLINC150's lists of [text, intent] under train, val and test: {error}") from None
    task = Task("clinc150", _distinct(tables[:1], "label"), ("accuracy",), False)
    train, validation, test = (_examples(table, task) for table in tables)
    return Splits(train, validation, test)


# Files of one's own


def _plain(options: DataOptions, seed: int) -> Splits:
    table = _read(Path(options.data))
    task = _own_task(options, options.task, table, options.name)
    examples = _examples(table, task, options)
    if options.test_data is None:
        examples, test = _hold_out(examples, TEST_SHARE, seed, options.data)
    else:
        test = _examples(_read(Path(options.test_data)), task, options)
    return Splits(*_hold_out(examples, VALIDATION_SHARE, seed, options.data, MOST_VALIDATION), test)


def _own_task(
    options: DataOptions, said: str | None, table: _Table, name: str, labels: tuple[str, ...] | None = None
) -> Task:
    """The task that was said, or one made of the labels that the training data have."""
    pair = options.text_pair is not None
    if said == "regression":
        return generic(name, None, pair)
    if said is None:
        return generic(name, labels or _distinct([table], options.label), pair)
    known = task_name(said)
    if known not in TASKS:
        raise ValueError(f"task {said!r} is unknown: choose from regression, {', '.join(TASKS)}")
    return TASKS[known]


# The Hub


def _hub(options: DataOptions, seed: int) -> Splits:
    """A data set of the ``datasets`` library: by name, a folder of its files, or one that ``save_to_disk`` wrote."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError('--data hub:NAME needs the datasets library: pip install "sinkd[hub]"') from None
    name, _, config = options.data.removeprefix("hub:").partition(":")
    if any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
        parts = datasets.load_from_disk(name)
        parts = {"train": parts} if isinstance(parts, datasets.Dataset) else parts
    else:
        parts = datasets.load_dataset(name, config or None)
    if "train" not in parts:
        raise ValueError(f"{options.data}: no split 'train'; it has {', '.join(parts)}")
    said = options.task or task_name(config or Path(name).name)
    feature = parts["train"].features.get(options.label)
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    no_label = (None,) if names is None and said not in TASKS else (None, -1)
    tables: dict[str, tuple[_Table, bool]] = {}
    for split, content in parts.items():
        rows = list(enumerate(content.to_list(), 1))
        kept = [(i, row) for i, row in rows if row.get(options.label) not in no_label]
        if kept and len(kept) < len(rows):
            logger.warning("%s, %s: left out %d rows without a label", options.data, split, len(rows) - len(kept))
        if names is not None:
            kept = [(i, {**row, options.label: names[row[options.label]]}) for i, row in kept]
        tables[split] = (_Table(f"{options.data}, {split}", kept or rows, "row"), bool(kept) or split == "train")
    task = _own_task(options, said, tables["train"][0], Path(name).name, names)
    everything = {split: _examples(table, task, options, labelled) for split, (table, labelled) in tables.items()}
    return _arranged(everything, seed, options.data)


def _arranged(parts: dict[str, Examples], seed: int, name: str) -> Splits:
    """Which part is for what: without a labelled test set the validation set is the test set."""
    train = parts.pop("train")
    official = [s for s in ("validation", "validation_matched", "dev") if s in parts and parts[s].labels is not None]
    if "test" in parts and parts["test"].labels is not None:
        test = parts.pop("test")
    elif official:
        test = parts.pop(official.pop(0))
    else:
        train, test = _hold_out(train, TEST_SHARE, seed, name)
    if official:
        validation = parts.pop(official[0])
    else:
        train, validation = _hold_out(train, VALIDATION_SHARE, seed, name, MOST_VALIDATION)
    unlabelled = next((parts.pop(s) for s in ("test", "test_matched") if s in parts), None)
    extra = {s.removeprefix("validation_"): part for s, part in parts.items()}
    return Splits(train, validation, test, unlabelled, extra)
