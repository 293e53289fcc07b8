"""Word crops where users have them: LMDB, folders, zips. Labels are read now, images when they are asked for."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import lmdb
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from dsan.charset import CTCCharset, required_frames
from dsan.images import Size, open_image, upright_size

TABLES = ("gt.txt", "labels.json")
KINDS = "an LMDB folder, a folder or zip with gt.txt or labels.json, or a .txt or .json file of labels"
ICDAR = re.compile(r'([^"]+?),\s*"(.*)"\s*')  # word_1.png, "label"
LARGEST = 2**28  # bytes that a member of a zip may unpack to

NO_CHARACTER = "no character of the label is in the charset"
TOO_LONG = "too long for the frames"
LOWER, REPLACED = "lower-cased", "lost or changed characters"


class File(NamedTuple):
    """An encoded image: the function that reads it, the file or folder it is in, and its name there."""

    reader: Callable[[str, str], bytes]
    source: str
    member: str

    def __str__(self) -> str:
        return f"{self.source}: {self.member}" if self.member else self.source

    def read(self) -> bytes:
        return self.reader(self.source, self.member)


@dataclass
class Crops:
    """Crops of words and their labels; images are not yet decoded. Can be pickled, and read in any process.

    Args:
        names: of the crops within their source. labels: as they are written there. files: where the images are.
        boxes: of each crop (characters, 4): x, y, width, height in its upright pixels; (0, 4) where not known. None: of no crop.
    """

    names: list[str]
    labels: list[str]
    files: list[File]
    boxes: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def content(self, position: int) -> bytes:
        """The encoded image."""
        return self.files[position].read()

    def open(self, position: int) -> Image.Image:
        """The image, by :func:`dsan.images.open_image`.

        Raises:
            ValueError: if it is damaged or empty, naming its file.
        """
        file = self.files[position]
        try:
            return open_image(file.read(), str(file))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # a damaged or encrypted member
            raise ValueError(f"{file}: {error}") from None

    def size(self, position: int) -> tuple[int, int] | None:
        """(Width, height) of the image, pixels, by its header; None if that is damaged."""
        try:
            return upright_size(self.content(position))
        except Exception:  # Pillow raises anything for a broken file; it is told when it is decoded
            return None

    def select(self, positions: Sequence[int]) -> Crops:
        """The crops at these positions, in this order."""

        def take(values: list[Any]) -> list[Any]:
            return [values[i] for i in positions]

        boxes = None if self.boxes is None else take(self.boxes)
        return Crops(take(self.names), take(self.labels), take(self.files), boxes)


def join(parts: Sequence[Crops]) -> Crops:
    """All crops, one part after the other."""
    boxes = None
    if any(part.boxes is not None for part in parts):
        boxes = [box for part in parts for box in part.boxes or [np.zeros((0, 4), np.float32)] * len(part)]
    return Crops(
        [name for part in parts for name in part.names],
        [label for part in parts for label in part.labels],
        [file for part in parts for file in part.files],
        boxes,
    )


def read_crops(path: str | Path) -> Crops:
    """The crops of a data set, in its order.

    Args:
        path: one of

            - a folder with ``gt.txt``: a line ``name<TAB>label``, or ICDAR's ``name, "label"``, for each image, in UTF-8;
            - a folder with ``labels.json``: an object of names and labels;
            - such a file itself, under any name that ends in .txt or .json;
            - a zip with one such file and its images. Nothing is extracted;
            - an LMDB as deep-text-recognition-benchmark writes it (``num-samples``, ``image-%09d``, ``label-%09d`` from 1), or a
              folder with several, nested as you like, which are joined.

            Images lie beside the labels, or in ``images/`` there. Boxes of characters are read from ``X_chars.jsonl.gz`` beside
            a folder ``X`` or ``X.zip``, if it is there: a JSON object with ``name`` (its suffix does not matter) and ``boxes``,
            [x, y, width, height] of each character in pixels, on each line.

    Raises:
        ValueError: for any other kind; a file of labels that is empty, not UTF-8 or has a bad line, an image that is missing or
            there twice, each with the line; a damaged zip or LMDB; boxes that do not fit the labels.
        OSError: for what is missing or cannot be read.
    """
    path = Path(path)
    table = next((path / name for name in TABLES if (path / name).is_file()), None) if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected {KINDS}")
    if table is None:
        databases = sorted(p.parent for p in path.rglob("data.mdb"))
        if not databases:
            raise ValueError(f"{path}: has no gt.txt, labels.json or data.mdb; expected {KINDS}")
        crops = join([_read_lmdb(folder, folder.relative_to(path).as_posix()) for folder in databases])
    elif table.suffix in (".txt", ".json"):
        crops = _read_folder(table)
    elif table.suffix == ".zip":
        crops = _read_zip(path)
    else:
        raise ValueError(f"{path}: not a kind of data that can be read; expected {KINDS}")
    if sidecar(path).is_file():
        crops.boxes = _read_boxes(sidecar(path), crops)
    return crops


def sidecar(path: str | Path) -> Path:
    """Where the boxes of the characters of ``X`` or ``X.zip`` are.

    >>> sidecar("words/train.zip").as_posix()
    'words/train_chars.jsonl.gz'
    """
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.zip')}_chars.jsonl.gz")


# What becomes of the labels


@dataclass
class Audit:
    """What became of a data set's labels; :meth:`lines` tells it.

    Args:
        data: what is called so in messages. read, kept: numbers of crops.
        dropped: for each reason the names of the crops that were left out.
        changed: for each kind of change how many labels it met. examples: of each reason and change, one.
    """

    data: str
    read: int
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One for the data, one for each reason to drop crops, one for each change of labels."""
        dropped = [f"  {len(names):,} dropped: {why} ({self.examples[why]})" for why, names in self.dropped.items()]
        changed = [f"  {number:,} labels {how} ({self.examples[how]})" for how, number in self.changed.items()]
        return [f"{self.data}: {self.read:,} crops, {self.kept:,} kept", *dropped, *changed]


