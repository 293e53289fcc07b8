"""Pictures: losses while training and what the students reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from papercore.lab.report import plot_gains
from papercore.lab.study import Interval


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Each run's terms of the loss over its epochs; beside them the decisive metric of every model."""
    terms = [t for t in ("ce", "kd", "sinkhorn") if any(t in row for history in histories.values() for row in history)]
    terms = terms or ["loss"]
    figure = Figure(figsize=(3.2 * (len(terms) + 1), 3.4), layout="constrained")
    *panels, last = figure.subplots(1, len(terms) + 1, squeeze=False)[0]
    titles = {"ce": "cross-entropy", "kd": "KD term", "sinkhorn": "Sinkhorn term", "loss": "loss"}
    for panel, term in zip(panels, terms, strict=True):
        for number, (name, history) in enumerate(histories.items()):
            points = [(row["epoch"], row[term]) for row in history if term in row]
            if any(value for _, value in points):  # a term of weight 0 reads 0
                panel.plot(*zip(*points, strict=True), label=name, color=f"C{number}")
        panel.set(xlabel="epoch", title=titles[term])
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    metric = next(iter(next(iter(results.values()))))
    values = [metrics[metric] for metrics in results.values()]
    colours = [f"C{list(histories).index(name)}" if name in histories else "0.5" for name in results]
    bars = last.barh(list(results), values, color=colours)
    last.bar_label(bars, fmt="%.3f", padding=3)
    last.set_xlim(0, max(1e-9, *values) * 1.25)
    last.invert_yaxis()
    last.set(title=metric, xlabel="test split")
    figure.savefig(path, dpi=100)


LOWEST = -12.0  # gain that is drawn: small gains stand beside collapses


def plot_regimes(
    gains: Mapping[str, Mapping[tuple[float, float], float]], tested: Mapping[str, Interval | None], path: Path
) -> None:
    """What the Sinkhorn term adds on validation rows, by (weight, eps); last, what the tuned loss adds on test rows."""
    figure = Figure(figsize=(3.0 * len(gains) + 4.2, 3.4), layout="constrained")
    widths = [1.0] * len(gains) + [1.2]
    *panels, last = figure.subplots(1, len(gains) + 1, squeeze=False, width_ratios=widths)[0]
    for panel, (task, of_task) in zip(panels, gains.items(), strict=True):
        if panel is not panels[0]:
            panel.sharey(panels[0])  # before there is something in it, or its own range is lost
        for eps in sorted({eps for _, eps in of_task}):
            points = sorted((weight, max(LOWEST, 100 * gain)) for (weight, e), gain in of_task.items() if e == eps)
            panel.plot(*zip(*points, strict=True), marker="o", label=f"eps {eps:g}")
        panel.axhline(0, color="0.3", linewidth=0.8)
        panel.set(xscale="log", xlabel="weight of the Sinkhorn term", title=task)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"validation score, points over KL alone\n(collapses are cut at {LOWEST:g})")
    panels[0].legend()
    plot_gains(last, tested, 100)
    last.yaxis.tick_right()
    last.set(title="both tuned", xlabel="test score, points over KL, 95 %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
