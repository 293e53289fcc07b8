"""Pictures: losses while training, what the networks reach, and which images they find alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from disco.data import Images
from disco.loss import unit


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Each run's contrast with the queue and distance from the teacher over its steps; beside them every network's accuracy."""
    terms = {"contrast": "contrast with the queue, nats", "distill": "term of the teacher"}
    shown = {t: title for t, title in terms.items() if any(row.get(t) for h in histories.values() for row in h)}
    figure = Figure(figsize=(3.6 * (len(shown) + bool(results)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown) + bool(results), squeeze=False)[0]
    for panel, (term, title) in zip(panels, shown.items(), strict=False):
        for number, (name, history) in enumerate(histories.items()):
            points = [(row["step"], row[term]) for row in history if term in row]
            if any(value for _, value in points):  # an arm without this term reads 0
                panel.plot(*zip(*points, strict=True), label=name, color=f"C{number}")
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        panel.legend()
    if results:
        metric = next(m for m in ("knn_20", "knn_10", "linear_top1") if all(m in row for row in results.values()))
        values = [metrics[metric] for metrics in results.values()]
        colours = [f"C{list(histories).index(name)}" if name in histories else "0.5" for name in results]
        bars = panels[-1].barh(list(results), values, color=colours)
        panels[-1].bar_label(bars, fmt="%.1f", padding=3)
        panels[-1].set_xlim(0, max(values) * 1.25)
        panels[-1].invert_yaxis()
        panels[-1].set(title=metric, xlabel="% of test images")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def plot_neighbours(
    features: Mapping[str, Sequence[Tensor]],
    train: Images,
    test: Images,
    path: Path,
    queries: int = 6,
    nearest: int = 4,
) -> None:
    """A few test images, and the training images that each network finds most alike; another class has a red frame.

    Args:
        features: of each network: of the training and of the test images.
    """
    rows = torch.linspace(0, len(test) - 1, queries).long().tolist()
    columns = 1 + (nearest + 1) * len(features)
    figure = Figure(figsize=(0.55 * columns, 0.6 * queries + 0.7))
    grid = figure.subplots(queries, columns, squeeze=False)
    for panel in grid.flat:
        panel.axis("off")
    shown = test.__getitems__(rows)
    for y in range(queries):
        _show(grid[y, 0], shown["images"][y])
    grid[0, 0].set_title("image", fontsize=8)
    for number, (name, (bank, asked)) in enumerate(features.items()):
        found = (unit(asked[rows]) @ unit(bank).T).topk(nearest).indices
        first = 2 + number * (nearest + 1)
        grid[0, first].set_title(name, fontsize=8, loc="left")
        for y in range(queries):
            batch = train.__getitems__(found[y].tolist())
            for x in range(nearest):
                right = "labels" not in batch or batch["labels"][x] == shown["labels"][y]
                _show(grid[y, first + x], batch["images"][x], None if right else "tab:red")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.08, hspace=0.08)
    figure.savefig(path, dpi=110)


def _show(panel: Any, image: Tensor, frame: str | None = None) -> None:
    panel.imshow(image.permute(1, 2, 0).numpy())
    if frame:
        panel.axis("on")
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(edgecolor=frame, linewidth=2)
