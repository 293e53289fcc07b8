"""Where pictures come from: folders, archives, arrays, and the data sets of torchvision and of the Hub. None is decoded here."""

from __future__ import annotations

import inspect
import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from disco.decode import SUFFIXES, open_picture
from disco.sample import sample

KINDS = "sample, cifar10, a folder of images, an .npz file, .tar, .tar.gz or .tar.xz archives, torchvision:NAME:ROOT, or hub:NAME"
TEST = ("test", "val", "valid", "validation")  # in this order
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz")
MOST_ENCODED = 2**32  # bytes of a compressed archive's images, which are held in memory


@dataclass
class Pictures:
    """The pictures of one split, not yet decoded.

    Args:
        open: number of a picture -> the picture, of which no more than the header need have been read. It can be pickled.
        names: of the pictures, for messages; their number is the number of pictures.
        labels: of each a class's number (in ``classes``), or None.
        classes: names.
    """

    open: Callable[[int], Image.Image]
    names: Sequence[object]
    labels: list[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def label_tensor(self) -> Tensor | None:
        return None if self.labels is None else torch.tensor(self.labels, dtype=torch.int64)

    def select(self, positions: Sequence[int]) -> Pictures:
        """The pictures at these positions, in this order."""
        labels = None if self.labels is None else [self.labels[i] for i in positions]
        return Pictures(
            partial(_open_at, self.open, positions), [self.names[i] for i in positions], labels, self.classes
        )


def _open_at(open: Callable[[int], Image.Image], positions: Sequence[int], index: int) -> Image.Image:
    return open(positions[index])


def read(data: str) -> tuple[Pictures, Pictures | None]:
    """The training pictures, and the test pictures if there are any, in an order that does not depend on the machine.

    Args:
        data: one of

            - ``sample``: :func:`disco.sample.sample`.
            - ``cifar10``: ``$PAPERCORE_DATA/disco/cifar10_jpeg.tar.xz``.
            - a folder. With ``train/CLASS/...`` and, if there is one, ``test/CLASS/...`` (or ``val``, ``valid``, ``validation``;
              the first of them that has classes) it is labelled. Any other folder of images, nested as you like, is not.
            - tar archives: a file, a folder of them, a pattern (``shards/*.tar``), or several of these parted by commas. Each
              holds a tree as above, or is a WebDataset shard: ``KEY.jpg`` (or another image) and ``KEY.cls`` (a whole number or
              a name) or ``KEY.json`` (with ``label``). Of several archives those with ``test``, ``val``, ... in the name are for
              testing if others have ``train`` in theirs. Nothing is extracted. Images of compressed archives are held in
              memory, still encoded.
            - an ``.npz`` file: ``images`` (N x H x W x 3, N x 3 x H x W or N x H x W, uint8), optionally ``labels`` (N whole
              numbers), ``test_images``, ``test_labels``.
            - ``torchvision:NAME:ROOT``: ``torchvision.datasets.NAME`` in the folder ROOT, which is not downloaded.
            - ``hub:NAME[:CONFIG]``, or a folder that ``datasets.Dataset.save_to_disk`` wrote: the first column of images and,
              if there is one, the first ClassLabel.

    Test pictures without labels beside labelled training pictures, and labelled ones beside unlabelled, are left out.

    Raises:
        ValueError: for any other kind; for what holds no images, damaged archives, labels that some images lack or that are
            more or fewer than the images, test classes that training lacks; for cifar10 without the variable.
        OSError: for a file or folder that is missing. ModuleNotFoundError: for Hub data without the ``datasets`` library.

    >>> train, test = read("sample")
    >>> len(train), len(test), train.classes[:3], train.open(0).size
    (1437, 360, ('0', '1', '2'), (16, 16))
    """
    if data == "sample":
        images, labels, test_images, test_labels = sample()
        parts = [_arrays("sample", images, labels), _arrays("sample", test_images, test_labels)]
        return _agreed(data, parts[0], parts[1:])
    if data == "cifar10":
        if "PAPERCORE_DATA" not in os.environ:
            raise ValueError("data cifar10 reads $PAPERCORE_DATA/disco/cifar10_jpeg.tar.xz: set PAPERCORE_DATA")
        data = str(Path(os.environ["PAPERCORE_DATA"]) / "disco" / "cifar10_jpeg.tar.xz")
    if data.startswith("torchvision:"):
        return _torchvision(data)
    if data.startswith("hub:") or any((Path(data) / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _hub(data)
    if data.endswith(".npz"):
        return _npz(data)
    if Path(data).is_dir() or data.endswith(ARCHIVES):
        return _tree(data)
    if Path(data).exists():
        raise ValueError(f"{data}: not a kind of data that can be read; expected {KINDS}")
    raise FileNotFoundError(f"{data}: no such file or folder; expected {KINDS}")


def _agreed(data: str, train: Pictures, tests: Sequence[Pictures]) -> tuple[Pictures, Pictures | None]:
    """The training part and the first test part that is labelled if it is. Without given classes, the training labels that
    occur, names or numbers, are the classes, in order."""
    test = next((part for part in tests if len(part) and (part.labels is None) == (train.labels is None)), None)
    if train.labels is not None and not train.classes:
        known: Any = sorted(set(train.labels))
        number = {label: i for i, label in enumerate(known)}
        if test is not None and test.labels is not None:
            unknown = sorted({str(label) for label in test.labels if label not in number})
            if unknown:
                raise ValueError(f"{data}: test classes that the training images lack: {', '.join(unknown[:5])}")
            test.labels = [number[label] for label in test.labels]
        train.labels = [number[label] for label in train.labels]
        train.classes = tuple(map(str, known))
    elif test is not None and test.classes != train.classes:
        raise ValueError(f"{data}: the test images have other classes than the training images")
    if test is not None:
        test.classes = train.classes
    return train, test


# Folders and archives


class _File(NamedTuple):
    """A file, or the member of an archive: where it starts and how long it is, or what it holds."""

    path: str
    member: str = ""
    content: tuple[int, int] | bytes = b""

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.member else self.path

    def read(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        with open(self.path, "rb") as file:
            file.seek(self.content[0])
            return file.read(self.content[1])


class _Entry(NamedTuple):
    """A file at its place in a tree; the label is the one beside it in its archive."""

    parts: tuple[str, ...]
    file: _File
    label: int | str | None = None


def _open_file(files: Sequence[_File], index: int) -> Image.Image:
    file = files[index]
    return open_picture(file.read() if file.member else file.path)


def _tree(data: str) -> tuple[Pictures, Pictures | None]:
    files: list[tuple[tuple[str, ...], str]] = []  # folder within the tree, path
    for name in [data] if Path(data).exists() else data.split(","):
        paths = [name] if Path(name).exists() else sorted(glob(name))
        if not paths:
            raise FileNotFoundError(f"{name}: no such file or folder")
        for path in paths:
            files += _walk(path) if Path(path).is_dir() else [((), path)]
    several = sum(path.endswith(ARCHIVES) for _, path in files) > 1
    entries: list[_Entry] = []
    for folder, path in files:
        if _is_image(path):
            entries.append(_Entry((*folder, Path(path).name), _File(path)))
        else:
            folder = folder or (_role(path) if several else ())
            entries += [entry._replace(parts=(*folder, *entry.parts)) for entry in _members(path)]
    if not entries:
        raise ValueError(f"{data}: no images ({', '.join(sorted(SUFFIXES))})")
    entries = _unwrapped(sorted(entries, key=lambda entry: entry.parts))
    splits: dict[str, list[_Entry]] = {name: [] for name in ("train", *TEST)}
    for entry in entries:
        if len(entry.parts) > 1 and entry.parts[0] in splits:
            splits[entry.parts[0]].append(entry._replace(parts=entry.parts[1:]))
    if splits["train"]:
        train, *tests = [_files(data, part, classed=True) for part in splits.values() if part]
        return _agreed(data, train, tests)
    if (Path(data) / "train").is_dir():
        raise ValueError(f"{Path(data) / 'train'}: no images ({', '.join(sorted(SUFFIXES))})")
    return _agreed(data, _files(data, entries, classed=False), [])


def _walk(folder: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(folder within it, path) of the images and archives in a folder; hidden ones are passed over."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        parts = Path(root).relative_to(folder).parts
        for name in files:
            if _is_image(name) or (name.endswith(ARCHIVES) and not name.startswith(".")):
                yield parts, os.path.join(root, name)


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES and not os.path.basename(path).startswith(".")


def _role(path: str) -> tuple[str, ...]:
    """("train",), ("test",), ... if a word of a shard's name, or else of its folder's, says so."""
    words = re.findall("[a-z]+", Path(path).name.lower()) + re.findall("[a-z]+", Path(path).parent.name.lower())
    return next(((word,) for word in words if word in ("train", *TEST)), ())


def _members(path: str) -> list[_Entry]:
    """The images of an archive with the labels that lie beside them."""
    plain = path.endswith(".tar")
    files: list[_File] = []
    labels: dict[str, int | str | None] = {}
    encoded = 0
    try:
        with tarfile.open(path, "r:" if plain else "r|*") as archive:
            for member in tqdm(archive, os.path.basename(path), unit=" files", delay=2, leave=False):
                stem, suffix = os.path.splitext(member.name)
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    continue
                if _is_image(member.name) and plain:
                    files.append(_File(path, member.name, (member.offset_data, member.size)))
                elif _is_image(member.name):
                    encoded += member.size
                    if encoded > MOST_ENCODED:
                        raise ValueError(
                            f"{path}: a compressed archive of more than 4 GiB of images; decompress it to .tar"
                        )
                    files.append(_File(path, member.name, content.read()))
                elif suffix in (".cls", ".json") and member.size < 2**20:
                    label = _label(content.read(), suffix, f"{path}: {member.name}")
                    if label is not None:
                        labels[stem] = label
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged archive: {error}") from None
    return [
        _Entry(
            tuple(p for p in file.member.split("/") if p not in ("", ".", "..")),
            file,
            labels.get(os.path.splitext(file.member)[0]),
        )
        for file in files
    ]


def _label(content: bytes, suffix: str, name: str) -> int | str | None:
    try:
        text = content.decode().strip()
        label = json.loads(text) if suffix == ".json" else text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not {'JSON' if suffix == '.json' else 'UTF-8'}: {error}") from None
    if suffix == ".json":
        label = label.get("label") if isinstance(label, dict) else None
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise ValueError(f"{name}: label is {label!r}, not a whole number or a name")
    elif label.isdecimal():
        label = int(label)
    return None if label == "" else label


def _unwrapped(entries: list[_Entry]) -> list[_Entry]:
    """Sorted entries without the folders that hold them all, down to ``train``."""
    first, last = entries[0].parts[:-1], entries[-1].parts[:-1]
    depth = len(list(takewhile(lambda pair: pair[0] == pair[1] != "train", zip(first, last, strict=False))))
    return [entry._replace(parts=entry.parts[depth:]) for entry in entries]


def _files(data: str, entries: Sequence[_Entry], classed: bool) -> Pictures:
    """Labelled by what lies beside the images, or, if ``classed``, by the folders that they are in."""
    labels: list[Any] = [entry.label for entry in entries]
    if classed and all(label is None for label in labels):
        labels = [entry.parts[0] if len(entry.parts) > 1 else None for entry in entries]
    files = [entry.file for entry in entries]
    lacking = [file for file, label in zip(files, labels, strict=True) if label is None]
    if lacking and len(lacking) < len(files):
        raise ValueError(f"{data}: {len(lacking)} of {len(files)} images have no label, among them {lacking[0]}")
    if any(isinstance(label, str) for label in labels):
        labels = [str(label) for label in labels]
    return Pictures(partial(_open_file, files), files, None if lacking or not files else labels)


# Arrays


def _npz(path: str) -> tuple[Pictures, Pictures | None]:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels", "test_images", "test_labels") if name in file}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, TypeError, AttributeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays: {error}") from None
    if "images" not in arrays:
        raise ValueError(f"{path}: no array images; it may have images, labels, test_images, test_labels")
    tests = []
    if "test_images" in arrays:
        tests = [_arrays(f"{path}, test_images", arrays["test_images"], arrays.get("test_labels"))]
    return _agreed(path, _arrays(f"{path}, images", arrays["images"], arrays.get("labels")), tests)


def _arrays(name: str, images: Any, labels: Any) -> Pictures:
    if images.ndim == 4 and images.shape[3] != 3 and images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (3,))
        or 0 in images.shape[1:]
    ):
        raise ValueError(
            f"{name}: {images.dtype} of shape {images.shape}; expected uint8, N x H x W x 3, N x 3 x H x W or N x H x W"
        )
    if labels is not None:
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{name}: {len(images)} images, but labels of shape {labels.shape}")
        if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError(f"{name}: labels must be whole numbers of at least 0, not {labels.dtype}")
        labels = labels.tolist()
    return Pictures(partial(_open_array, images), [f"{name} {i}" for i in range(len(images))], labels)


def _open_array(images: Any, index: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(images[index]))


# Libraries


def _torchvision(data: str) -> tuple[Pictures, Pictures | None]:
    from torchvision import datasets

    _, name, *rest = data.split(":", 2)
    if name.startswith("LSUN"):
        raise ValueError(f"{data}: torchvision keeps the index of LSUN as a pickle, which may run code: it is not read")
    kind = getattr(datasets, name, None)
    if not rest or not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        raise ValueError(f"{data}: expected torchvision:NAME:ROOT with a class of torchvision.datasets and its folder")
    takes = inspect.signature(kind).parameters
    fixed: dict[str, Any] = {"root": rest[0]} | ({"download": False} if "download" in takes else {})
    splits: list[dict[str, Any]] = [{}]
    if "train" in takes:
        splits = [{"train": True}, {"train": False}]
    elif "split" in takes:
        splits = [{"split": split} for split in ("train", *TEST)]
    parts: list[Pictures] = []
    for split in splits:
        try:
            parts.append(_items(data, kind(**fixed, **split)))
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            if parts and isinstance(error, ValueError):  # few classes have all these splits
                continue
            raise ValueError(f"{data}: {' '.join(str(error).split())}") from None
        if len(parts) == 2:
            break
    return _agreed(data, parts[0], parts[1:])


def _items(data: str, items: Any) -> Pictures:
    """A torchvision data set; labels that are not classes, such as boxes, are passed over."""
    found = next((getattr(items, name) for name in ("targets", "labels", "_labels") if hasattr(items, name)), None)
    try:
        labels = [int(label) for label in ((items[i][1] for i in range(len(items))) if found is None else found)]
    except (TypeError, ValueError):
        labels = []
    labelled = len(labels) == len(items) and min(labels, default=-1) >= 0
    classes = tuple(map(str, getattr(items, "classes", ())))
    if not labelled or max(labels) >= len(classes):
        classes = ()
    names = [f"{data} {i}" for i in range(len(items))]
    return Pictures(partial(_open_item, items), names, labels if labelled else None, classes)


def _open_item(items: Any, index: int) -> Image.Image:
    return items[index][0]


def _hub(data: str) -> tuple[Pictures, Pictures | None]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'data {data} needs the datasets library: pip install "disco[hub]"') from None
    try:
        if data.startswith("hub:"):
            name, _, config = data.removeprefix("hub:").partition(":")
            found = datasets.load_dataset(name, config or None)
        else:
            found = datasets.load_from_disk(data)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{data}: {' '.join(str(error).split())}") from None
    splits = {"train": found} if isinstance(found, datasets.Dataset) else found
    if "train" not in splits:
        raise ValueError(f"{data}: no split train; it has {', '.join(splits)}")
    return _agreed(
        data,
        _rows(f"{data}, train", splits["train"]),
        [_rows(f"{data}, {name}", splits[name]) for name in TEST if name in splits],
    )


def _rows(name: str, table: Any) -> Pictures:
    """A split of a Hub data set; a missing label, or -1, in any row says that the labels are secret."""
    import datasets

    image = next((column for column, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"{name}: no column of images; it has {', '.join(table.features)}")
    label = next((column for column, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels = [] if label is None else list(table[label])
    labelled = bool(labels) and all(value is not None and value >= 0 for value in labels)
    encoded = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Pictures(
        partial(_open_row, encoded, image),
        [f"{name} {i}" for i in range(len(table))],
        labels if labelled else None,
        tuple(table.features[label].names) if labelled else (),
    )


def _open_row(table: Any, column: str, index: int) -> Image.Image:
    row = table[index][column]
    return open_picture(row["path"] if row["bytes"] is None else row["bytes"])
