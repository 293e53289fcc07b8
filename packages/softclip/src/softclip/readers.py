"""Image-text pairs where users have them: WebDataset shards and CSV tables as open_clip reads them. No image is decoded here."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

SUFFIXES = ("jpg", "png", "jpeg", "webp")  # of a sample's image in a shard; the first that is there
CAPTION = "txt"
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others could call programs, as EPS does


@dataclass
class Pairs:
    """Images and their captions; images are not yet decoded.

    Args:
        open: position -> the image, of which no more than the header need have been read. Can be pickled, as all of this.
        names: of the samples, for messages; equal ones are one image. Their number is the number of pairs.
        captions: texts.
        tags: of each image the names of things in it, an empty list if they are not known. None: of no image.
        boxes: of each image (k, 4): x0, y0, x1, y1 of regions as shares of its width and height, 0 to 1. None: not known.
        roi: position -> float array (k, f), a vector for each region; k = 0 where there are none. None: not known.
        groups: equal numbers: pairs about the same thing, of which each text describes each image. None: each pair alone.
        labels: of each image the number of its class (in ``classes``), for zero-shot classification. None: not known.
        classes: names.
    """

    open: Callable[[int], Image.Image]
    names: Sequence[object]
    captions: list[str]
    tags: list[list[str]] | None = None
    boxes: list[Tensor] | None = None
    roi: Callable[[int], np.ndarray] | None = None
    groups: list[int] | None = None
    labels: list[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def image(self, position: int) -> Image.Image:
        """The image decoded, upright by its EXIF data, in RGB; transparent pixels are on white.

        Raises:
            ValueError: if it cannot be decoded, naming it.
        """
        try:
            with self.open(position) as picture:
                if max(picture.size) > 100 * min(picture.size):  # its shorter side is made as long as the network's
                    raise ValueError(f"{picture.width} x {picture.height} pixels are too long a strip")
                return _rgb(picture)
        except Exception as error:  # Pillow raises anything for a broken file
            raise ValueError(f"{self.names[position]}: the image cannot be decoded: {error}") from None

    def select(self, positions: Sequence[int]) -> Pairs:
        """The pairs at these positions, in this order."""

        def take(values: Any) -> Any:
            return None if values is None else [values[i] for i in positions]

        return Pairs(
            partial(_at, self.open, positions),
            take(self.names),
            take(self.captions),
            take(self.tags),
            take(self.boxes),
            None if self.roi is None else partial(_at, self.roi, positions),
            take(self.groups),
            take(self.labels),
            self.classes,
        )


class Fields(NamedTuple):
    """What to read beside image and caption; None: nothing.

    In a shard a field is the suffix of a member, such as tags.txt, roi.npy or cls, or ``json:KEY`` for a value in KEY.json's
    object. In a table it is a column. Tags are a JSON list of strings, or text in which ``;`` or line ends part them. A group and
    a label are text or a whole number. The ROI field is an array of a shard, or in a table the path of one (.npy).
    """

    tags: str | None = None
    group: str | None = None
    label: str | None = None
    roi: str | None = None


class File(NamedTuple):
    """A file, or a member of an uncompressed tar: where it starts and how long it is, in bytes."""

    path: str
    member: str = ""
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else self.path

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Record(NamedTuple):
    """A pair as it was read."""

    image: File
    caption: str
    tags: list[str] | None = None
    group: str | None = None
    label: str | None = None
    roi: File | None = None


def to_pairs(parts: Sequence[Sequence[Record]], fields: Fields) -> list[Pairs]:
    """Parts of one data set, such as training and test: their groups and classes are numbered alike."""
    groups = {group: i for i, group in enumerate(dict.fromkeys(r.group for part in parts for r in part))}
    classes = tuple(sorted({r.label for part in parts for r in part if r.label is not None}))
    number = {label: i for i, label in enumerate(classes)}

    def pairs(part: Sequence[Record]) -> Pairs:
        images = [r.image for r in part]
        return Pairs(
            partial(_open_image, images),
            images,
            [r.caption for r in part],
            None if fields.tags is None else [r.tags or [] for r in part],
            roi=None if fields.roi is None else partial(_open_array, [r.roi for r in part]),
            groups=None if fields.group is None else [groups[r.group] for r in part],
            labels=None if fields.label is None else [number[r.label] for r in part if r.label is not None],
            classes=classes,
        )

    return [pairs(part) for part in parts]


def find_shards(data: str) -> tuple[list[str], list[str]]:
    """Paths of tar files: (to train on, to test on), sorted.

    Args:
        data: a file, a folder of them, a pattern (``a-*.tar``), or one with a range of numbers (``a-{0000..0003}.tar``). Of
            several files, those with a name that starts with ``test`` are for testing if another's starts with ``train``.

    Raises:
        FileNotFoundError: if one is not there.
    """
    if Path(data).is_dir():
        paths = sorted(str(path) for path in Path(data).glob("*.tar"))
        if not paths:
            raise FileNotFoundError(f"{data}: no .tar files in this folder")
    else:
        paths = [path for pattern in _ranges(data) for path in sorted(glob(pattern)) or [pattern]]
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
    test = [path for path in paths if Path(path).name.startswith("test")]
    if any(Path(path).name.startswith("train") for path in paths):
        return [path for path in paths if path not in test], test
    return paths, []


def read_shards(paths: Sequence[str], fields: Fields) -> list[Record]:
    """The samples of uncompressed tar files: the members that share a name up to the first dot.

    Each has an image (.jpg, .png, .jpeg or .webp) and a caption (.txt). Texts are read now; of images and arrays, only where they
    lie is kept, so that each can be read when it is asked for, in any order. Hidden members are passed over.

    Raises:
        ValueError: for a damaged or compressed archive; a sample without image, caption, group or label; tags or an ROI field
            that no sample of the first file has; tags that are no list of strings. Each names file and sample.
        FileNotFoundError: for a file that is missing.
    """
    records: list[Record] = []
    for path in tqdm(paths, "index", unit=" shards", delay=2, leave=False):
        samples = _samples(path)
        if not samples:
            raise ValueError(f"{path}: no samples in this archive")
        with open(path, "rb") as shard:
            records += [_shard_record(shard, f"{path}: sample {key}", samples[key], fields) for key in samples]
            for field, values in ((fields.tags, [r.tags for r in records]), (fields.roi, [r.roi for r in records])):
                if field is not None and all(value is None for value in values):
                    members = next(iter(samples.values()))
                    raise ValueError(f"{path}: no sample has {field}; the first has {_known(shard, members)}")
    return records


def read_csv(path: str, fields: Fields, *, image: str, caption: str, separator: str) -> list[Record]:
    r"""The rows of a table of image paths and captions, in UTF-8, with a line of column names.

    Paths are relative to the table's folder, or, if the first image is not there, to the working folder.

    Args:
        image, caption: columns.
        separator: between columns: one character, or ``\t`` written as two.

    Raises:
        ValueError: for a column that the table lacks; a row without image, caption, group or label, or with cells beyond the
            columns; tags that are no list of strings. Each names the line.
        FileNotFoundError: for a table, or its first image, that is missing.
    """
    separator = separator.replace("\\t", "\t")
    if len(separator) != 1:
        raise ValueError(f"csv_separator is one character, got {separator!r}")
    records: list[Record] = []
    folder = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=separator)
            columns = rows.fieldnames or ()
            for column in (image, caption, *fields):
                if column is not None and column not in columns:
                    raise ValueError(
                        f"{path}: no column {column!r}; parted by {separator!r}, it has {', '.join(columns)}"
                    )
            for row in rows:
                where = f"{path}: line {rows.line_num}"
                if not row[image] or None in row:
                    raise ValueError(f"{where}: {'more cells than columns' if row[image] else f'no {image}'}")
                if folder is None:
                    folder = _folder(row[image], path)
                roi = row[fields.roi] if fields.roi else None
                files = [File(os.path.join(folder, name)) if name else None for name in (row[image], roi)]
                records.append(_record(where, files, caption, fields, row.get, lambda: ", ".join(columns)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table in UTF-8: {error}") from None
    if not records:
        raise ValueError(f"{path}: no rows")
    return records


def _ranges(pattern: str) -> list[str]:
    """``a-{08..11}.tar`` as its four names."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    literals = parts[::3]
    return ["".join(map("".join, zip(literals, (*numbers, ""), strict=True))) for numbers in product(*ranges)]


