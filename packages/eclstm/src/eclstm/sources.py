"""Where histories come from: NASA's files, a table, or a simulated fleet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from papercore.lab.cli import flag

from eclstm.cmapss import CMAPSS
from eclstm.data import RunToFailure
from eclstm.simulated import simulate


@dataclass
class DataOptions:
    """Where the histories come from and how they are labelled."""

    data: str = flag(
        "simulated; cmapss (in $PAPERCORE_DATA/eclstm); a C-MAPSS folder or archive; or a CSV / Parquet table",
        "simulated",
    )
    subset: str = flag("C-MAPSS: FD001 to FD004", "FD001")
    test_data: str | None = flag(
        "table to test on; without it a fifth of the units is held out, each cut at a random time", None
    )
    unit: str = flag("table: column that names the unit", "unit")
    time: str = flag("table: column of the time; predictions get its unit", "cycle")
    features: list[str] | None = flag("table: columns to read; all others if not given", None)
    rul: str | None = flag("table: column of the life left, if units had not failed when last seen", None)
    cap: float | None = flag("largest label, in units of time (authors' code: 120)", 120.0)

    @property
    def name(self) -> str:
        """A short name of the data, for folders and titles."""
        if self.is_cmapss:
            return self.subset
        return Path(self.data).name.split(".")[0] or "data"

    @property
    def is_cmapss(self) -> bool:
        """Whether ``data`` names C-MAPSS files, not a table."""
        path = Path(self.data)
        return self.data == "cmapss" or path.is_dir() or path.name.endswith((".zip", ".tar", ".xz", ".tgz", ".tar.gz"))


TEST_SHARE = 0.2


def load(options: DataOptions, seed: int) -> tuple[RunToFailure, RunToFailure]:
    """Training and test histories.

    Raises:
        ValueError, FileNotFoundError: as the readers do; and for ``--data cmapss`` without ``PAPERCORE_DATA``.
    """
    if options.cap is not None and options.cap <= 0:
        raise ValueError(f"cap must be a positive number of cycles, got {options.cap}")
    if options.data == "simulated":
        return simulate(20, seed=0), simulate(40, seed=1, cut=True)
    if options.is_cmapss:
        root = Path(options.data)
        if options.data == "cmapss":
            if "PAPERCORE_DATA" not in os.environ:
                raise ValueError(
                    "--data cmapss reads $PAPERCORE_DATA/eclstm: set PAPERCORE_DATA, or give the folder or archive itself"
                )
            root = Path(os.environ["PAPERCORE_DATA"]) / "eclstm"
        sets = CMAPSS(root, options.subset)
        return sets.train, sets.test
    table = RunToFailure(options.data, options.unit, options.time, options.features, options.rul)
    if options.test_data is not None:
        return table, RunToFailure(options.test_data, options.unit, options.time, table.columns, options.rul)
    kept, held_out = table.split(TEST_SHARE, seed)
    rng = np.random.default_rng([seed, 2])
    return kept, held_out.select(range(len(held_out)), [int(rng.integers(n // 5 + 1, n + 1)) for n in held_out.lengths])
