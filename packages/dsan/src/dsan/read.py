"""Reading crops with a trained model; the verb ``read``."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.images import find_images
from papercore.lab.report import console, print_table
from papercore.ops import pick_device
from PIL import Image
from safetensors import SafetensorError

from dsan.decode import Reading
from dsan.images import collate, fit, normalize, open_image
from dsan.model import DSAN
from dsan.plots import overlay

CHUNK = 1024  # crops in memory at a time


def load_model(folder: str | Path) -> DSAN:
    """The model in a folder that a finished run wrote, in evaluation mode, on the device that is there.

    Raises:
        FileNotFoundError: if there is no such folder or file. ValueError: if its files do not fit together.
    """
    for name in ("config.json", "model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected a folder that `dsan train` wrote")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it reads a local folder
            model: DSAN = DSAN.from_pretrained(folder, strict=True)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not a model of dsan: {textwrap.shorten(str(error), 500)}") from None
    return model.eval().to(pick_device())


@dataclass
class SearchOptions:
    """How texts are found in the frames' probabilities."""

    search: str = flag("greedy or beam", "greedy")
    beam_width: int = flag("beam: prefixes kept at every frame", 10)
    lexicon: str | None = flag("file with a word a line: read the likeliest of these instead", None)
    lexicon_mode: str = flag("lexicon: ctc (by probability) or edit (fewest edits from the greedy text)", "ctc")
    max_edits: int | None = flag(
        "lexicon by ctc: of words at most so many edits from the greedy text; 3 is usual", None
    )
    batch_size: int = flag("crops read at a time; it does not change what is read", 64)

    def keywords(self) -> dict[str, Any]:
        """For :meth:`dsan.DSAN.read`.

        Raises:
            ValueError: for a search or batch_size we do not have, or a lexicon that is not UTF-8. OSError: for none at all.
        """
        if self.search not in ("greedy", "beam"):
            raise ValueError(f"search {self.search!r} is unknown: choose greedy or beam, or give --lexicon FILE")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        found: dict[str, Any] = {"search": self.search, "batch_size": self.batch_size}
        if self.lexicon is not None:
            found |= {"search": "lexicon", "lexicon": _lines(self.lexicon)}
            return found | {"lexicon_mode": self.lexicon_mode, "max_edits": self.max_edits}
        return found | ({"beam_width": self.beam_width} if self.search == "beam" else {})


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def recognise(
    model: DSAN, fitted: Iterable[NDArray[np.uint8]], decode: Sequence[str] = ("ctx",), **search: Any
) -> dict[str, list[Reading]]:
    """What each of the branches reads in some crops, which are taken a thousand at a time.

    Args:
        fitted: crops as :func:`dsan.images.fit` makes them. decode: ctx, enh, fuse. search: options of :meth:`dsan.DSAN.read`.

    Raises:
        ValueError: as :meth:`dsan.DSAN.read`.
    """
    readings: dict[str, list[Reading]] = {branch: [] for branch in decode}
    stream = iter(fitted)
    while chunk := list(islice(stream, CHUNK)):
        for branch, found in readings.items():
            found += model.read_fitted(chunk, decode=branch, **search)
    return readings


@dataclass
class ReadOptions:
    """What to read, and what to do with it."""

    model: str = flag("folder that `dsan train` wrote")
    images: list[str] = flag("crops of words: files, folders, patterns", positional=True)
    decode: str = flag("branch to read from: ctx, enh, fuse (of each word the surer one)", "ctx")
    json: str | None = flag("write texts and confidences there; - is the terminal, which then gets no table", None)
    overlay: str | None = flag("folder for a picture of each crop with its attention map and text", None)


def read(options: ReadOptions, search: SearchOptions) -> dict[Path, Reading]:
    """The verb ``read``: a table or JSON. A file that is no image is told in a line on stderr, and the others are read.

    Raises:
        ValueError: if no file could be read. Others: as :func:`find_images`, :func:`load_model` and :func:`recognise`.
    """
    paths = find_images(options.images)
    model = load_model(options.model)
    keywords = search.keywords()
    readable: list[Path] = []
    fitted = (fit(image, **asdict(model.size)) for image in _readable(paths, readable))
    readings = recognise(model, fitted, [options.decode], **keywords)[options.decode]
    if not readings:
        raise ValueError(f"none of the {len(paths)} files could be read")
    found = dict(zip(readable, readings, strict=True))
    if options.json is not None:
        rows = [
            {"image": str(path), "text": r.text, "confidence": r.confidence, "branch": r.branch}
            | {"characters": [[character, confidence] for character, confidence in r.characters]}
            for path, r in found.items()
        ]
        if options.json == "-":
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            console.print(str(write_json(options.json, rows)), soft_wrap=True)
    if options.json != "-":
        table = [[str(path), r.text, f"{r.confidence:.3f}"] for path, r in found.items()]
        print_table(f"{len(found)} of {len(paths)} images", ["image", "text", "confidence"], table)
    if options.overlay is not None:
        digits = len(str(len(found)))
        for number, (path, reading) in enumerate(found.items(), 1):  # several folders may have files of one name
            _overlay(model, Path(options.overlay) / f"{number:0{digits}}-{path.stem}.png", path, reading)
    return found


def _readable(paths: Sequence[Path], readable: list[Path]) -> Iterator[Image.Image]:
    """The images that can be opened; their paths are appended to ``readable``."""
    for path in paths:
        try:
            image = open_image(path)
        except (ValueError, OSError) as error:
            print(f"dsan: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        readable.append(path)
        yield image


@torch.no_grad()
def _overlay(model: DSAN, target: Path, path: Path, reading: Reading) -> None:
    image, attention = open_image(path), None
    if model.size.turns(*image.size):
        image = image.transpose(Image.Transpose.ROTATE_90)
    if model.attention is not None:
        pixels, widths = collate([fit(image, **asdict(model.size))])
        device = next(model.parameters()).device
        attention = model.attention_map(normalize(pixels).to(device), widths.to(device))[0, :, : int(widths[0])].cpu()
    overlay(target, image, attention, reading)
