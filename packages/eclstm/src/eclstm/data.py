"""Sensor histories of machines that run to failure: reading, labelling, choosing features, cutting segments.

Three sources give the same :class:`RunToFailure` table: NASA's C-MAPSS text files, any CSV / Parquet / DataFrame with a
unit and a time column, and a simulated fleet that needs no file.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from torch.utils.data import Dataset


def piecewise_rul(
    times: NDArray[np.floating], remaining: float = 0.0, cap: float | None = 120.0, last_label: float = 0.0
) -> NDArray[np.float64]:
    """Remaining useful life at each row of one unit: min(cap, time left).

    Args:
        times: (rows,) ascending times of one unit, in cycles (or hours: the unit of the result).
        remaining: life left after the last row; 0 if the unit was watched until it failed.
        cap: largest label, > 0; None for the raw value. Authors' code: 120; 125 and 130 are common, and not comparable.
        last_label: label of the failure itself. Authors' code: 0; rul-datasets counts from 1.

    Raises:
        ValueError: if cap <= 0.

    >>> piecewise_rul(np.arange(1.0, 6.0), cap=3)
    array([3., 3., 2., 1., 0.])
    """
    if cap is not None and cap <= 0:
        raise ValueError(f"cap must be a positive number of cycles, got {cap}")
    left = times[-1] - np.asarray(times, np.float64) + remaining + last_label
    return left if cap is None else np.minimum(left, cap)


class RunToFailure:
    """Histories of several units in one long table, sorted by unit and time.

    Args:
        table: a DataFrame, or the path of a CSV (or .csv.gz) or Parquet file, with a row for each unit and time.
        unit: column that names the unit.
        time: column with the time of the row, in cycles or any unit of time; the labels get this unit.
        features: numeric columns to read; None: all others.
        rul: column with the time left at each row, for units that had not failed when last seen; None: they all failed.
        name: how messages call the table.

    Attributes:
        units: unit names in order. columns: feature names. values: (rows, columns) float64. times: (rows,).
        starts: (units + 1,) first row of each unit, then the number of rows. remaining: (units,) life left after the last row.

    Raises:
        ValueError: for a missing, non-numeric, NaN or infinite entry (with its unit, time and column), or repeated times.

    Example:
        >>> table = pd.DataFrame({"unit": [7, 7, 3], "cycle": [2, 1, 1], "oil": [0.5, 0.1, 0.4]})
        >>> fleet = RunToFailure(table)
        >>> fleet.units, fleet.values[:, 0].tolist()
        ([3, 7], [0.4, 0.1, 0.5])
    """

    def __init__(
        self,
        table: pd.DataFrame | str | Path,
        unit: str = "unit",
        time: str = "cycle",
        features: Sequence[str] | None = None,
        rul: str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or (str(table) if isinstance(table, str | Path) else "table")
        frame = table if isinstance(table, pd.DataFrame) else _read_table(Path(table))
        self.columns = [c for c in frame.columns if c not in (unit, time, rul)] if features is None else list(features)
        for column in (unit, time, *([rul] if rul else []), *self.columns):
            if column not in frame.columns:
                raise ValueError(
                    f"{self.name}: column {column!r} is missing; it has {', '.join(map(str, frame.columns))}"
                )
        if frame.empty:
            raise ValueError(f"{self.name}: the table has no rows")
        if not self.columns:
            raise ValueError(f"{self.name}: no feature columns beside {unit!r} and {time!r}")
        of_unit, _ = pd.factorize(frame[unit], sort=True)
        unnamed = np.flatnonzero(of_unit < 0)
        if len(unnamed):
            at = frame[time].iloc[unnamed[0]]
            raise ValueError(
                f"{self.name}: column {unit!r} is empty at {time} {at} ({len(unnamed)} such rows); every row needs its unit"
            )
        frame = frame.iloc[np.lexsort((self._numeric(frame, time, unit, time), of_unit))]
        numbers = {
            column: self._numeric(frame, column, unit, time)
            for column in [time, *self.columns, *([rul] if rul else [])]
        }
        self.values = np.stack([numbers[column] for column in self.columns], 1)
        self.times = numbers[time]
        names = frame[unit].to_numpy()
        first = np.flatnonzero(np.r_[True, names[1:] != names[:-1]])
        self.units = names[first].tolist()
        self.starts = np.r_[first, len(names)]
        repeated = np.flatnonzero((names[1:] == names[:-1]) & (np.diff(self.times) == 0))
        if len(repeated):
            at = repeated[0]
            raise ValueError(
                f"{self.name}: unit {names[at]} has {time} {self.times[at]:g} twice; times must differ within a unit"
            )
        self.remaining = np.zeros(len(self.units)) if rul is None else numbers[rul][self.starts[1:] - 1]

    def _numeric(self, frame: pd.DataFrame, column: str, unit: str, time: str) -> NDArray[np.float64]:
        if pd.api.types.is_datetime64_any_dtype(frame[column]):
            raise ValueError(f"{self.name}: column {column!r} holds dates; give numbers, such as hours since the first")
        numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64)
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            of_unit, at, found = (frame[name].iloc[bad[0]] for name in (unit, time, column))
            raise ValueError(
                f"{self.name}: unit {of_unit}, {time} {at}, column {column!r}: {found} is not a finite number "
                f"({len(bad)} such rows); drop or fill them, or leave the column out"
            )
        return numbers

    def __len__(self) -> int:
        return len(self.units)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(units,) rows of each unit."""
        return np.diff(self.starts)

    def rows(self, columns: Sequence[str]) -> NDArray[np.float32]:
        """(rows, columns) values of some of the columns, in the order given."""
        for column in columns:
            if column not in self.columns:
                raise ValueError(f"{self.name}: column {column!r}, which the model reads, is missing")
        return self.values[:, [self.columns.index(column) for column in columns]].astype(np.float32)

    def select(self, units: Sequence[int] | NDArray[np.int64], rows: Sequence[int] | None = None) -> RunToFailure:
        """The units at the given positions, each cut after its first ``rows`` rows (what is cut off counts as life left)."""
        part = object.__new__(RunToFailure)
        part.name, part.columns = self.name, self.columns
        units = np.asarray(units, np.int64)
        lengths = self.lengths[units] if rows is None else np.asarray(rows, np.int64)
        index = np.concatenate(
            [np.arange(self.starts[u], self.starts[u] + n) for u, n in zip(units, lengths, strict=True)]
        )
        part.units = [self.units[u] for u in units]
        part.values, part.times = self.values[index], self.times[index]
        part.starts = np.r_[0, np.cumsum(lengths)]
        cut_off = self.times[self.starts[units + 1] - 1] - part.times[part.starts[1:] - 1]
        part.remaining = self.remaining[units] + cut_off
        return part

    def split(self, share: float, seed: int) -> tuple[RunToFailure, RunToFailure]:
        """Two tables of whole units, the second with ``share`` of them (at least one): no unit is on both sides."""
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(
                f"{self.name}: cannot split {len(self)} units at a share of {share}: need 2 units and 0 < share < 1"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = min(max(1, round(share * len(self))), len(self) - 1)
        return self.select(np.sort(order[held_out:])), self.select(np.sort(order[:held_out]))

    def labels(self, cap: float | None = 120.0, last_label: float = 0.0) -> NDArray[np.float64]:
        """(rows,) piecewise remaining life of every row (:func:`piecewise_rul`)."""
        spans = zip(self.starts, self.starts[1:], self.remaining, strict=False)
        return np.concatenate([piecewise_rul(self.times[a:b], left, cap, last_label) for a, b, left in spans])


def _read_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a CSV or Parquet table")
    if path.suffix == ".parquet":
        try:
            return pd.read_parquet(path)
        except ImportError:
            raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install 'eclstm[parquet]'") from None
    try:
        return pd.read_csv(path)
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        raise ValueError(f"{path}: not a readable CSV table: {error}") from None


def select_features(table: RunToFailure, cap: float | None = 120.0, significance: float = 0.05) -> list[str]:
    """Columns that depend on the remaining life in the training table (authors' feature selection).

    Constant columns go; then those whose dependence on the capped label has p > ``significance``, without correction for
    the number of tests: Kendall's tau (asymptotic p) for columns of more than two values, a two-sample
    Kolmogorov-Smirnov test of the label split by value for those of two.

    Args:
        cap: of the labels, in their unit; None: none. significance: largest p of a column that stays, 0 to 1.

    Raises:
        ValueError: if none is left.

    Example:
        >>> frame = pd.DataFrame({"unit": 1, "cycle": range(40), "wear": np.arange(40) ** 2, "setting": 7.0})
        >>> select_features(RunToFailure(frame))
        ['wear']
    """
    labels = table.labels(cap)
    kept = []
    for column, x in zip(table.columns, table.values.T, strict=True):
        values = np.unique(x)
        if len(values) == 1:
            continue
        if len(values) == 2:
            p = stats.ks_2samp(labels[x == values[0]], labels[x == values[1]]).pvalue
        else:
            p = stats.kendalltau(x, labels, method="asymptotic").pvalue
        if p <= significance:
            kept.append(column)
    if not kept:
        raise ValueError(
            f"{table.name}: no column depends on the remaining life (p > {significance} or constant in all of them)"
        )
    return kept


class Segments(Dataset[dict[str, Tensor]]):
    """Segments of consecutive rows of one unit with the label of their last row; overlap is indexed, not stored.

    Args:
        table: the histories. columns: those of it to read, in order.
        rows: length of a segment.
        labels: (table rows,) label of each row.
        last_only: only the last segment of each unit (how C-MAPSS test sets are scored). Units shorter than ``rows`` are then
            padded in front with copies of their first row; otherwise they give no segment.

    Raises:
        ValueError: if no unit is long enough.

    Items are ``{"segments": (rows, columns) float32, "labels": () float32}``; a list of indices gives a whole batch.

    Example:
        >>> fleet = RunToFailure(pd.DataFrame({"unit": 1, "cycle": range(5), "oil": [0.1, 0.2, 0.4, 0.5, 0.9]}))
        >>> segments = Segments(fleet, ["oil"], rows=3, labels=fleet.labels(cap=120))
        >>> len(segments), segments[0]["segments"].flatten(), segments[0]["labels"]
        (3, tensor([0.1000, 0.2000, 0.4000]), tensor(2.))
    """

    def __init__(
        self,
        table: RunToFailure,
        columns: Sequence[str],
        rows: int,
        labels: NDArray[np.float64],
        last_only: bool = False,
    ) -> None:
        self.values = torch.from_numpy(table.rows(columns))
        self.labels = torch.from_numpy(labels.astype(np.float32))
        first, last = torch.from_numpy(table.starts[:-1]), torch.from_numpy(table.starts[1:] - 1)
        if last_only:
            self.first, self.last = first, last
        else:
            long_enough = [(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True) if b - a + 1 >= rows]
            if not long_enough:
                raise ValueError(
                    f"{table.name}: segments of {rows} rows, but units have {table.lengths.min()} to {table.lengths.max()}: "
                    "shorten sequence_length or window_size"
                )
            self.first = torch.cat([torch.full((b - a + 2 - rows,), a) for a, b in long_enough])
            self.last = torch.cat([torch.arange(a + rows - 1, b + 1) for a, b in long_enough])
        self.offsets = torch.arange(1 - rows, 1)

    def __len__(self) -> int:
        return len(self.last)

    def thin(self, every: int) -> Segments:
        """Every n-th segment only."""
        part = copy.copy(self)
        part.first, part.last = self.first[::every], self.last[::every]
        return part

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        index = torch.as_tensor(indices)
        last = self.last[index]
        rows = torch.maximum(last[:, None] + self.offsets, self.first[index, None])
        return {"segments": self.values[rows], "labels": self.labels[last]}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def arrays(self) -> tuple[Float[np.ndarray, "n columns rows"], Float[np.ndarray, " n"]]:
        """Everything materialised as (segments, columns, rows) and (segments,), the layout of tsai and sktime."""
        batch = self.__getitems__(range(len(self)))
        return batch["segments"].transpose(1, 2).numpy(), batch["labels"].numpy()
