"""Pictures: losses and SRCC while training, predictions beside given scores, and scores beside the images they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from iqa_distill.metrics import fit_logistic

# What the engine logs beside the terms of the loss.
ENGINE_KEYS = ("step", "epoch", "learning_rate", "grad_norm", "total_flos")
ENGINE_PREFIXES = ("eval_", "train_", "num_")
CELL = 1.35  # inches for a thumbnail
SHOWN = 12  # thumbnails at most


def plot_training(path: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The logged loss and its parts over the steps; beside them SRCC on validation images, where there are any.

    If neither was logged there is no picture.

    Args:
        history: rows with "step" and numbers by name, as the engine logs them.
    """
    logged = dict.fromkeys(key for row in history for key in row)
    losses = [key for key in logged if key not in ENGINE_KEYS and not key.startswith(ENGINE_PREFIXES)]
    panels = {"loss": losses, "SRCC on validation images": [key for key in logged if key == "eval_srcc"]}
    panels = {title: keys for title, keys in panels.items() if keys}
    if not panels:
        return
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    for panel, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in history if key in row]
            panel.plot(
                *zip(*points, strict=True), marker="o" if len(points) < 15 else None, label=key.replace("_", " ")
            )
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        if title == "loss":
            panel.legend()
    _save(figure, path)


def plot_falling(
    path: str | Path, thumbnails: Sequence[NDArray[np.uint8]], scores: ArrayLike, names: Sequence[str]
) -> None:
    """Scores in the order given, over the images they are of: of one picture that gets worse they should fall.

    Of more than a dozen images all scores are drawn, and a dozen thumbnails at most.

    Args:
        thumbnails: (height, width, 3) each, of any size. scores: (n,). names: written below the thumbnails.

    Raises:
        ValueError: if there are no images.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise ValueError("there are no scores to draw")
    stride = -(-len(values) // SHOWN)
    span = (-0.5 * stride, max(len(values) - 0.5, (len(values) - 1) // stride * stride + 0.5 * stride))
    inch = stride / CELL  # images in an inch: a thumbnail has the room of a stride
    across, below = (span[1] - span[0]) / inch, CELL + 0.3
    width, height = across + 0.7, below + 2.2
    figure = Figure(figsize=(width, height))
    left, across = 0.6 / width, across / width
    line = figure.add_axes((left, below / height + 0.02, across, 2.0 / height))
    line.plot(values, marker="o" if len(values) <= 60 else None, color="tab:red")
    line.set(xlim=span, xticks=[], ylabel="score")
    line.grid(axis="y", alpha=0.3)
    strip = figure.add_axes((left, 0, across, below / height))  # one for all, in inches downwards
    strip.set(xlim=span, ylim=(below, 0))
    strip.axis("off")
    for i in range(0, len(values), stride):
        tall, wide = thumbnails[i].shape[:2]
        scale = (CELL - 0.1) / max(tall, wide)
        half = scale * wide / 2 * inch
        strip.imshow(thumbnails[i], extent=(i - half, i + half, 0.05 + scale * tall, 0.05), aspect="auto")
        name = names[i] if len(names[i]) <= 18 else f"…{names[i][-17:]}"
        strip.text(i, 0.05 + scale * tall + 0.12, name, fontsize=7, ha="center", va="center", parse_math=False)
    _save(figure, path)


def plot_scatter(
    path: str | Path,
    predictions: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Given scores over predicted ones, coloured by group, with the logistic curve that is fitted to them.

    Args:
        predictions, scores: (n,). groups: of each image, such as its kind of distortion.

    Raises:
        ValueError: as :func:`iqa_distill.metrics.fit_logistic`, but for equal predictions or scores, which get no curve.
    """
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    labels = np.asarray(groups if groups is not None else [""] * len(x))
    figure = Figure(figsize=(6.6 if groups is not None else 4.6, 4.2), layout="constrained")
    panel = figure.subplots()
    for number, group in enumerate(np.unique(labels)):
        here = labels == group
        marker = "osD^v"[number // 10 % 5]  # ten colours, then another shape
        panel.scatter(x[here], y[here], s=14, alpha=0.65, marker=marker, color=f"C{number % 10}", label=str(group))
    if np.ptp(x) and np.ptp(y):
        along = np.linspace(x.min(), x.max(), 200)
        panel.plot(along, fit_logistic(x, y).predict(along), color="0.2", linewidth=1, label="_fit")
    panel.set(xlabel="predicted score", ylabel="given score", title=title)
    panel.grid(alpha=0.3)
    if groups is not None:
        figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def plot_test_loss(path: str | Path, curves: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    """Loss on test images over the steps of training, with and without regularisation for instance, as in the paper.

    Args:
        curves: by name: losses of all seeds at each step. The line is their mean, the band spans them.

    Raises:
        ValueError: if there are no curves.
    """
    if not any(curves.values()):
        raise ValueError("there are no losses to draw")
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    panel = figure.subplots()
    for name, curve in curves.items():
        steps = sorted(curve)
        panel.plot(steps, [np.mean(curve[step]) for step in steps], label=name)
        panel.fill_between(steps, [min(curve[step]) for step in steps], [max(curve[step]) for step in steps], alpha=0.2)
    panel.set(xlabel="step", ylabel="loss on test images")
    panel.grid(alpha=0.3)
    panel.legend()
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
