"""Images with scores, where users have them: the released layouts of eight data sets, and one CSV for everything else.

The layouts are read as their releases and their users describe them. Of the real sets none was at hand when this was written, but
TID2013's label table: see the tests.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.io
from papercore.lab.images import FORMATS
from PIL import Image
from scipy.io.matlab import MatReadError

from iqa_distill.images import ScoreScale, listed, open_rgb

OPTIONAL = ("reference", "split", "distortion")  # columns
PARTS = ("train", "validation", "test")
WORDS = dict(zip(("training", "val", "valid", "testing"), ("train", "validation", "validation", "test"), strict=True))
KINDS = (
    "a CSV with the columns image,mos[,reference][,split], or the folder of LIVE, CSIQ, TID2013, KADID-10k, LIVEC, KonIQ-10k, "
    "LIVEFB (PaQ-2-PiQ) or SPAQ as it is released"
)


@dataclass
class RatedImages:
    """Images and their scores; none is decoded yet.

    Args:
        names: of the images. scores: float64 (n,), higher is better.
        references: of each image the name of its pristine image, or what else says that it shows the same scene; None: unknown.
        splits: of each train, validation or test; None: they are not given.
        low, high: ends of the scale of the scores.
        opener: number of an image -> its pixels, uint8 (height, width, 3).
        distortions: of each the kind. pristine: files of the pristine images, by the names in ``references``.
        resize: (height, width) that images of this data set are resized to, by custom.
    """

    names: list[str]
    scores: np.ndarray
    references: list[str] | None
    splits: list[str] | None
    low: float
    high: float
    opener: Callable[[int], np.ndarray]
    distortions: list[str] | None = None
    pristine: dict[str, str] | None = None
    resize: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def open(self, index: int) -> np.ndarray:
        """The pixels of an image, uint8 (height, width, 3).

        Raises:
            ValueError: if it is damaged. OSError: if it is gone.
        """
        return self.opener(index)

    def select(self, indices: Sequence[int] | np.ndarray) -> RatedImages:
        """The images at these places, in this order."""
        chosen = np.asarray(indices, np.int64).tolist()

        def take(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[i] for i in chosen]

        return RatedImages(
            [self.names[i] for i in chosen],
            self.scores[chosen],
            take(self.references),
            take(self.splits),
            self.low,
            self.high,
            partial(_open_at, self.opener, chosen),
            take(self.distortions),
            self.pristine,
            self.resize,
        )


def _open_at(opener: Callable[[int], np.ndarray], chosen: Sequence[int], index: int) -> np.ndarray:
    return opener(chosen[index])


def _open_file(files: Sequence[Path], index: int) -> np.ndarray:
    return open_rgb(files[index])


def read_ratings(path: str | Path, *, lower_better: bool | None = None) -> RatedImages:
    """The images of a data set and their scores.

    Args:
        path: one of

            - a CSV with the columns ``image`` (path, relative to the CSV) and ``mos``, and, if you like, ``reference`` (the
              pristine original, or any word that images of one scene share), ``split`` (train, validation or test) and
              ``distortion``. Others are passed over. References that are files there make the pool of pristine images.
            - the folder of a released data set, with its images where unpacking puts them. It is known by its label file:

              LIVE: ``dmos_realigned.mat``, 0 to 100, turned round; CSIQ: ``csiq.DMOS.xlsx``, 0 to 1, turned round; TID2013:
              ``mos_with_names.txt``, 0 to 9; KADID-10k: ``dmos.csv``, 1 to 5, where high is good; LIVEC:
              ``Data/AllMOS_release.mat``, 0 to 100, without the first 7 images, which were for training its observers; KonIQ-10k:
              ``koniq10k_scores_and_distributions.csv``, or ``koniq10k_distributions_sets.csv`` for the authors' split, 1 to 100;
              LIVEFB: ``labels_image.csv``, 0 to 100; SPAQ: ``Annotations/MOS and Image attribute scores.xlsx``, 0 to 100.

            Upper and lower case of file names do not matter.
        lower_better: whether small scores are good. They are then turned round within their scale: low + high - score. None: for
            LIVE and CSIQ, whose DMOS are differences from the original, and for nothing else.

    Raises:
        ValueError: for any other kind; a missing column or image; an image that is there twice; scores that are no finite
            numbers, with their rows (the first below the header is 1); fewer than 3 images; scores that are all equal.
        OSError: for what cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected {KINDS}")
    find = _finder()
    if path.is_dir():
        found = ((read, find([path], name)) for name, read in LAYOUTS.items())
        read, labels = next(((read, file) for read, file in found if file), (None, None))
        if read is None or labels is None:
            raise ValueError(f"{path}: holds no label file that is known; expected {KINDS}")
    elif path.suffix.lower() == ".csv":
        read, labels = _csv, path
    else:
        raise ValueError(f"{path}: expected {KINDS}")
    try:
        return _rated(read(path, labels), find, lower_better)
    except (zipfile.BadZipFile, MatReadError, NotImplementedError, ValueError) as error:
        raise ValueError(f"{labels}: {' '.join(str(error).split())}") from None


