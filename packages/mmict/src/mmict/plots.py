"""Pictures: how the arms' losses fall, and what the arms say about pictures, beside their demonstrations and the truth."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmict.metrics import matches

Picture = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]  # one, or the frames of a video

CELL = 1.7  # inches for a pair: a picture with its text below
TEXT = 0.62  # inches of it for the text
WIDE = 3.6  # inches for what the arms say
LINE = 0.34  # inches for what one of them says
SHOWN = 4  # frames of a video at most
RIGHT, WRONG = "tab:green", "0.15"


def plot_training(path: str | Path, histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The training loss of each arm over the steps; beside it the loss on validation data, where there is any.

    If neither was logged there is no picture.

    Args:
        histories: of each arm, rows with "step" and "loss" or "eval_loss" (nats), as the engine logs them.
    """
    titles = {"loss": "training loss", "eval_loss": "validation loss"}
    keys = [key for key in titles if any(key in row for history in histories.values() for row in history)]
    if not keys:
        return
    figure = Figure(figsize=(4.8 * len(keys), 3.4), layout="constrained")
    for panel, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (arm, history) in enumerate(histories.items()):
            points = [(row["step"], row[key]) for row in history if key in row]
            if points:
                marker = "o" if len(points) < 15 else None
                panel.plot(*zip(*points, strict=True), marker=marker, color=f"C{number}", label=arm)
        panel.set(xlabel="step", ylabel="nats per token", title=titles[key])
        panel.grid(alpha=0.3)
        panel.legend()
    _save(figure, path)


def plot_dialogs(
    path: str | Path,
    queries: Sequence[Picture],
    demos: Sequence[Sequence[tuple[Picture, str]]],
    truths: Sequence[Sequence[str]],
    predictions: Mapping[str, Sequence[str]],
    questions: Sequence[str] | None = None,
) -> None:
    """A row for each query: its demonstrations with their texts, the query, and what each arm says beside the truth.

    An arm that says a truth, by the same words, is ticked and green.

    Args:
        queries: pictures (h, w, 3), or lists of frames, of which four are drawn. demos: of each query, at most 8, and fewer for
            some if you like. truths: of each query one or more texts; the first is written. predictions: by arm, of each query.
        questions: of each query, "" for none; written below it.

    Raises:
        ValueError: if there are no queries, or not an entry of each of the others for every query.
    """
    lengths = [len(demos), len(truths), *map(len, predictions.values()), len(questions or queries)]
    if not len(queries) or set(lengths) != {len(queries)}:
        raise ValueError(f"{len(queries)} queries to draw, but demos, truths, predictions and questions have {lengths}")
    most = max(map(len, demos))
    height = max(CELL, LINE * (len(predictions) + 1) + 0.1)
    width = CELL * (most + 1) + WIDE
    figure = Figure(figsize=(width, height * len(queries) + 0.3))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(0, width), ylim=(height * len(queries) + 0.3, 0))  # in inches, downwards
    panel.axis("off")
    heads = {0: "demonstrations", most: "query"} if most else {0: "query"}
    for column, head in heads.items():
        panel.text(CELL * column + 0.1, 0.2, head, fontsize=9, weight="bold")
    for row, query in enumerate(queries):
        top = 0.3 + height * row
        if row:
            panel.axhline(top, color="0.85", linewidth=0.8)
        for column, (picture, text) in enumerate(demos[row], most - len(demos[row])):
            _pair(panel, CELL * column, top, picture, text, "0.3")
        _pair(panel, CELL * most, top, query, questions[row] if questions else "", "tab:red")
        lines = [("truth", truths[row][0], "0.4", "")]
        for arm, said in predictions.items():
            right = matches(said[row], truths[row])
            lines.append((arm, said[row], RIGHT if right else WRONG, "✓ " if right else ""))
        for number, (name, text, colour, mark) in enumerate(lines):
            shown = mark + textwrap.shorten(text, 76, placeholder=" …")
            place = (CELL * (most + 1) + 0.1, top + 0.05 + LINE * (number + 0.5))
            panel.text(*place, name, fontsize=8, color="0.4", va="center", parse_math=False)
            said_at: dict[str, Any] = {
                "fontsize": 8,
                "color": colour,
                "va": "center",
                "parse_math": False,
                "linespacing": 1.15,
            }
            panel.text(place[0] + 0.9, place[1], textwrap.fill(shown, 40), **said_at)
    _save(figure, path, dpi=130)


def _pair(panel: Any, left: float, top: float, picture: Picture, text: str, colour: str) -> None:
    """One pair in a cell: the picture, or up to four frames of a video in a square, and the text below."""
    frames = [picture] if isinstance(picture, np.ndarray) else list(picture)
    frames = [frames[i] for i in np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)]
    side = 1 if len(frames) == 1 else 2
    room = CELL - TEXT - 0.1
    middle, size = left + CELL / 2, room / side
    for i, frame in enumerate(frames):
        tall, wide = frame.shape[:2]
        scale = (size - 0.03) / max(tall, wide)
        x = middle + (i % side + 0.5 - side / 2) * size
        y = top + 0.08 + (i // side + 0.5) * size
        across, down = scale * wide / 2, scale * tall / 2
        panel.imshow(frame, extent=(x - across, x + across, y + down, y - down), aspect="auto", interpolation="nearest")
    lines = "\n".join(textwrap.wrap(textwrap.shorten(text, 64, placeholder=" …"), 23))
    below: dict[str, Any] = {
        "fontsize": 7,
        "ha": "center",
        "va": "top",
        "color": colour,
        "parse_math": False,
        "linespacing": 1.15,
    }
    panel.text(middle, top + 0.12 + room, lines, **below)


def _save(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
