"""Pictures: a training run, and schedules against their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from papercore.lab.report import plot_gains
from papercore.lab.study import Interval

PANELS = (
    ("loss", "loss"),
    ("positive_probability", "probability of the positive"),
    ("hardness", "hardness $\\lambda$"),
    ("effective_negatives", "effective number of negatives"),
)


def plot_training(history: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Loss, probability of the positive, hardness and effective negatives over the steps; metrics before and after."""
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    *panels, last = figure.subplots(1, len(PANELS) + 1)
    for panel, (name, title) in zip(panels, PANELS, strict=True):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            panel.plot(*zip(*points, strict=True), marker=".")
        panel.set(xlabel="step", title=title)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    names = [name for name in next(iter(results.values()), {}) if name in ("nDCG@10", "MRR@10", "Recall@10")]
    for number, (when, metrics) in enumerate(results.items()):
        places = [i + 0.4 * number for i in range(len(names))]
        bars = last.bar(
            places, [metrics[name] for name in names], 0.36, label=when, color=("0.6", "tab:red")[number % 2]
        )
        last.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    last.set_xticks([i + 0.2 for i in range(len(names))], names)
    last.set(title="on the test data", ylim=(0, 1.25))
    if names:
        last.legend(ncols=2, loc="upper center")
    else:
        last.text(0.5, 0.5, "no test data", ha="center", transform=last.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def plot_schedules(
    scores: Mapping[str, Sequence[tuple[float, float]]], gains: Mapping[str, Interval | None], path: Path
) -> None:
    """Each trial's validation nDCG@10 by its temperature, a line for each family; beside it what the best of each family
    adds on test queries to the best constant temperature."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (family, points) in enumerate(scores.items()):
        style = {"color": "0.2", "linewidth": 2.5} if number == 0 else {"alpha": 0.8}
        ordered = sorted((1 / temperature, score) for temperature, score in points)
        left.plot(*zip(*ordered, strict=True), marker=".", label=family, **style)
    left.set(xlabel="1 / temperature", ylabel="nDCG@10 on validation queries", title="all trials")
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plot_gains(right, gains, 100)
    right.set(title="best of each family, new seeds", xlabel="test nDCG@10: points over constant temperature")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
