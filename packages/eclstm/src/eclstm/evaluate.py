"""Judging remaining-life predictions: RMSE and the asymmetric Score, always beside the protocol that gave them."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from safetensors import SafetensorError

from eclstm.data import RunToFailure, Segments
from eclstm.model import ECLSTMRegressor
from eclstm.sources import DataOptions, load


def rmse(true: ArrayLike, predicted: ArrayLike) -> float:
    """Root mean squared error over units, in cycles."""
    return float(np.sqrt(np.mean(np.square(np.asarray(predicted, np.float64) - np.asarray(true, np.float64)))))


def rul_score(true: ArrayLike, predicted: ArrayLike) -> float:
    """The PHM 2008 Score: sum over units of exp(-d/13) - 1 for d < 0, else exp(d/10) - 1, with d = predicted - true.

    Late predictions cost more. Lower is better; being a sum, it grows with the number of units. Errors beyond some 5,000
    cycles are clipped, with a warning.

    >>> round(rul_score([10, 50, 100, 0, 120], [5, 70, 100, 3, 90]), 6)
    16.259167
    """
    d = np.asarray(predicted, np.float64) - np.asarray(true, np.float64)
    exponent = np.where(d < 0, -d / 13, d / 10)
    if (exponent > 500).any():
        warnings.warn(
            f"Score: an error of {np.abs(d).max():.3g} cycles is clipped so that exp does not overflow", stacklevel=2
        )
    return float(np.expm1(np.minimum(exponent, 500)).sum())


@torch.inference_mode()
def predict_segments(model: ECLSTMRegressor, segments: Segments, batch_size: int = 1024) -> NDArray[np.float64]:
    """(segments,) predictions in the labels' unit."""
    model.eval()
    device = next(model.parameters()).device
    batches = torch.arange(len(segments)).split(batch_size)
    parts = [model(segments.__getitems__(index)["segments"].to(device)).cpu() for index in batches]
    return torch.cat(parts).double().numpy()


@dataclass(frozen=True)
class Evaluation:
    """Predictions at the last row of each unit, and what they are compared with.

    Attributes:
        units: names. predicted, raw, capped: (units,) in cycles; raw is the true remaining life.
        cap: of the labels.
    """

    units: list[Any]
    predicted: NDArray[np.float64]
    raw: NDArray[np.float64]
    capped: NDArray[np.float64]
    cap: float | None

    @property
    def metrics(self) -> dict[str, float]:
        """rmse and score against capped labels (the paper's protocol), and against the raw ones."""
        return {
            "rmse": rmse(self.capped, self.predicted),
            "score": rul_score(self.capped, self.predicted),
            "rmse_raw": rmse(self.raw, self.predicted),
            "score_raw": rul_score(self.raw, self.predicted),
            "units": len(self.units),
            "units_beyond_cap": int((self.raw > self.capped).sum()),
        }

    def show(self, title: str) -> None:
        """The metrics as a table that names the protocol."""
        m = self.metrics
        protocol = (
            f"{title}: last segment of each of {m['units']} units, {m['units_beyond_cap']} of them beyond the cap"
        )
        cap = "no cap" if self.cap is None else f"labels capped at {self.cap:g}"
        rows = [
            [cap, f"{m['rmse']:.2f}", f"{m['score']:.0f}"],
            ["raw labels", f"{m['rmse_raw']:.2f}", f"{m['score_raw']:.0f}"],
        ]
        print_table(protocol, ["labels", "RMSE (cycles)", "Score"], rows)


def evaluate(model: ECLSTMRegressor, test: RunToFailure) -> Evaluation:
    """Predict at the last row of each unit of ``test``; units shorter than a segment repeat their first row."""
    raw = test.labels(cap=None)
    segments = Segments(test, model.columns, model.rows, raw, last_only=True)
    ends = raw[test.starts[1:] - 1]
    capped = ends if model.cap is None else np.minimum(ends, model.cap)
    return Evaluation(test.units, predict_segments(model, segments), ends, capped, model.cap)


def all_windows(model: ECLSTMRegressor, test: RunToFailure) -> dict[str, float]:
    """The same metrics over every segment of every unit, not the last alone; not comparable with published figures."""
    raw = test.labels(cap=None)
    segments = Segments(test, model.columns, model.rows, raw)
    true = segments.labels[segments.last].double().numpy()
    capped = true if model.cap is None else np.minimum(true, model.cap)
    predicted = predict_segments(model, segments)
    return {"rmse": rmse(capped, predicted), "rmse_raw": rmse(true, predicted), "segments": len(segments)}


def load_model(folder: str) -> ECLSTMRegressor:
    """A trained regressor from a checkpoint folder or a Hub name.

    Raises:
        FileNotFoundError: if it looks like a path and holds no checkpoint. ValueError: if the checkpoint does not fit together.
    """
    path = Path(folder)
    if path.is_dir() or path.parent.is_dir() or folder.count("/") != 1 or path.suffix:
        for name in ("config.json", "model.safetensors"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{folder}: no {name}; expected a folder that `eclstm train` wrote")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it reads a local folder
            return ECLSTMRegressor.from_pretrained(folder, strict=True)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not a checkpoint of eclstm: {error}") from None


@dataclass
class EvalOptions:
    """What to evaluate."""

    model: str = flag("folder that `eclstm train` wrote, or a Hub name")
    output_dir: str | None = flag(
        "where metrics.json and the plot go; eval-DATA in the model's folder if not given", None
    )
    every_window: bool = flag("also judge every segment of the test units, not the last alone", False)
    seed: int = flag("that the model was trained with: decides which units a table holds out", 0)


def evaluate_checkpoint(options: EvalOptions, data: DataOptions) -> dict[str, float]:
    """The verb ``eval``: a table, metrics.json and predicted.png."""
    from eclstm.plots import plot_predictions

    model = load_model(options.model)
    _, test = load(data, options.seed)
    result = evaluate(model, test)
    result.show(data.name)
    metrics = dict(result.metrics)
    if options.every_window:
        every = all_windows(model, test)
        metrics |= {f"every_window_{name}": value for name, value in every.items()}
        console.print(
            f"every one of {every['segments']} segments: RMSE {every['rmse']:.2f} capped, {every['rmse_raw']:.2f} raw"
        )
    folder = Path(options.output_dir or Path(options.model) / f"eval-{data.name}")  # what training wrote stays
    write_json(folder / "metrics.json", metrics)
    plot_predictions(result, folder / "predicted.png", data.name)
    console.print(f"{folder / 'metrics.json'}, {folder / 'predicted.png'}", soft_wrap=True)
    return metrics
