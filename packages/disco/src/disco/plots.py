"""Pictures: losses while training, what the networks reach, and which images they find alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from papercore.lab.cli import flag
from papercore.lab.report import console
from papercore.lab.study import interval, read_rows
from torch import Tensor

from disco.data import Images
from disco.loss import unit


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Each run's contrast with the queue and distance from the teacher over its steps; beside them every network's accuracy.

    A run that logged nothing and was not judged gives no picture.
    """
    terms = {"contrast": "contrast with the queue, nats", "distill": "term of the teacher"}
    shown = {t: title for t, title in terms.items() if any(row.get(t) for h in histories.values() for row in h)}
    if not shown and not results:
        return
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
    nearest = min(nearest, len(train))
    columns = 1 + (nearest + 1.5) * len(features)
    figure = Figure(figsize=(0.55 * columns, 0.55 * queries + 0.35))
    panel = figure.add_axes((0.01, 0.01, 0.98, 0.98))  # one for all: a hundred of them would take seconds
    panel.set(xlim=(0, columns), ylim=(queries, -0.6))
    panel.axis("off")
    shown = test.__getitems__(rows)
    panel.text(0, -0.1, "image", fontsize=8)
    for y in range(queries):
        _show(panel, 0, y, shown["images"][y])
    for number, (name, (bank, asked)) in enumerate(features.items()):
        found = (unit(asked[rows]) @ unit(bank).T).topk(nearest).indices
        first = 1.5 + number * (nearest + 1.5)
        panel.text(first, -0.1, name, fontsize=8)
        for y in range(queries):
            batch = train.__getitems__(found[y].tolist())
            for x in range(nearest):
                right = "labels" not in batch or batch["labels"][x] == shown["labels"][y]
                _show(panel, first + x, y, batch["images"][x], None if right else "tab:red")
    figure.savefig(path, dpi=110)


@dataclass
class BottleneckOptions:
    """Whose rows to draw."""

    folder: str = flag("folder of `disco reproduce`, with results.jsonl", positional=True)


def plot_bottleneck(options: BottleneckOptions) -> Path:
    """The verb ``bottleneck``: accuracy of students over the hidden width of their heads, with 95 % intervals.

    Raises:
        ValueError: if the folder has no rows of DisCo with two widths.
    """
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in read_rows(Path(options.folder) / "results.jsonl"):
        arm, hidden = row["options"].get("arm"), row["options"].get("hidden", 2048)
        if arm in ("disco", "moco"):
            hidden = int(row["options"]["student"].split("-")[-1]) if hidden == -1 else hidden
            for metric, value in row["metrics"].items():
                found.setdefault((arm, hidden), {}).setdefault(metric, []).append(value)
    if sum(arm == "disco" for arm, _ in found) < 2:
        raise ValueError(f"{options.folder}: no results.jsonl with students of DisCo of several hidden widths")
    metrics = [m for m in ("knn_20", "linear_top1") if all(m in values for values in found.values())]
    figure = Figure(figsize=(3.8 * len(metrics), 3.4), layout="constrained")
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for number, (arm, name) in enumerate({"disco": "DisCo", "moco": "MoCo-v2"}.items()):
            widths = sorted(hidden for other, hidden in found if other == arm)
            if widths:
                means = [interval(found[arm, hidden][metric]) for hidden in widths]
                panel.plot(widths, [m.mean for m in means], marker="o", label=name, color=f"C{number}")
                panel.vlines(widths, [m.low for m in means], [m.high for m in means], color=f"C{number}", alpha=0.5)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="hidden width of the head", title=f"{metric}, %")
        panel.grid(alpha=0.3)
        panel.legend()
    path = Path(options.folder) / "bottleneck.png"
    figure.savefig(path, dpi=110)
    console.print(str(path), soft_wrap=True)
    return path


def _show(panel: Any, x: float, y: float, image: Tensor, frame: str | None = None) -> None:
    panel.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + 0.92, y + 0.92, y), aspect="auto")
    if frame:
        panel.add_patch(Rectangle((x, y), 0.92, 0.92, fill=False, edgecolor=frame, linewidth=2))
