"""Pictures: predicted against true remaining life, the loss while training, one unit's life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from eclstm.evaluate import Evaluation


def plot_predictions(result: Evaluation, path: Path, title: str, history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Predicted against true remaining life of each unit; beside it the losses, if ``history`` has them."""
    curves = {
        name: [(row["epoch"], row[key] ** power) for row in history if key in row]
        for name, key, power in (("training", "loss", 0.5), ("validation", "eval_rmse", 1.0))
    }
    wide = any(curves.values())
    figure = Figure(figsize=(9 if wide else 4.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
    beyond = result.raw > result.capped
    top = max(result.raw.max(), result.predicted.max()) * 1.05
    panels[0].plot([0, top], [0, top], color="0.6", linewidth=1)
    panels[0].scatter(result.raw[~beyond], result.predicted[~beyond], s=14, alpha=0.7, label="units")
    if beyond.any():
        panels[0].scatter(
            result.raw[beyond],
            result.predicted[beyond],
            s=14,
            alpha=0.7,
            marker="x",
            label=f"truly beyond the cap of {result.cap:g}",
        )
    panels[0].legend()
    metrics = result.metrics
    panels[0].set(
        xlabel="true remaining life (cycles)",
        ylabel="predicted",
        title=f"{title}: RMSE {metrics['rmse']:.2f} capped, {metrics['rmse_raw']:.2f} raw",
    )
    if wide:
        for name, points in curves.items():
            panels[1].plot(*zip(*points, strict=True), label=name)
        panels[1].set(xlabel="epoch", ylabel="RMSE (cycles)", title="training")
        panels[1].set_ylim(bottom=0)
        panels[1].legend()
    figure.savefig(path, dpi=110)


def plot_life(unit: Any, times: NDArray[np.float64], predicted: NDArray[np.float64], path: Path, time: str) -> None:
    """One unit's predicted remaining life over its time."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    panel = figure.subplots()
    panel.plot(times, predicted, marker="." if len(times) < 3 else None)
    panel.set(xlabel=time, ylabel="predicted remaining life", title=f"unit {unit}")
    panel.set_ylim(bottom=min(0.0, float(predicted.min())))
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_search(trials: Sequence[FrozenTrial], path: Path) -> None:
    """Each evaluation of a search in its order, coloured by its budget, and the best so far at the largest budget."""
    finite = [
        (i, t.value, t.user_attrs["budget"])
        for i, t in enumerate(trials)
        if t.value is not None and np.isfinite(t.value)
    ]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    budgets = [budget for _, _, budget in finite]
    dots = panel.scatter(
        [i for i, _, _ in finite], [value for _, value, _ in finite], c=np.log(budgets), cmap="viridis_r", s=22
    )
    bar = figure.colorbar(dots, label="epochs")
    bar.set_ticks([float(np.log(b)) for b in sorted(set(budgets))], labels=[str(b) for b in sorted(set(budgets))])
    longest = [(i, value) for i, value, budget in finite if budget == max(budgets)]
    panel.step(
        [i for i, _ in longest],
        np.minimum.accumulate([v for _, v in longest]),
        where="post",
        color="tab:red",
        linewidth=1,
    )
    panel.set(
        xlabel="evaluation", ylabel="validation RMSE (cycles)", title=f"search; red: best at {max(budgets)} epochs"
    )
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_minor_formatter("{x:.0f}")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=110)
