"""Synthetic words as a data set with character boxes, for this or any other recogniser; the verb ``synth``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from papercore.lab.cli import flag
from papercore.lab.report import console
from PIL import Image, ImageDraw

from dsan.charset import ALPHANUMERIC
from dsan.convert import write_boxes, write_crops
from dsan.fonts import find_fonts
from dsan.synthetic import SyntheticWords, render_words
from dsan.vocabulary import read_words

COLUMNS, ROWS, CELL = 6, 8, (200, 76)  # of the sheet, and pixels of a word's place in it


@dataclass
class SynthOptions:
    """What to draw."""

    output: str = flag("what to make: a folder, or a .zip", positional=True)
    count: int = flag("crops", 1000)
    words: str | None = flag("file of words, text or .gz; by default common and invented ones of our own", None)
    fonts: str | None = flag("folder of fonts; by default those of the system and of matplotlib", None)
    characters: str = flag("the characters of the labels", ALPHANUMERIC)
    height: int = flag("of the crops, pixels; their widths follow the words", 32)
    seed: int = flag("of the draws", 0)
    workers: int | None = flag("processes; by default one for each core", None)
    to: str = flag("folder (images and gt.txt), json, zip or lmdb: see convert", "folder")


def synth(options: SynthOptions) -> Path:
    """The verb ``synth``. Beside OUTPUT it writes OUTPUT_chars.jsonl.gz, the character boxes, and OUTPUT_sheet.png."""
    words = read_words(options.words) if options.words else None
    engine = SyntheticWords(
        words,
        find_fonts(options.fonts),
        seed=options.seed,
        height=options.height,
        width=None,
        characters=options.characters,
    )
    images, labels, _, boxes = render_words(options.count, engine, options.workers)
    names = write_crops(options.output, options.to, _encoded(images, labels))
    sidecar = write_boxes(options.output, names, labels, boxes)
    sheet = sidecar.with_name(sidecar.name.replace("_chars.jsonl.gz", "_sheet.png"))
    draw_sheet(sheet, engine, min(options.count, COLUMNS * ROWS))
    message = f"{options.output}: {options.count:,} crops ({options.to}); boxes in {sidecar}, some of both in {sheet}"
    console.print(message, soft_wrap=True, markup=False)
    return Path(options.output)


def _encoded(images: list[np.ndarray], labels: list[str]) -> Iterator[tuple[str, bytes, str]]:
    for number, (image, label) in enumerate(zip(images, labels, strict=True), 1):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        yield f"{number:07d}.png", content.getvalue(), label


def draw_sheet(path: str | Path, engine: SyntheticWords, count: int) -> None:
    """A picture of the first words: crop with its boxes, the same beside it as text mask, the label below."""
    wide, tall = CELL
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide, rows * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for number in range(count):
        word = engine[number]
        left, top = number % COLUMNS * wide, number // COLUMNS * tall
        height, width = word.image.shape
        scale = min((wide / 2 - 4) / width, (tall - 20) / height)
        size = (max(1, round(scale * width)), max(1, round(scale * height)))
        sheet.paste(Image.fromarray(word.image).resize(size), (left, top))
        sheet.paste(Image.fromarray(word.mask).resize(size), (left + wide // 2, top))
        for x, y, w, h in (word.boxes * scale).tolist():
            pen.rectangle((left + x, top + y, left + x + w, top + y + h), outline="red")
        pen.text((left, top + tall - 18), word.label, "black")
    sheet.save(path)
