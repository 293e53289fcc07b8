"""The verb ``score``: the quality of images in files, as a table, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json, write_text
from papercore.lab.images import find_images
from papercore.lab.report import console, print_table
from PIL import Image

from iqa_distill.images import open_rgb
from iqa_distill.metric import load_model
from iqa_distill.plots import plot_falling
from iqa_distill.scoring import score_images

THUMBNAIL = 160  # pixels


@dataclass
class ScoreOptions:
    """What to score, and what to do with it."""

    model: str = flag("folder that `iqa-distill train` wrote")
    images: list[str] = flag("files, folders, patterns", positional=True)
    csv: str | None = flag("write image,score there", None)
    json: str | None = flag("write images and scores there; - is the terminal, which then gets no table", None)
    normalize: bool = flag("0..1 for the range of the training scores, not their own units", False)
    crops: int | None = flag("crops of each image; the model's own number if not given", None)
    max_crops_per_batch: int = flag("bounds the memory; it does not change a score", 64)
    plot: str | None = flag("picture of scores, in the order given, with thumbnails", None)


def score(options: ScoreOptions) -> dict[Path, float]:
    """The verb ``score``. A file that cannot be read is told in a line on stderr, and the others are scored.

    Raises:
        ValueError: if no file could be read. Others: as :func:`find_images` and
            :func:`iqa_distill.metric.load_model`.
    """
    paths = find_images(options.images)
    model = load_model(options.model)
    if options.crops is not None:
        model.preprocessing = dataclasses.replace(model.preprocessing, crops=options.crops)
    readable: list[Path] = []
    thumbnails: list[NDArray[np.uint8]] | None = None if options.plot is None else []
    scores = score_images(
        model,
        _readable(paths, readable, thumbnails),
        normalize=options.normalize,
        max_crops_per_batch=options.max_crops_per_batch,
    ).tolist()
    if not readable:
        raise ValueError(f"none of the {len(paths)} files could be read")
    found = dict(zip(readable, scores, strict=True))
    low, high = (0.0, 1.0) if options.normalize else (model.scale.low, model.scale.high)
    if options.json != "-":
        title = f"{len(found)} of {len(paths)} images; training scores were {low:g} to {high:g}, higher is better"
        print_table(title, ["image", "score"], [[str(path), f"{value:.4g}"] for path, value in found.items()])
    written = _write(options, found, (low, high))
    if options.plot is not None:
        plot_falling(options.plot, thumbnails or [], scores, [path.name for path in found])
        written.append(options.plot)
    if written and options.json != "-":
        console.print(", ".join(written), soft_wrap=True, markup=False, highlight=False)
    return found


def _readable(
    paths: Sequence[Path], readable: list[Path], thumbnails: list[NDArray[np.uint8]] | None
) -> Iterator[NDArray[np.uint8]]:
    """The images that can be opened, in turn; their paths, and small ones of them, are appended."""
    for path in paths:
        try:
            image = open_rgb(path)
        except (ValueError, OSError) as error:
            print(f"iqa-distill: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        readable.append(path)
        if thumbnails is not None:
            small = Image.fromarray(image)
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails.append(np.asarray(small))
        yield image


def _write(options: ScoreOptions, found: dict[Path, float], scale: tuple[float, float]) -> list[str]:
    written = []
    if options.csv is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["image", "score"], *found.items()])
        written.append(str(write_text(options.csv, text.getvalue())))
    if options.json is not None:
        about = {"model": options.model, "score_range": scale, "lower_better": False}
        record = about | {"scores": [{"image": str(path), "score": value} for path, value in found.items()]}
        if options.json == "-":
            print(json.dumps(record, indent=2, ensure_ascii=False))
        else:
            written.append(str(write_json(options.json, record)))
    return written