def read_references(path: str | Path) -> list[Path]:
    """The files of a pool of pristine images, by name.

    Args:
        path: a folder, with folders below; or ``bsds``, $PAPERCORE_DATA/iqa-distill/bsds500_train.

    Raises:
        ValueError: for fewer than 2 images, and for ``bsds`` without that variable. OSError: for no such folder.
    """
    if path == "bsds":
        if "PAPERCORE_DATA" not in os.environ:
            raise ValueError("references bsds reads $PAPERCORE_DATA/iqa-distill/bsds500_train: set PAPERCORE_DATA")
        path = Path(os.environ["PAPERCORE_DATA"]) / "iqa-distill" / "bsds500_train"
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of pristine images")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _suffixes() and file.is_file())
    if len(files) < 2:
        raise ValueError(f"{path}: a reference pool needs at least 2 images, found {len(files)}")
    return files


# Files

Find = Callable[[Sequence[Path], str], Path | None]


def _suffixes() -> set[str]:
    return {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}


def _finder() -> Find:
    """(Folders, name) -> the file of that name, in whatever case, in the first folder that has it."""

    @cache
    def entries(folder: Path) -> dict[str, Path]:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return {file.name.lower(): file for file in files}

    def find(folders: Sequence[Path], name: str) -> Path | None:
        name = name.replace("\\", "/")
        for folder in folders:
            path: Path | None = folder / name
            if path and not path.is_file():
                path = folder
                for part in name.lower().split("/"):
                    path = entries(path).get(part) if path else None
            if path and path.is_file():
                return path
        return None

    return find


# Tables


class _Table(NamedTuple):
    """A data set's table.

    ``rows``: columns image, mos, and reference, split, distortion as far as it has them; all but mos are text.
    ``scale``: low and high; None: the least and the greatest score. ``folders``: where the images are. ``pristine``: where the
    references are. ``lower``: small scores are good.
    """

    rows: pd.DataFrame
    scale: tuple[float, float] | None
    folders: list[Path]
    pristine: list[Path]
    lower: bool = False
    resize: tuple[int, int] | None = None


