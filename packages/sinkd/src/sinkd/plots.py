"""Pictures: losses while training and what the students reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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
