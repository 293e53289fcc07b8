"""The verb ``predict``: a table of sensor histories in, the remaining life of each unit out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from papercore.lab.cli import flag
from papercore.lab.files import write_text
from papercore.lab.report import console, print_table

from eclstm.data import RunToFailure, Segments
from eclstm.evaluate import load_model, predict_segments
from eclstm.model import ECLSTMRegressor
from eclstm.plots import plot_life


@dataclass
class PredictOptions:
    """What to predict."""

    table: str = flag("CSV or Parquet file with a row for each unit and time", positional=True)
    model: str = flag("folder that `eclstm train` wrote, or a Hub name")
    output: str | None = flag("CSV to write; beside the table, named TABLE.rul.csv, if not given", None)
    unit: str = flag("column that names the unit", "unit")
    time: str = flag("column of the time", "cycle")
    plots: str | None = flag("folder for a picture of each unit's predictions over its life", None)


def remaining_life(model: ECLSTMRegressor, table: RunToFailure) -> pd.DataFrame:
    """One row for each unit: its name, the time of its last row, the predicted life left (in the unit of the
    labels), and whether it was padded.

    A unit with fewer rows than the model reads is padded in front with copies of its first row.

    Example:
        >>> model = ECLSTMRegressor(["oil"])  # random weights; load_model reads what `eclstm train` wrote
        >>> frame = pd.DataFrame({"unit": [1] * 30 + [2] * 5, "cycle": range(35), "oil": np.linspace(0, 1, 35)})
        >>> life = remaining_life(model, RunToFailure(frame))
        >>> life[["unit", "time", "padded"]].values.tolist()
        [[1, 29.0, False], [2, 34.0, True]]
    """
    segments = Segments(table, model.columns, model.rows, np.zeros(len(table.values)), last_only=True)
    return pd.DataFrame(
        {
            "unit": table.units,
            "time": table.times[table.starts[1:] - 1],
            "rul": predict_segments(model, segments),
            "padded": table.lengths < model.rows,
        }
    )


def predict(options: PredictOptions) -> pd.DataFrame:
    """The verb: writes a CSV, shows its first lines, and draws each unit on request."""
    model = load_model(options.model)
    table = RunToFailure(options.table, options.unit, options.time, model.columns)
    predictions = remaining_life(model, table).rename(columns={"unit": options.unit, "time": options.time})
    output = Path(options.output or Path(options.table).with_suffix(".rul.csv"))
    write_text(output, predictions.to_csv(index=False, float_format="%.2f"))
    first = predictions.head(10)
    rows = [
        [str(unit), f"{time:g}", f"{rul:.1f}", "yes" if padded else ""]
        for unit, time, rul, padded in first.itertuples(index=False)
    ]
    more = f", the first 10 of {len(predictions)}" if len(predictions) > 10 else ""
    print_table(f"remaining life{more}", list(predictions.columns), rows)
    if options.plots:
        folder = Path(options.plots)
        folder.mkdir(parents=True, exist_ok=True)
        for i, unit in enumerate(table.units):
            _draw(model, table.select([i]), folder / f"{i + 1:04d}-{_safe(str(unit))}.png", options.time)
    console.print(f"{output}{f', pictures in {options.plots}' if options.plots else ''}", soft_wrap=True)
    return predictions


def _draw(model: ECLSTMRegressor, unit: RunToFailure, path: Path, time: str) -> None:
    short = len(unit.values) < model.rows
    segments = Segments(unit, model.columns, model.rows, np.zeros(len(unit.values)), last_only=short)
    plot_life(unit.units[0], unit.times[segments.last.numpy()], predict_segments(model, segments), path, time)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)[:40]
