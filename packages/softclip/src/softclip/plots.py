"""Pictures: what the targets of one batch look like, and how the losses fall."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

# What the engine logs beside the terms of the loss.
ENGINE_KEYS = ("step", "epoch", "learning_rate", "grad_norm", "total_flos")
ENGINE_PREFIXES = ("eval_", "train_", "num_")
COLUMNS = 3  # of panels


def plot_targets(
    one_hot: Float[Tensor, "pairs pairs"],
    target: Float[Tensor, "pairs pairs"],
    predicted: Float[Tensor, "pairs pairs"],
    captions: Sequence[str],
    thumbnails: UInt8[Tensor, "pairs 3 side side"] | None,
    path: Path,
) -> None:
    """Three distributions over the captions of one batch, a row for each image: CLIP's target, the softened one, the model's.

    They share one scale of colours, on which a probability p is as dark as p ** 0.4: 0.01 has 16 % of the way to the colour of 1,
    so that what lies beside the diagonal is seen.

    Args:
        one_hot, target, predicted: probabilities; about a dozen pairs are readable.
        captions: for the columns, shortened. thumbnails: for the rows; without them the captions are there, too.
    """
    count = len(captions)
    names = [textwrap.shorten(caption, 36, placeholder=" …").replace("$", r"\$") for caption in captions]  # no formula
    figure = Figure(figsize=(11.5, 5.8), layout="compressed")
    panels = figure.subplots(1, 3, sharey=True)
    shown = {"one-hot target": one_hot, "softened target": target, "prediction": predicted}
    for panel, (title, values) in zip(panels, shown.items(), strict=True):
        heat = panel.imshow(values.detach().float().cpu().numpy(), cmap="magma_r", norm=PowerNorm(0.4, 0, 1))
        panel.set_title(title)
        panel.set_xticks(range(count), names, rotation=90, fontsize=7)
        panel.set_yticks(range(count), names, fontsize=7)
        panel.tick_params(length=0)
    if thumbnails is not None:
        panels[0].set_yticks([])
        for y, image in enumerate(thumbnails):
            inset = panels[0].inset_axes((-1.5, y - 0.45, 0.9, 0.9), transform=panels[0].transData)
            inset.imshow(image.permute(1, 2, 0).numpy())
            inset.axis("off")
    scale = figure.colorbar(heat, ax=panels, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], pad=0.01)
    scale.ax.set_yticklabels(["0", "0.01", "0.05", "0.2", "0.5", "1"])
    scale.set_label("probability (to the power 0.4)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def plot_training(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Each arm's logged terms over its steps: the loss, then every other in a panel of its own, but for what the engine logs.

    Losses of arms with different terms are not comparable, and a term is drawn for the arms that have it. If nothing was logged
    there is no picture.

    Args:
        histories: of each arm its log: rows with "step" and numbers by name.
    """
    logged = dict.fromkeys(key for history in histories.values() for row in history for key in row)
    terms = [key for key in logged if key not in ENGINE_KEYS and not key.startswith(ENGINE_PREFIXES)]
    if not terms:
        return
    terms.sort(key=lambda term: term != "loss")
    columns = min(len(terms), COLUMNS)
    rows = -(-len(terms) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    for place, term in enumerate(terms, 1):
        panel = figure.add_subplot(rows, columns, place)
        for number, (arm, history) in enumerate(histories.items()):
            points = [(row["step"], row[term]) for row in history if term in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=arm, color=f"C{number}")
        panel.set(xlabel="step", title=term.replace("_", " "))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
