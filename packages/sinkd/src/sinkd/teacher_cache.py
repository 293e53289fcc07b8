"""Teacher logits on disk, computed once and read row by row while students train."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from papercore.lab.files import write_json
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ROWS, OFFSETS, META = "rows.npy", "offsets.npy", "meta.json"


class TeacherCache:
    """The logits of one teacher on one data set, memory-mapped: only the rows asked for are read.

    A folder of ``rows.npy`` (a record for each row), ``meta.json`` and, where an example has several rows (the answer tokens
    of a language model), ``offsets.npy``. Nothing in it is pickled. :meth:`write` makes one, :meth:`open` reads it.

    With ``topk`` a row keeps its k largest entries, as log-probabilities, and the logsumexp of the others. It is read back as
    log-probabilities in which the others share their mass equally: softmax gives the kept probabilities to rounding of
    ``dtype``. At a temperature tau > 1 the others then get somewhat more than the teacher gave them, at tau < 1 less. Without
    ``topk`` the logits come back as they were, rounded to ``dtype``.

    Attributes:
        classes: C, columns of a row. topk: kept entries, or None. dtype: of what is stored. fingerprint: of what it is for.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "cache"
        >>> logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> cache = TeacherCache.write(folder, [logits[:2], logits[2:]], classes=2, total=3, fingerprint="sst2 bert")
        >>> cache.logits([2, 0])
        tensor([[5., 6.],
                [1., 2.]])
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], rows: NDArray[Any], offsets: NDArray[np.int64] | None
    ) -> None:
        self.folder, self._rows, self._offsets = folder, rows, offsets
        self.classes: int = meta["classes"]
        self.topk: int | None = meta["topk"]
        self.dtype: str = meta["dtype"]
        self.fingerprint: str = meta["fingerprint"]

    def __len__(self) -> int:
        """Examples."""
        return len(self._rows) if self._offsets is None else len(self._offsets) - 1

    @classmethod
    def write(
        cls,
        folder: str | Path,
        rows: Iterable[Float[Tensor, "_ classes"]],
        *,
        classes: int,
        total: int,
        dtype: str = "float16",
        topk: int | None = None,
        fingerprint: str,
        row_counts: Sequence[int] | None = None,
        start: int = 0,
    ) -> TeacherCache:
        """Write the logits as they come; the folder appears when it is complete.

        What an interrupted call has written stays beside the folder, in ``.NAME.partial``. To go on, ask :meth:`written` how
        many examples there are, and pass it as ``start`` with the rows from there on.

        Args:
            folder: a new one, or empty.
            rows: logits (n, C) of consecutive rows, any n, device and float dtype.
            classes: C. total: rows in all, the sum of ``row_counts`` if given.
            dtype: float16, bfloat16 or float32 on disk. topk: entries to keep of each row, 1 to C - 1; None: all.
            fingerprint: names the data, tokenizer and model; :meth:`open` refuses another one.
            row_counts: rows of each example; None: one each.
            start: examples that are written already.

        Raises:
            ValueError: for a used folder, rows of another width or in another number, NaN or +inf, values beyond ``dtype``, or a
                ``start`` that does not go on from what is there.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown: choose from {', '.join(DTYPES)}")
        if topk is not None and not 1 <= topk < classes:
            raise ValueError(f"topk must be 1 to classes - 1 = {classes - 1}, got {topk}; leave it out to keep all")
        if row_counts is not None and sum(row_counts) != total:
            raise ValueError(f"total is {total}, row_counts sum to {sum(row_counts)}: they must be equal")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder}: not empty; delete it or name another folder")
        partial = _partial(folder)
        meta = {"classes": classes, "rows": total, "topk": topk, "dtype": dtype, "fingerprint": fingerprint}
        record = _record(classes, topk, dtype)
        if start == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / ROWS).open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (total,)}
                np.lib.format.write_array_header_2_0(file, header)
            if row_counts is not None:
                np.save(partial / OFFSETS, np.r_[0, np.cumsum(np.asarray(row_counts, np.int64))])
            write_json(partial / META, meta)
        elif not (partial / META).exists() or json.loads((partial / META).read_text()) != meta:
            raise ValueError(f"{folder}: start {start}, but nothing was written of this data and form; begin at 0")
        elif not 0 <= start <= cls.written(folder, fingerprint):
            raise ValueError(f"{folder}: start {start}, but {cls.written(folder, fingerprint)} examples are written")
        done = start if row_counts is None else sum(row_counts[:start])
        with (partial / ROWS).open("r+b") as file:
            file.truncate(_header_size(file) + done * record.itemsize)
            file.seek(0, os.SEEK_END)
            for block in rows:
                if block.ndim != 2 or block.shape[1] != classes:
                    raise ValueError(f"rows {done} on have shape {tuple(block.shape)}, expected (n, {classes})")
                if done + len(block) > total:
                    raise ValueError(f"{folder}: more rows than total {total}")
                file.write(_pack(block, record, topk, dtype, done).tobytes())
                done += len(block)
            if done < total:
                raise ValueError(f"{folder}: {done} rows came, total is {total}; what there is can be continued")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder)
        return cls.open(folder, fingerprint)

    @staticmethod
    def written(folder: str | Path, fingerprint: str) -> int:
        """Whole examples that an interrupted :meth:`write` of this fingerprint has left; 0 if there is none."""
        partial = _partial(Path(folder))
        if not (partial / META).exists():
            return 0
        meta = json.loads((partial / META).read_text())
        if meta["fingerprint"] != fingerprint:
            return 0
        with (partial / ROWS).open("rb") as file:
            size = (partial / ROWS).stat().st_size - _header_size(file)
        rows = size // _record(meta["classes"], meta["topk"], meta["dtype"]).itemsize
        if not (partial / OFFSETS).exists():
            return rows
        return int(np.searchsorted(np.load(partial / OFFSETS, allow_pickle=False), rows, side="right")) - 1

    @classmethod
    def open(cls, folder: str | Path, fingerprint: str | None = None) -> TeacherCache:
        """Open what :meth:`write` made.

        Raises:
            FileNotFoundError: if there is no cache. ValueError: if it is damaged, or was made for another ``fingerprint``.
        """
        folder = Path(folder)
        if not (folder / META).exists():
            raise FileNotFoundError(f"{folder}: no teacher cache (no {META})")
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            record = _record(meta["classes"], meta["topk"], meta["dtype"])
            rows = np.load(folder / ROWS, mmap_mode="r", allow_pickle=False)
            offsets = np.load(folder / OFFSETS, allow_pickle=False) if (folder / OFFSETS).exists() else None
            if rows.shape != (meta["rows"],) or rows.dtype != record:
                raise ValueError(
                    f"{ROWS} holds {rows.shape} rows of {rows.dtype}, {META} says {meta['rows']} of {record}"
                )
            if offsets is not None and offsets[-1] != len(rows):
                raise ValueError(f"{OFFSETS} ends at {offsets[-1]}, there are {len(rows)} rows")
        except (ValueError, KeyError, EOFError, TypeError) as error:
            raise ValueError(f"{folder}: damaged teacher cache, write it anew: {error}") from None
        if fingerprint is not None and fingerprint != meta["fingerprint"]:
            raise ValueError(
                f"{folder}: made for {meta['fingerprint']!r}, asked for {fingerprint!r}: other data, tokenizer or teacher; "
                "write a cache for these"
            )
        return cls(folder, meta, rows, offsets)

    def logits(self, indices: int | Sequence[int] | Tensor) -> Float[Tensor, "n classes"]:
        """All rows of these examples, one after the other: (n, C) float32; with one row an example, n = len(indices).

        Raises:
            IndexError: for an index outside 0 to len - 1.
        """
        index = np.atleast_1d(np.asarray(indices, np.int64))
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(
                f"{self.folder}: indices {index.min()} to {index.max()}, but there are {len(self)} examples"
            )
        if self._offsets is not None:
            spans = [np.arange(self._offsets[i], self._offsets[i + 1]) for i in index]
            index = np.concatenate([np.zeros(0, np.int64), *spans])
        picked = self._rows[index]
        values = torch.from_numpy(np.ascontiguousarray(picked["logits"])).view(DTYPES[self.dtype]).float()
        if self.topk is None:
            return values
        rest = torch.from_numpy(picked["rest"].copy()) - float(np.log(self.classes - self.topk))
        columns = torch.from_numpy(picked["columns"].astype(np.int64))
        return rest[:, None].expand(-1, self.classes).scatter(1, columns, values)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _record(classes: int, topk: int | None, dtype: str) -> np.dtype[Any]:
    """What a row is on disk; bfloat16, which numpy lacks, as the bits of an integer."""
    number = {"float16": "<f2", "bfloat16": "<i2", "float32": "<f4"}[dtype]
    if topk is None:
        return np.dtype([("logits", number, (classes,))])
    return np.dtype([("logits", number, (topk,)), ("columns", "<i4", (topk,)), ("rest", "<f4")])


def _header_size(file: BinaryIO) -> int:
    file.seek(0)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_2_0(file)
    return file.tell()


def _pack(
    block: Float[Tensor, "n classes"], record: np.dtype[Any], topk: int | None, dtype: str, at: int
) -> NDArray[Any]:
    logits = block.detach().to("cpu", torch.float32)
    bad = (logits.isnan() | (logits == torch.inf)).any(1) | (logits == -torch.inf).all(1)
    if bad.any():
        raise ValueError(f"teacher logits of row {at + int(bad.nonzero()[0])} are NaN, +inf, or all -inf")
    packed = np.zeros(len(logits), record)
    if topk is not None:
        log_probabilities = logits.log_softmax(1)
        logits, columns = log_probabilities.topk(topk)
        packed["columns"] = columns.numpy()
        packed["rest"] = log_probabilities.scatter(1, columns, -torch.inf).logsumexp(1).numpy()
    stored = logits.to(DTYPES[dtype])
    if (stored == torch.inf).any():
        raise ValueError(f"teacher logits up to {float(logits.max()):g} do not fit {dtype}: choose bfloat16 or float32")
    packed["logits"] = (stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy()
    return packed
