"""Word crops from one layout to another; the verb ``convert``. Encoded images are copied byte by byte."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath, PureWindowsPath

import lmdb
import numpy as np
from papercore.lab.cli import flag
from papercore.lab.report import console
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from dsan.images import FORMATS
from dsan.readers import TABLES, Crops, read_crops, sidecar

KINDS = ("lmdb", "folder", "json", "zip")
SUFFIXES = {"BMP": ".bmp", "GIF": ".gif", "JPEG": ".jpg", "PNG": ".png", "PPM": ".ppm", "TIFF": ".tif", "WEBP": ".webp"}
FIRST_MAP, RECORDS = 2**24, 1000  # bytes of an LMDB's first map; crops in a transaction

Item = tuple[str, bytes, str]  # name, encoded image, label
Put = Callable[[str, bytes, str], None]


def write_crops(target: str | Path, to: str, items: Iterable[Item]) -> list[str]:
    """Write crops where :func:`dsan.readers.read_crops` finds them; nothing is left there if it fails.

    Args:
        target: what to make. A folder must not be there yet, or be empty; a zip must not be there yet.
        to: ``lmdb``: as deep-text-recognition-benchmark has it; names are not kept. ``folder``: images and ``gt.txt``.
            ``json``: ``images/`` and ``labels.json``, as docTR has it. ``zip``: what ``folder`` is, in a zip, not compressed.
        items: (name, encoded image, label). A name is a relative path with "/"; one without a suffix gets that of
            its format.

    Returns:
        The names under which the crops are read again, in this order.

    Raises:
        ValueError: for another kind; a target that is in use; no items; a name that is there twice, leaves the target or has a
            tab or line end; a label with a line end where it is to be in ``gt.txt``.
    """
    target = Path(target)
    if to not in KINDS:
        raise ValueError(f"to must be one of {', '.join(KINDS)}; got {to!r}")
    if (to == "zip") != (target.suffix == ".zip"):
        raise ValueError(
            f"{target}: the name of a zip, and of nothing else, ends in .zip; rename it, or give another --to"
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{target}: is there already, and not empty; give another target, or remove it")
    writer = {"lmdb": _lmdb, "folder": _folder, "json": _json, "zip": _zip}[to]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with writer(temporary) as put:
            names = _put_all(items, put, to)
        if not names:
            raise ValueError(f"{target}: there are no crops to write")
        if target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return names


def write_boxes(
    target: str | Path,
    names: Sequence[str],
    labels: Sequence[str],
    boxes: Iterable[np.ndarray | Sequence[Sequence[float]]],
) -> Path:
    """Write boxes of characters beside crops that :func:`write_crops` wrote, where :func:`dsan.readers.read_crops` finds them.

    Args:
        target: of the crops. names: as :func:`write_crops` returned them. labels: of the crops.
        boxes: of each crop (characters, 4): x, y, width, height in pixels of its image.

    Returns:
        The file: gzip of a line of JSON for each crop, with ``name``, ``label`` and ``boxes``.
    """
    path = sidecar(target)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with gzip.open(temporary, "wt", encoding="utf-8") as file:
        for name, label, box in zip(names, labels, boxes, strict=True):
            values = np.asarray(box, np.float64).reshape(-1, 4).round(2).tolist()
            file.write(json.dumps({"name": name, "label": label, "boxes": values}, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return path


@dataclass
class ConvertOptions:
    """What to convert."""

    source: str = flag(
        "an LMDB folder, a folder or zip with gt.txt or labels.json and images, or such a file itself", positional=True
    )
    target: str = flag("what to make: a folder, or a .zip", positional=True)
    to: str = flag(
        "lmdb (as deep-text-recognition-benchmark reads it), folder (images and gt.txt), json (images/ and labels.json, as docTR "
        "reads it) or zip (images and gt.txt)",
        "lmdb",
    )


def convert(options: ConvertOptions) -> Path:
    """The verb ``convert``. Labels stay as they are; boxes of characters, if there are any, go along."""
    crops, target = read_crops(options.source), Path(options.target)
    names = write_crops(target, options.to, tqdm(_items(crops), "convert", len(crops), unit=" crops", delay=1))
    if crops.boxes is not None:
        write_boxes(target, names, crops.labels, crops.boxes)
    console.print(f"{target}: {len(names):,} crops ({options.to}) from {options.source}", soft_wrap=True, markup=False)
    return target


def _items(crops: Crops) -> Iterator[Item]:
    for i, (name, label) in enumerate(zip(crops.names, crops.labels, strict=True)):
        yield name, crops.content(i), label


def _put_all(items: Iterable[Item], put: Put, to: str) -> list[str]:
    names: list[str] = []
    taken = set(TABLES)  # an image may not be called so
    for name, content, label in items:
        if to == "lmdb":
            name = f"image-{len(names) + 1:09d}"
        else:
            name = _with_suffix(name, content)
            _check(name, label if to != "json" else "")
        if name in taken:
            raise ValueError(f"{name}: this name is there twice; give each image a name of its own")
        taken.add(name)
        names.append(name)
        put(name, content, label)
    return names


def _with_suffix(name: str, content: bytes) -> str:
    if PurePosixPath(name).suffix:
        return name
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            return name + SUFFIXES.get(picture.format or "", "")
    except (UnidentifiedImageError, OSError, ValueError):  # damaged; it is told where it is decoded
        return name


def _check(name: str, label: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\\" in name or not path.parts:
        raise ValueError(f"{name!r}: a name must be a relative path within the target, without '..' or a backslash")
    if any(c in name for c in "\t\r\n") or any(c in label for c in "\r\n"):
        raise ValueError(
            f"{name!r}: gt.txt cannot hold a tab or line end in a name, nor a line end in a label ({label!r})"
        )


# Layouts. Each is given a name, an image and a label after the other.


@contextmanager
def _folder(path: Path) -> Iterator[Put]:
    path.mkdir()
    with (path / "gt.txt").open("w", encoding="utf-8", newline="") as lines:

        def put(name: str, content: bytes, label: str) -> None:
            _write(path / name, content)
            lines.write(f"{name}\t{label}\n")

        yield put


@contextmanager
def _json(path: Path) -> Iterator[Put]:
    (path / "images").mkdir(parents=True)
    labels: dict[str, str] = {}

    def put(name: str, content: bytes, label: str) -> None:
        _write(path / "images" / name, content)
        labels[name] = label

    yield put
    (path / "labels.json").write_text(json.dumps(labels, ensure_ascii=False, indent=0), encoding="utf-8")


@contextmanager
def _zip(path: Path) -> Iterator[Put]:
    lines: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, content: bytes, label: str) -> None:
            archive.writestr(name, content)
            lines.append(f"{name}\t{label}\n")

        yield put
        archive.writestr("gt.txt", "".join(lines), zipfile.ZIP_DEFLATED)


@contextmanager
def _lmdb(path: Path) -> Iterator[Put]:
    with lmdb.open(str(path), map_size=FIRST_MAP) as environment:
        records: list[tuple[bytes, bytes]] = []
        numbers = count(1)

        def put(name: str, content: bytes, label: str) -> None:
            number = next(numbers)
            records.append((f"image-{number:09d}".encode(), content))
            records.append((f"label-{number:09d}".encode(), label.encode()))
            if len(records) >= 2 * RECORDS:
                _commit(environment, records)

        yield put
        records.append((b"num-samples", str(next(numbers) - 1).encode()))
        _commit(environment, records)


def _commit(environment: lmdb.Environment, records: list[tuple[bytes, bytes]]) -> None:
    """Put the records, in a map twice as large as often as needed."""
    while records:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in records:
                    transaction.put(key, value)
            records.clear()
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