def audit(
    crops: Crops,
    charset: CTCCharset,
    frames: Callable[[int], int] | int | None = None,
    size: Size | None = None,
    on_infeasible: str = "raise",
    data: str = "data",
) -> tuple[Crops, Audit]:
    """The crops that can be used, with labels normalised, and what was dropped or changed.

    An image that cannot be decoded is not known here: see :class:`dsan.data.Words`.

    Args:
        frames: width of a fitted crop, pixels -> the frames T that a recogniser makes of it; or T itself; None: any label fits.
        size: what crops are fitted to; :class:`dsan.images.Size` by default. With its keep_ratio, headers of images are read.
        on_infeasible: of labels for which T is too small: ``raise``, or ``skip`` (drop) them.
        data: name of the data in messages.

    Raises:
        ValueError: for a label that does not fit, naming crop, label, T and the frames needed; if nothing is kept.
    """
    size = size or Size()

    def width(position: int) -> int:
        pixels = crops.size(position) if size.keep_ratio else None
        return size.width if pixels is None else size.fitted_width(*pixels)

    kept, labels, report = audit_labels(crops.names, crops.labels, charset, frames, width, on_infeasible, data)
    if not kept:
        raise ValueError(f"{'; '.join(report.lines())}: nothing is left; check the charset {charset.characters!r}")
    chosen = crops.select(kept)
    if chosen.boxes is not None:
        chosen.boxes = [
            boxes_of(charset, before, after, box)
            for before, after, box in zip(chosen.labels, labels, chosen.boxes, strict=True)
        ]
    chosen.labels = labels
    return chosen, report


