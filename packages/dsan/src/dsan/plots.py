"""Pictures: losses and accuracy while training, crops with what was read, and where the attention looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dsan.decode import Reading

# What the engine logs beside the terms of the loss.
ENGINE_KEYS = ("step", "epoch", "learning_rate", "grad_norm", "total_flos")
ENGINE_PREFIXES = ("eval_", "train_", "num_")
COLUMNS, WIDTH = 4, 4.0  # of a contact sheet: crops in a row, and the width of a crop's place in its heights
RIGHT, WRONG = "tab:green", "tab:red"

# A crop, uint8: a PIL image, or an array or tensor (channels, height, width).
Crop = Image.Image | ArrayLike


def plot_training(path: str | Path, history: Sequence[Mapping[str, Any]]) -> None:
    """The logged loss and its parts over the steps; beside them what is logged as accuracy, in percent.

    If neither was logged there is no picture.

    Args:
        history: rows with "step" and numbers by name, as the engine logs them.
    """
    logged = dict.fromkeys(key for row in history for key in row)
    accuracies = [key for key in logged if "accuracy" in key]
    losses = [key for key in logged if key not in ENGINE_KEYS and not key.startswith(ENGINE_PREFIXES)]
    losses = [key for key in losses if key not in accuracies]
    shown = {"loss": (losses, 1), "accuracy, % of words": (accuracies, 100)}
    shown = {title: (keys, scale) for title, (keys, scale) in shown.items() if keys}
    if not shown:
        return
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (title, (keys, scale)) in zip(panels, shown.items(), strict=True):
        for key in keys:
            points = [(row["step"], scale * row[key]) for row in history if key in row]
            panel.plot(*zip(*points, strict=True), label=key.removeprefix("eval_").replace("_", " "))
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[-1].set_ylim(bottom=0)
    _save(figure, path)


def contact_sheet(
    path: str | Path,
    images: Sequence[Crop],
    readings: Sequence[Reading],
    truths: Sequence[str] | None = None,
    attention: Sequence[ArrayLike] | None = None,
) -> None:
    """Crops in rows of four, each over what was read and how surely; what should have been read follows a wrong one, in red.

    Args:
        truths: as they are compared with the readings; without them nothing is coloured.
        attention: a map (height, width) of 0..1 for each crop, shown below it.

    Raises:
        ValueError: if there are no crops.
    """
    if not images:
        raise ValueError("there are no crops to draw")
    height = (2.1 if attention is not None else 1.0) + 0.75
    rows, columns = -(-len(images) // COLUMNS), min(COLUMNS, len(images))
    size = (columns * (WIDTH + 0.3), rows * height)
    figure = Figure(figsize=(0.6 * size[0], 0.6 * size[1]))
    panel = figure.add_axes((0, 0, 1, 1))  # one for all: a hundred of them would take seconds
    panel.set(xlim=(-0.15, size[0] - 0.15), ylim=(size[1] - 0.1, -0.1))
    panel.axis("off")
    for i, (image, reading) in enumerate(zip(images, readings, strict=True)):
        x, y = i % COLUMNS * (WIDTH + 0.3), i // COLUMNS * height
        pixels = _pixels(image)
        _show(panel, pixels, x, y)
        if attention is not None:
            _show(panel, _heat(pixels, attention[i]), x, y + 1.1)
        truth = None if truths is None else truths[i]
        colour = "0.2" if truth is None else RIGHT if reading.text == truth else WRONG
        said = f"{reading.text or '(nothing)'} {reading.confidence:.2f}"
        said += f"  not {truth}" if colour == WRONG else ""
        panel.text(x, y + height - 0.4, said, color=colour, fontsize=9, va="center", parse_math=False)
    _save(figure, path)


def overlay(path: str | Path, image: Crop, attention: ArrayLike | None, reading: Reading) -> None:
    """One crop, below it the same under its attention map (height, width) of 0..1, if there is one; the title is what was read,
    with the confidence of the word and of each character."""
    pixels = _pixels(image)
    shown = [pixels] if attention is None else [pixels, _heat(pixels, attention)]
    tall = min(4.0, max(0.5, 5 * pixels.shape[0] / pixels.shape[1]))
    figure = Figure(figsize=(5.2, tall * len(shown) + 0.9), layout="constrained")
    for panel, picture in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        panel.imshow(picture, cmap="gray", vmin=0, vmax=255)
        panel.axis("off")
    figure.suptitle(f"{reading.text or '(nothing)'}   {reading.confidence:.2f}", parse_math=False)
    each = "  ".join(f"{character} {confidence:.2f}" for character, confidence in reading.characters)
    figure.supxlabel(each, fontsize=8, parse_math=False)
    _save(figure, path)


def _pixels(image: Crop) -> NDArray[np.uint8]:
    """(height, width) or (height, width, 3)."""
    pixels = np.asarray(image)
    if isinstance(image, Image.Image) or pixels.ndim == 2:
        return pixels
    return pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)


def _heat(pixels: NDArray[np.uint8], attention: ArrayLike) -> NDArray[np.uint8]:
    """The crop, blue where the map is at its lowest, red where it is at its highest: a map hardly ever spans all of 0..1."""
    heat = np.asarray(attention, dtype=np.float32)
    low, high = heat.min(), heat.max()
    heat = (heat - low) / (high - low) if high > low else np.full_like(heat, 0.5)
    size = (pixels.shape[1], pixels.shape[0])
    share = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))[..., None]
    colour = 255 * (share * (1.0, 0.1, 0.0) + (1 - share) * (0.0, 0.2, 1.0))
    grey = (pixels if pixels.ndim == 2 else pixels.mean(-1))[..., None]
    return (0.55 * grey + 0.45 * colour).astype(np.uint8)


def _show(panel: Any, pixels: NDArray[np.uint8], x: float, y: float) -> None:
    """As large as its place allows, in its own proportions."""
    scale = min(1 / pixels.shape[0], WIDTH / pixels.shape[1])
    right, bottom = x + scale * pixels.shape[1], y + scale * pixels.shape[0]
    panel.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(x, right, bottom, y), aspect="auto")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
