"""NASA's C-MAPSS turbofan sets, read as they are published."""

from __future__ import annotations

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from eclstm.data import RunToFailure

SETTINGS = [f"setting_{i}" for i in range(1, 4)]
SENSORS = [f"sensor_{i}" for i in range(1, 22)]
SUBSETS = ("FD001", "FD002", "FD003", "FD004")
LARGEST = 2**28  # bytes that a member of an archive may unpack to; NASA's have up to 10 million


class CMAPSS:
    """One of NASA's four C-MAPSS turbofan sets (Saxena et al., PHM 2008).

    Args:
        root: folder, zip or tar archive that holds ``train_FD001.txt``, ``test_FD001.txt``, ``RUL_FD001.txt`` and so on.
        subset: ``"FD001"`` to ``"FD004"``.

    Attributes:
        train: engines that run to failure. test: engines cut off earlier, with their true (uncapped) remaining life.

    Raises:
        FileNotFoundError: if a file is missing. ValueError: if it has not 26 columns, or RUL and test disagree in number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # NASA's files in miniature: one engine, one cycle
        ...     for name, text in (("train", "1 1" + 24 * " 0.5"), ("test", "1 1" + 24 * " 0.5"), ("RUL", "112")):
        ...         _ = Path(folder, f"{name}_FD001.txt").write_text(text)
        ...     turbofans = CMAPSS(folder, "FD001")
        >>> turbofans.train.columns[2:4], turbofans.test.remaining
        (['setting_3', 'sensor_1'], array([112.]))
    """

    def __init__(self, root: str | Path, subset: str = "FD001") -> None:
        if subset not in SUBSETS:
            raise ValueError(f"subset {subset!r} is unknown: choose from {', '.join(SUBSETS)}")
        wanted = [f"train_{subset}.txt", f"test_{subset}.txt", f"RUL_{subset}.txt"]
        try:
            texts = _read_members(Path(root), wanted)
        # An encrypted member is a RuntimeError.
        except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{root}: damaged archive: {error}") from None
        columns = ["unit", "cycle", *SETTINGS, *SENSORS]
        frames = [self._frame(name, texts[name], columns) for name in wanted[:2]]
        self.train, self.test = (RunToFailure(frame, name=name) for frame, name in zip(frames, wanted, strict=False))
        rul = pd.to_numeric(self._frame(wanted[2], texts[wanted[2]], ["rul"])["rul"], errors="coerce").to_numpy(
            np.float64
        )
        if not np.isfinite(rul).all():
            raise ValueError(f"{wanted[2]}, row {np.flatnonzero(~np.isfinite(rul))[0] + 1}: not a finite number")
        if len(rul) != len(self.test):
            raise ValueError(
                f"{wanted[2]} has {len(rul)} rows and {wanted[1]} has {len(self.test)} units: they must be equal"
            )
        self.test.remaining = rul

    @staticmethod
    def _frame(name: str, text: bytes, columns: list[str]) -> pd.DataFrame:
        try:
            frame = pd.read_csv(io.BytesIO(text), sep=r"\s+", header=None)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: not a C-MAPSS text file: {error}") from None
        if frame.shape[1] != len(columns):
            raise ValueError(f"{name}: {frame.shape[1]} columns where C-MAPSS has {len(columns)}")
        return frame.set_axis(columns, axis=1)


def _read_members(root: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The named files of a folder or archive, wherever they lie in it; nothing is unpacked."""
    found: dict[str, bytes] = {}
    if root.is_dir():
        found = {name: path.read_bytes() for name in wanted for path in sorted(root.rglob(name))[:1]}
        archives = sorted(
            p for p in root.iterdir() if zipfile.is_zipfile(p) or p.name.endswith((".tar.xz", ".tar.gz", ".tgz"))
        )
        if not found and archives:
            return _read_members(archives[0], wanted)
    elif not root.exists():
        raise FileNotFoundError(f"{root}: no such folder or archive; expected one that holds {', '.join(wanted)}")
    elif zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as bundle:
            for info in bundle.infolist():
                if Path(info.filename).name in wanted:
                    _check_size(root, info.filename, info.file_size)
                    found[Path(info.filename).name] = bundle.read(info)
    elif tarfile.is_tarfile(root):
        with tarfile.open(root) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isreg() and Path(member.name).name in wanted else None
                if stream is not None:
                    _check_size(root, member.name, member.size)
                    found[Path(member.name).name] = stream.read()
    else:
        raise ValueError(f"{root}: neither a folder nor a zip or tar archive")
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FileNotFoundError(f"{root}: {', '.join(missing)} not found; expected NASA's C-MAPSS text files")
    return found


def _check_size(root: Path, member: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{root}: {member} unpacks to {size:,} bytes, too many for a C-MAPSS file")