def audit_labels(
    names: Sequence[str],
    labels: Sequence[str],
    charset: CTCCharset,
    frames: Callable[[int], int] | int | None,
    width: Callable[[int], int],
    on_infeasible: str,
    data: str,
) -> tuple[list[int], list[str], Audit]:
    """:func:`audit` of labels: positions to keep, their labels normalised, and the report.

    Args:
        width: position -> width of the fitted crop, pixels.
    """
    if on_infeasible not in ("raise", "skip"):
        raise ValueError(f"on_infeasible must be raise or skip, got {on_infeasible!r}")
    report = Audit(data, len(labels))
    kept, normalised = [], []
    for i, label in enumerate(tqdm(labels, "check labels", unit=" labels", delay=2, leave=False)):
        text = charset.normalize(label)
        needed = required_frames(text)
        available = needed if frames is None else frames if isinstance(frames, int) else frames(width(i))
        reason = ""
        if not text:
            reason, example = NO_CHARACTER, f"{names[i]}, {label!r}"
        elif needed > available:
            reason, example = TOO_LONG, f"{names[i]}, {label!r}: needs {needed}, has {available}"
            if on_infeasible == "raise":
                raise ValueError(
                    f"{data}: crop {i} ({names[i]}) has label {label!r}, which needs T >= {needed} frames, but its image makes "
                    f"T = {available}: give a larger width, or skip such crops with --on_infeasible skip"
                )
        if reason:
            report.dropped.setdefault(reason, []).append(names[i])
            report.examples.setdefault(reason, example)
            continue
        kept.append(i)
        normalised.append(text)
        if text != label:
            how = LOWER if text == label.lower() else REPLACED
            report.changed[how] = report.changed.get(how, 0) + 1
            report.examples.setdefault(how, f"{label!r} is now {text!r}")
    report.kept = len(kept)
    return kept, normalised, report


def boxes_of(charset: CTCCharset, before: str, after: str, boxes: np.ndarray) -> np.ndarray:
    """Of (n, 4) those of the characters that are left when ``before`` is normalised to ``after``; (0, 4) if that is not clear."""
    if before == after or len(boxes) != len(before):
        return boxes if len(boxes) == len(after) else boxes[:0]
    chosen = [i for i, c in enumerate(before) for _ in charset.normalize(c)]
    return boxes[chosen] if len(chosen) == len(after) else boxes[:0]


# Folders and zips

Row = tuple[str, str, str]  # name, label, where they are written


def _read_folder(table: Path) -> Crops:
    folder, rows = table.parent, _rows(table.read_bytes(), str(table))
    files = []
    for name, _, where in rows:
        found = next((p for p in (folder / name, folder / "images" / name) if p.is_file()), None)
        if found is None:
            raise ValueError(f"{where}: no image {name!r} in {folder} or its images/")
        files.append(File(_file_bytes, str(found), ""))
    return Crops([row[0] for row in rows], [row[1] for row in rows], files)


def _read_zip(path: Path) -> Crops:
    try:
        archive = _archive(str(path))
        members = set(archive.namelist())
        tables = sorted(name for name in members if name.rpartition("/")[2] in TABLES)
        if len(tables) != 1:
            raise ValueError(
                f"{path}: expected one gt.txt or labels.json in the zip, found {', '.join(tables) or 'none'}"
            )
        rows = _rows(_member(archive, tables[0]), f"{path}: {tables[0]}")
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path}: a damaged or encrypted zip: {error}") from None
    folder = tables[0].rpartition("/")[0]
    base = f"{folder}/" if folder else ""
    files = []
    for name, _, where in rows:
        found = next((m for m in (base + name, f"{base}images/{name}") if m in members), None)
        if found is None:
            raise ValueError(f"{where}: no image {name!r} in the zip")
        files.append(File(_zip_bytes, str(path), found))
    return Crops([row[0] for row in rows], [row[1] for row in rows], files)