def _samples(path: str) -> dict[str, dict[str, File]]:
    """Of each sample the members by suffix, in lower case, as WebDataset has them."""
    samples: dict[str, dict[str, File]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isreg() or not stem or not suffix or stem.startswith("__"):
                    continue
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix.lower() in sample:
                    raise ValueError(f"{path}: {member.name} is there twice; give each sample a name of its own")
                sample[suffix.lower()] = File(path, member.name, member.offset_data, member.size)
            with open(path, "rb") as file:  # tarfile takes a damaged header for the end
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"no file starts at byte {archive.offset}, where one should")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: a damaged archive, or not an uncompressed .tar: {error}") from None
    return samples


def _shard_record(shard: BinaryIO, where: str, members: Mapping[str, File], fields: Fields) -> Record:
    image = next((members[suffix] for suffix in SUFFIXES if suffix in members), None)
    if image is None:
        raise ValueError(f"{where}: no image ({', '.join(SUFFIXES)}); it has {', '.join(members)}")
    described = any(field is not None and field.startswith("json:") for field in fields)
    values = _json_values(shard, members) if described else {}

    def value(field: str) -> Any:
        if field.startswith("json:"):
            return values.get(field)
        return _text(shard, members[field]) if field in members else None

    roi = members.get(fields.roi) if fields.roi else None
    return _record(where, [image, roi], CAPTION, fields, value, lambda: _known(shard, members))


