"""Draws the picture of each method as methods/NAME.svg; ``python docs/pictures.py FOLDER`` also writes PNGs there."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILLS = {"data": "#e8eaed", "trained": "#b3c7f2", "not trained": "#cfe3d4", "computed": "#ffffff", "loss": "#f9d99a"}
LINE, TEXT = "#808080", "#202124"  # lines show on light and on dark pages


class Picture:
    """Boxes and arrows; one unit is an inch, y goes up, and a box is placed by its centre."""

    def __init__(self, width: float, height: float) -> None:
        plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "papercore", "font.size": 9})
        self.figure = plt.figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        for i, kind in enumerate(FILLS):
            self.box(0.55 + 1.15 * i, 0.2, kind, kind, width=0.95, height=0.24)

    def box(self, x: float, y: float, text: str, kind: str, width: float = 1.5, height: float = 0.55) -> FancyBboxPatch:
        style = "round,pad=0,rounding_size=0.08"
        corner = (x - width / 2, y - height / 2)
        patch = FancyBboxPatch(
            corner, width, height, style, fc=FILLS[kind], ec=LINE, ls="--" if kind == "not trained" else "-"
        )
        self.axes.add_patch(patch)
        self.axes.text(x, y, text, ha="center", va="center", color=TEXT)
        return patch

    def arrow(self, start: FancyBboxPatch, end: FancyBboxPatch) -> None:
        """From centre to centre, cut at both boxes."""
        ends = [(b.get_x() + b.get_width() / 2, b.get_y() + b.get_height() / 2) for b in (start, end)]
        self.axes.add_patch(
            FancyArrowPatch(
                *ends, patchA=start, patchB=end, shrinkA=1, shrinkB=1, arrowstyle="-|>", mutation_scale=9, color=LINE
            )
        )

    def chain(self, *boxes: FancyBboxPatch) -> None:
        for start, end in pairwise(boxes):
            self.arrow(start, end)

    def note(self, x: float, y: float, text: str) -> None:
        self.axes.text(x, y, text, ha="center", va="center", color=LINE)


def eclstm() -> Picture:
    p = Picture(8.2, 3.1)
    cells = []
    for i, t in enumerate(("t - 1", "t", "t + 1")):
        window = p.box(1.0 + 1.9 * i, 0.8, f"sub-window {t}\ncycles x sensors", "data")
        convolved = p.box(1.0 + 1.9 * i, 1.65, "convolution\nover the cycles", "trained")
        cells.append(p.box(1.0 + 1.9 * i, 2.5, "gates\nby convolutions", "trained"))
        p.chain(window, convolved, cells[-1])
    dense = p.box(6.6, 2.5, "dense\nlayers", "trained", width=0.9)
    life = p.box(7.7, 2.5, "remaining\nlife", "computed", width=0.8)
    p.chain(*cells, dense, life, p.box(7.7, 1.65, "squared\nerror", "loss", width=0.8))
    p.note(3.0, 2.98, "state h, c: a feature map over the cycles of a sub-window, never flattened")
    return p


def sinkd() -> Picture:
    p = Picture(8.2, 3.3)
    batch = p.box(0.9, 1.7, "batch of\ninputs", "data", width=1.2)
    student, teacher = (
        p.box(2.5, 2.4, "student", "trained", width=1.1),
        p.box(2.5, 1.0, "teacher", "not trained", width=1.1),
    )
    rows = p.box(4.1, 2.4, "its n outputs,\none cloud", "computed", width=1.3)
    targets = p.box(4.1, 1.0, "its n outputs,\none cloud", "computed", width=1.3)
    distances = p.box(5.8, 1.7, "D: distances of\nall n x n pairs", "computed", width=1.3)
    cost = p.box(7.4, 1.7, "Sinkhorn plan P,\ncost sum P D", "loss", width=1.3)
    p.chain(batch, student, rows, distances, cost)
    p.chain(batch, teacher, targets, distances)
    pairs = p.box(4.1, 1.7, "KL, row by row", "loss", width=1.3, height=0.4)
    p.arrow(rows, pairs)
    p.arrow(targets, pairs)
    labels = p.box(5.8, 3.0, "cross-entropy\nwith labels", "loss", width=1.3, height=0.5)
    p.arrow(rows, labels)
    return p


def softclip() -> Picture:
    p = Picture(8.2, 3.9)
    rows = {}
    towers = {"image": "image tower", "text": "text tower", "regions": "region encoder", "tags": "text tower"}
    for i, (name, tower) in enumerate(towers.items()):
        y = 3.5 - 0.75 * i
        rows[name] = p.box(2.5, y, tower, "trained", width=1.3, height=0.45)
        p.arrow(p.box(0.8, y, name, "data", width=1.0, height=0.45), rows[name])
    pairs = p.box(4.4, 3.13, "similarities of\nimages to texts", "computed", width=1.4)
    alike = p.box(4.4, 1.63, "similarities of regions,\nand of tags", "computed", width=1.6)
    targets = p.box(6.9, 1.63, "softened target\n(1 - β) identity + β softmax", "computed", width=2.1)
    for name, to in (("image", pairs), ("text", pairs), ("regions", alike), ("tags", alike)):
        p.arrow(rows[name], to)
    whole = p.box(6.9, 3.13, "divergence, and once more\nof the negatives alone", "loss", width=2.1)
    p.arrow(pairs, whole)
    p.chain(alike, targets, whole)
    p.note(6.9, 1.1, "constant: no gradient passes")
    return p


def mmict() -> Picture:
    p = Picture(8.6, 3.5)
    places = 3.05, 2.25, 1.1
    texts = "demonstration 1:\npicture, text", "demonstration k:\npicture, text", "query:\npicture, prompt"
    inputs = [p.box(0.95, y, text, "data", width=1.6) for y, text in zip(places, texts, strict=True)]
    encoder = p.box(2.7, 2.1, "vision\nencoder", "not trained", width=0.9)
    hub = p.box(
        4.2, 2.1, "M-Hub:\nqueries and text\nattend to each other\nand to the picture", "trained", width=1.5, height=1.1
    )
    texts = "rows of text 1,\nend mark", "rows of text k,\nend mark", "query rows,\nprompt"
    rows = [p.box(6.0, y, text, "computed", width=1.4) for y, text in zip(places, texts, strict=True)]
    model = p.box(
        7.75, 2.1, "language model\nreads all rows,\nwrites the\ncaption", "not trained", width=1.3, height=1.1
    )
    for start, row in zip(inputs, rows, strict=True):
        p.arrow(start, encoder)
        p.arrow(hub, row)
        p.arrow(row, model)
    p.arrow(encoder, hub)
    p.arrow(model, p.box(7.75, 0.95, "cross-entropy\nof the caption", "loss", width=1.3))
    return p


def iqa_distill() -> Picture:
    p = Picture(8.6, 4.0)
    pristine = p.box(0.95, 3.55, "pristine picture\nof something else", "data", width=1.5)
    picture = p.box(0.95, 2.2, "distorted\npicture", "data", width=1.5)
    teacher = p.box(3.0, 3.55, "NAR-teacher", "not trained", width=1.3)
    student = p.box(3.0, 2.2, "student: ViT\nand decoder", "trained", width=1.3)
    biased = p.box(3.0, 0.85, "convolution and\ninvolution teachers", "not trained", width=1.4)
    for start, end in ((pristine, teacher), (picture, teacher), (picture, student), (picture, biased)):
        p.arrow(start, end)
    difference = p.box(5.0, 3.55, "features of\nthe difference", "computed", width=1.4)
    hidden = p.box(5.0, 2.75, "features, half\nof them hidden", "computed", width=1.4)
    generator = p.box(6.6, 2.75, "generator", "trained", width=1.0)
    distilled = p.box(7.8, 3.55, "MCD:\nsquared error", "loss", width=1.3)
    p.chain(teacher, difference, distilled)
    p.chain(student, hidden, generator, distilled)
    p.arrow(student, score := p.box(5.0, 2.0, "score", "computed", width=1.4, height=0.4))
    p.arrow(score, p.box(7.8, 2.0, "error from the\nhuman score", "loss", width=1.3))
    p.arrow(student, tokens := p.box(5.0, 1.4, "scores of Conv\nand Inv tokens", "computed", width=1.4))
    p.arrow(biased, bridges := p.box(5.0, 0.75, "bridges", "trained", width=1.4, height=0.4))
    p.arrow(tokens, regularised := p.box(7.8, 1.1, "Reg: absolute\ndifferences", "loss", width=1.3))
    p.arrow(bridges, regularised)
    return p


def peg() -> Picture:
    p = Picture(8.4, 3.0)
    encoder = p.box(2.8, 1.65, "encoder", "trained", width=1.0)
    for y, text in ((2.5, "queries"), (1.65, "their positives"), (0.8, "mined hard\nnegatives")):
        p.arrow(p.box(0.95, y, text, "data"), encoder)
    cosines = p.box(4.5, 1.65, "cosines of all\nqueries and candidates", "computed", width=1.7)
    weights = p.box(
        5.2, 2.6, "weights exp(λ difficulty), constants:\nharder negatives count more", "computed", width=2.8
    )
    ramp = p.box(7.6, 2.6, "λ grows over\nthe steps", "computed", width=1.2)
    loss = p.box(7.6, 1.65, "weighted\nInfoNCE", "loss", width=1.2)
    p.chain(encoder, cosines, loss)
    p.chain(cosines, weights, loss)
    p.arrow(ramp, weights)
    return p


def disco() -> Picture:
    p = Picture(8.4, 3.6)
    image = p.box(0.8, 2.0, "image,\ntwo views", "data", width=1.1)
    parts = {
        "teacher": p.box(2.8, 3.1, "large teacher", "not trained", width=1.5),
        "student": p.box(2.8, 2.0, "small student, hidden\nlayer of 2,048", "trained", width=1.5),
        "key": p.box(2.8, 0.85, "mean student: its\nmoving average", "not trained", width=1.5),
    }
    outputs = {
        "teacher": p.box(4.9, 3.1, "last embedding", "computed", width=1.4),
        "student": p.box(4.9, 2.0, "last embedding", "computed", width=1.4),
        "key": p.box(4.9, 0.85, "key", "computed", width=1.4),
    }
    for name, part in parts.items():
        p.chain(image, part, outputs[name])
    p.arrow(parts["student"], parts["key"])
    queue = p.box(6.4, 0.85, "queue of\nother keys", "computed", width=1.0)
    distance = p.box(7.2, 2.75, "squared distance,\nboth views", "loss", width=1.4)
    contrast = p.box(7.2, 1.75, "contrast: own key\namong all others", "loss", width=1.4)
    p.arrow(outputs["teacher"], distance)
    p.arrow(outputs["student"], distance)
    p.arrow(outputs["student"], contrast)
    p.arrow(outputs["key"], contrast)
    p.chain(outputs["key"], queue, contrast)
    return p


def dsan() -> Picture:
    p = Picture(8.6, 3.2)
    crop = p.box(0.7, 1.6, "crop of\na word", "data", width=0.9)
    features = p.box(2.0, 1.6, "convolutions:\nfeatures F", "trained", width=1.2)
    mask = p.box(2.9, 2.75, "text attention: mask A", "trained", width=1.9, height=0.4)
    weighed = p.box(3.6, 1.6, "(1 + A) F", "computed", width=1.0)
    columns = p.box(5.0, 1.6, "columns of\nthe image", "computed", width=1.1)
    p.chain(crop, features, weighed, columns)
    p.chain(features, mask, weighed)
    context = p.box(6.4, 2.4, "bidirectional\nLSTM", "trained", width=1.1)
    enhancement = p.box(6.4, 0.85, "one linear\nlayer", "trained", width=1.1)
    read = p.box(7.85, 2.4, "CTC of\nthe word", "loss", width=1.0)
    helped = p.box(7.85, 0.85, "λ CTC of the\nsame word", "loss", width=1.0)
    p.chain(columns, context, read)
    p.chain(columns, enhancement, helped)
    p.note(7.1, 2.9, "context branch: reads")
    p.note(7.1, 1.35, "enhancement branch: trains")
    return p


METHODS = {f.__name__.replace("_", "-"): f for f in (eclstm, sinkd, softclip, mmict, iqa_distill, peg, disco, dsan)}

if __name__ == "__main__":
    for name, draw in METHODS.items():
        figure = draw().figure
        figure.savefig(Path(__file__).parent / f"methods/{name}.svg", transparent=True, metadata={"Date": None})
        for folder in sys.argv[1:]:
            figure.savefig(Path(folder) / f"{name}.png", dpi=110)
