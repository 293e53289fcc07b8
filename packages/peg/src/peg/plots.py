"""Pictures: a training run, and schedules against their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("loss", "loss"),
    ("positive_probability", "probability of the positive"),
    ("hardness", "hardness $\\lambda$"),
    ("effective_negatives", "effective number of negatives"),
)


def plot_training(
    history: Sequence[Mapping[str, Any]], results: Mapping[str, Mapping[str, float]], path: Path
) -> None:
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
        bars = last.bar(places, [metrics[name] for name in names], 0.36, label=when, color=("0.6", "tab:red")[number % 2])
        last.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    last.set_xticks([i + 0.2 for i in range(len(names))], names)
    last.set(title="on the test data", ylim=(0, 1))
    if names:
        last.legend()
    else:
        last.text(0.5, 0.5, "no test data", ha="center", transform=last.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