def _rated(table: _Table, find: Find, lower_better: bool | None) -> RatedImages:
    rows = table.rows
    numbers = pd.to_numeric(rows["mos"], errors="coerce").to_numpy(np.float64)
    _refuse(~np.isfinite(numbers), "scores that are no finite numbers")
    optional: dict[str, list[str] | None] = dict.fromkeys(OPTIONAL)
    for name in optional:
        if name in rows:
            values = rows[name].str.strip()
            _refuse((values == "").to_numpy(), f"nothing in the column {name}")
            optional[name] = values.tolist()
    if optional["split"] is not None:
        optional["split"] = [WORDS.get(word.lower(), word.lower()) for word in optional["split"]]
        _refuse(~np.isin(optional["split"], PARTS), f"a split that is none of {', '.join(PARTS)}")
    names = rows["image"].str.strip().tolist()
    files = [find(table.folders, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        where = " or ".join(map(str, table.folders))
        raise ValueError(f"images that are not in {where}: {listed(missing)}")
    found = [file for file in files if file is not None]
    _refuse(pd.Series(map(str, found)).duplicated(keep=False).to_numpy(), "an image that is there more than once")
    scale = ScoreScale.of(numbers, *(table.scale or ()))
    low, high = scale.low, scale.high
    if table.lower if lower_better is None else lower_better:
        numbers = low + high - numbers
    references = optional["reference"]
    return RatedImages(
        names,
        numbers,
        references,
        optional["split"],
        low,
        high,
        partial(_open_file, found),
        optional["distortion"],
        None if references is None else _pristine(sorted(set(references)), table.pristine, find),
        table.resize,
    )


def _pristine(references: Sequence[str], folders: Sequence[Path], find: Find) -> dict[str, str] | None:
    """Files of all references, or None."""
    found = {
        name: find(folders, name) or find(folders, f"{name}.png") or find(folders, f"{name}.bmp") for name in references
    }
    files = {name: str(file) for name, file in found.items() if file is not None}
    return files if len(files) == len(found) else None


def _refuse(bad: np.ndarray, what: str) -> None:
    rows = (np.flatnonzero(bad) + 1).tolist()
    if rows:
        raise ValueError(f"{what}: {'row' if len(rows) == 1 else 'rows'} {listed(rows)} (the header not counted)")


def _renamed(table: pd.DataFrame, columns: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The columns that are wanted, by our names; each may have several names of its own, in whatever case.

    Any of ``OPTIONAL`` may be missing.
    """
    has = {str(name).strip().lower(): name for name in table.columns}
    chosen = {}
    for ours, theirs in columns.items():
        own = next((has[name] for name in theirs if name in has), None)
        if own is not None:
            chosen[ours] = table[own]
        elif ours not in OPTIONAL:
            raise ValueError(f"no column {' or '.join(theirs)}; it has {', '.join(map(str, table.columns)) or 'none'}")
    return pd.DataFrame(chosen)


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)


def _csv(path: Path, labels: Path) -> _Table:
    rows = _renamed(_read_csv(labels), {name: (name,) for name in ("image", "mos", *OPTIONAL)})
    return _Table(rows, None, [labels.parent], [labels.parent])


# Released data sets: a function of the folder and its label file


def _live(path: Path, labels: Path) -> _Table:
    counts = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}
    origins = _mat(path / "refnames_all.mat", "refnames_all")
    rows = pd.DataFrame(
        {
            "image": [f"{kind}/img{i}.bmp" for kind, count in counts.items() for i in range(1, count + 1)],
            "mos": _mat(labels, "dmos_new"),
            "reference": [str(name) for name in origins],
            "distortion": np.repeat(list(counts), list(counts.values())),
        }
    )
    rows = rows[_mat(labels, "orgs") == 0]  # the others are copies of the pristine images
    return _Table(rows, (0, 100), [path], [path / "refimgs"], lower=True)


def _csiq(path: Path, labels: Path) -> _Table:
    sheet = pd.read_excel(labels, sheet_name="all_by_image", header=None, dtype=str, keep_default_na=False)
    start = next((i for i, row in enumerate(sheet.to_numpy().tolist()) if {"image", "dmos"} <= set(row)), None)
    if start is None:
        raise ValueError("the sheet all_by_image has no row with the words image and dmos above its columns")
    sheet = sheet[start + 1 :].set_axis(sheet.iloc[start], axis=1)
    rows = _renamed(sheet, {"reference": ("image",), "mos": ("dmos",), "kind": ("dst_type",), "level": ("dst_lev",)})
    rows = rows[rows["reference"] != ""]
    folders = {"noise": "awgn", "jpeg 2000": "jpeg2000"}  # the others have the kind's own name
    rows["distortion"] = rows["kind"].str.strip().str.lower().replace(folders)
    rows["image"] = (
        rows["distortion"] + "/" + rows["reference"] + "." + rows["distortion"] + "." + rows["level"] + ".png"
    )
    return _Table(rows, (0, 1), [path / "dst_imgs"], [path / "src_imgs"], lower=True)


def _tid2013(path: Path, labels: Path) -> _Table:
    rows = pd.read_csv(labels, sep=r"\s+", header=None, names=["mos", "image"], dtype=str, keep_default_na=False)
    return _Table(_coded(rows), (0, 9), [path / "distorted_images"], [path / "reference_images"])


def _kadid(path: Path, labels: Path) -> _Table:
    rows = _renamed(_read_csv(labels), {"image": ("dist_img",), "mos": ("dmos",)})
    return _Table(_coded(rows), (1, 5), [path / "images"], [path / "images"])


def _coded(rows: pd.DataFrame) -> pd.DataFrame:
    """With reference and kind of distortion from the names: I01_08_3.png."""
    parts = rows["image"].str.upper().str.extract(r"^(I\d+)_0*(\d+)_\d+\.\w+$")
    _refuse(parts.isna().any(axis=1).to_numpy(), "names that are not as I01_08_3.bmp")
    return rows.assign(reference=parts[0], distortion=parts[1])


def _livec(path: Path, labels: Path) -> _Table:
    names = [str(name) for name in _mat(path / "Data" / "AllImages_release.mat", "AllImages_release")]
    rows = pd.DataFrame({"image": names, "mos": _mat(labels, "AllMOS_release")})[7:]
    return _Table(rows, (0, 100), [path / "Images"], [])


def _koniq(path: Path, labels: Path) -> _Table:
    rows = _renamed(_read_csv(labels), {"image": ("image_name",), "mos": ("mos_zscore", "mos"), "split": ("set",)})
    return _Table(rows, (1, 100), [path / "1024x768", path / "512x384"], [], resize=(384, 512))


def _livefb(path: Path, labels: Path) -> _Table:
    rows = _renamed(_read_csv(labels), {"image": ("name_image", "name"), "mos": ("mos_image", "mos")})
    return _Table(rows, (0, 100), [path, path / "database"], [])


def _spaq(path: Path, labels: Path) -> _Table:
    rows = _renamed(
        pd.read_excel(labels, dtype=str, keep_default_na=False), {"image": ("image name",), "mos": ("mos",)}
    )
    return _Table(rows, (0, 100), [path / "TestImage"], [])


def _mat(path: Path, name: str) -> np.ndarray:
    """A variable of a MATLAB file as one row; cells of text are unpacked."""
    variables = scipy.io.loadmat(path)
    if name not in variables:
        raise ValueError(f"{path.name} has no variable {name}")
    values = variables[name].ravel()
    return np.array([cell.ravel()[0] for cell in values]) if values.dtype == object else values


LAYOUTS: dict[str, Callable[[Path, Path], _Table]] = {
    "dmos_realigned.mat": _live,
    "csiq.DMOS.xlsx": _csiq,
    "mos_with_names.txt": _tid2013,
    "dmos.csv": _kadid,
    "Data/AllMOS_release.mat": _livec,
    "koniq10k_scores_and_distributions.csv": _koniq,
    "koniq10k_distributions_sets.csv": _koniq,
    "labels_image.csv": _livefb,
    "Annotations/MOS and Image attribute scores.xlsx": _spaq,
}