def _record(
    where: str,
    files: Sequence[Any],
    caption: str,
    fields: Fields,
    value: Callable[[str], Any],
    known: Callable[[], str],
) -> Record:
    """Of image and ROI file, and the fields' values as they were found."""

    def name(field: str | None) -> str | None:
        if field is None:
            return None
        found = value(field)
        if isinstance(found, bool) or not isinstance(found, str | int | None):
            raise ValueError(f"{where}: {field} must be text or a whole number, got {found!r:.60}")
        text = "" if found is None else str(found).strip()
        if not text:
            raise ValueError(f"{where}: no {field}, or an empty one; there are {known()}")
        return text

    title = name(caption) or ""
    tags = None if fields.tags is None else _tags(value(fields.tags), f"{where}: {fields.tags}")
    return Record(files[0], title, tags, name(fields.group), name(fields.label), files[1])


def _text(shard: BinaryIO, member: File) -> str:
    shard.seek(member.offset)
    try:
        return shard.read(member.size).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member}: not text in UTF-8: {error}") from None


def _json_values(shard: BinaryIO, members: Mapping[str, File]) -> dict[str, Any]:
    """By ``json:KEY``."""
    try:
        values = json.loads(_text(shard, members["json"])) if "json" in members else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{members['json']}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{members['json']}: expected an object with keys, got {values!r:.60}")
    return {f"json:{key}": value for key, value in values.items()}


def _known(shard: BinaryIO, members: Mapping[str, File]) -> str:
    """The fields of a sample."""
    return ", ".join([*members, *_json_values(shard, members)])


def _tags(value: Any, where: str) -> list[str] | None:
    """Of a JSON list, as text or read already, or of words that ``;`` or line ends part."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not a JSON list: {error}") from None
    elif isinstance(value, str):
        value = re.split(r"[;\n]", value)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError(f"{where}: tags must be a list of strings, got {value!r:.60}")
    return [tag.strip() for tag in value if tag.strip()]


def _folder(image: str, table: str) -> str:
    """What paths in a table are relative to."""
    for folder in (os.path.dirname(os.path.abspath(table)), ""):
        if os.path.isfile(os.path.join(folder, image)):
            return folder
    raise FileNotFoundError(f"{table}: image {image} is neither in the table's folder nor in the working folder")


def _at(open: Callable[[int], Any], positions: Sequence[int], index: int) -> Any:
    return open(positions[index])


def _open_image(files: Sequence[File], index: int) -> Image.Image:
    file = files[index]
    return Image.open(io.BytesIO(file.read()) if file.member else file.path, formats=FORMATS)


def _open_array(files: Sequence[File | None], index: int) -> np.ndarray:
    file = files[index]
    if file is None:
        return np.zeros((0, 0), np.float32)
    try:
        return np.load(io.BytesIO(file.read()), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise ValueError(f"{file}: not an array (.npy): {error}") from None


def _rgb(picture: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