def _rows(content: bytes, table: str) -> list[Row]:
    """Of a file of labels: names, each once, and labels."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not UTF-8: {error}") from None
    rows = list(_json_rows(text, table) if table.endswith(".json") else _text_rows(text, table))
    if not rows:
        raise ValueError(f"{table}: empty; expected an image's name and its label on each line")
    first: dict[str, str] = {}
    for name, _, where in rows:
        if first.setdefault(name, where) != where:
            raise ValueError(f"{where}: {name!r} is there twice, first in {first[name]}")
    return rows


def _text_rows(text: str, table: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        name, tab, label = line.partition("\t")
        quoted = None if tab else ICDAR.fullmatch(line)
        if quoted:
            name, label = quoted[1], re.sub(r"\\(.)", r"\1", quoted[2])
        if not name.strip() or not (tab or quoted):
            raise ValueError(f"{table}: line {number}: expected name<TAB>label, got {line!r:.80}")
        yield name.strip(), label, f"{table}: line {number}"


def _json_rows(text: str, table: str) -> Iterator[Row]:
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table}: not JSON: {error}") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"{table}: expected an object of names and labels, got {pairs!r:.80}")
    for number, (name, label) in enumerate(pairs, 1):
        if not isinstance(label, str):
            raise ValueError(f"{table}: the label of {name!r} must be text, got {label!r:.80}")
        yield name, label, f"{table}: entry {number}"


def _file_bytes(source: str, member: str) -> bytes:
    return Path(source).read_bytes()


def _zip_bytes(source: str, member: str) -> bytes:
    return _member(_archive(source), member)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise ValueError(f"{archive.filename}: {name} unpacks to {size:,} bytes; at most {LARGEST:,} are read")
    return archive.read(name)


def _archive(path: str) -> zipfile.ZipFile:
    """Open, once for each process: a forked one must not share its place in the file."""
    return _open_archive(path, os.getpid(), _state(path))


@cache
def _open_archive(path: str, process: int, state: object) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _state(path: str) -> object:
    """Another one once the file has been written anew."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


# LMDB

_opening = Lock()
_environments: dict[str, tuple[object, lmdb.Environment]] = {}  # by path, with the state of the file


def _read_lmdb(folder: Path, prefix: str) -> Crops:
    keys, labels = [], []
    try:
        with _environment(str(folder)).begin() as transaction:
            number = transaction.get(b"num-samples")
            if number is None or not number.isdigit():
                raise ValueError(f"{folder}: an LMDB without num-samples, so not one of word crops")
            for i in tqdm(range(1, int(number) + 1), "read labels", unit=" labels", delay=2, leave=False):
                key = f"label-{i:09d}"
                label = transaction.get(key.encode())
                if label is None:
                    raise ValueError(f"{folder}: num-samples is {int(number)}, but there is no {key}")
                try:
                    labels.append(label.decode())
                except UnicodeDecodeError as error:
                    raise ValueError(f"{folder}: {key}: not UTF-8: {error}") from None
                keys.append(f"image-{i:09d}")
    except lmdb.Error as error:
        raise ValueError(f"{folder}: a damaged LMDB: {error}") from None
    files = [File(_lmdb_bytes, str(folder), key) for key in keys]
    return Crops(keys if prefix == "." else [f"{prefix}/{key}" for key in keys], labels, files)


def _lmdb_bytes(source: str, member: str) -> bytes:
    with _environment(source).begin() as transaction:
        return transaction.get(member.encode()) or b""


def _environment(path: str) -> lmdb.Environment:
    """Open, once for each process. Without a lock table, a forked process may go on with it."""
    state = _state(os.path.join(path, "data.mdb"))
    with _opening:
        known, environment = _environments.get(path, (None, None))
        if environment is None or known != state:
            if environment is not None:
                environment.close()
            environment = lmdb.open(path, readonly=True, lock=False, readahead=False)
            _environments[path] = state, environment
        return environment


# Boxes


def _read_boxes(path: Path, crops: Crops) -> list[np.ndarray]:
    position = {_stem(name): i for i, name in enumerate(crops.names)}
    boxes = [np.zeros((0, 4), np.float32)] * len(crops)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}: line {number}"
                try:
                    row = json.loads(line)
                    name, box = row["name"], np.asarray(row["boxes"], np.float32).reshape(-1, 4)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(
                        f"{where}: expected an object with name and boxes [x, y, width, height]: {error!r}"
                    ) from None
                i = position.get(_stem(name))
                if i is None:
                    continue
                if len(box) != len(crops.labels[i]):
                    raise ValueError(f"{where}: {len(box)} boxes, but the label of {name} is {crops.labels[i]!r}")
                boxes[i] = box
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a damaged file of boxes: {error}") from None
    return boxes


def _stem(name: str) -> str:
    """Without suffix."""
    return re.sub(r"\.\w+$", "", name)
