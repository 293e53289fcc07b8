"""What a trained model says about pictures in files; the verbs ``caption`` and ``answer``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.images import find_images, open_image
from papercore.lab.report import console, print_table
from papercore.ops import pick_device
from PIL import Image

from mmict.corpus import Example
from mmict.demonstrations import MOST
from mmict.model import MMICTModel
from mmict.readers import read_jsonl


@dataclass
class GenerationOptions:
    """How texts are written."""

    num_beams: int = flag("beams of the search; 1 is greedy (official: 5)", 5)
    max_new_tokens: int = flag("tokens of a text at most (official: 30)", 30)
    min_length: int = flag("tokens of a text at least (official: 8 for captions of COCO)", 1)

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("max_new_tokens", 1), ("min_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.min_length > self.max_new_tokens:
            raise ValueError(f"min_length {self.min_length} is more than max_new_tokens {self.max_new_tokens}")


@dataclass(kw_only=True)
class CaptionOptions:
    """What to describe, and what to do with it."""

    model: str = flag("folder that `mmict train` wrote")
    images: list[str] = flag("files, folders, patterns", positional=True)
    demos: str | None = flag(
        f"file of at most {MOST} demonstrations for all images, rows as `train` takes them; the last is next to the image",
        None,
    )
    frames: bool = flag("all images are the frames of one video, in the order given", False)
    json: str | None = flag(
        "write rows there, as `train` takes them; - is the terminal, which then gets no table", None
    )
    batch_size: int = flag("images described at a time; it does not change what is said", 16)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(kw_only=True)
class AnswerOptions(CaptionOptions):
    """What to ask about which images, and what to do with the answers."""

    question: str = flag("asked about each image, such as 'what colour is the car?'")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.question.strip():
            raise ValueError("the question is empty; `mmict caption` describes images without one")


def caption(options: CaptionOptions, generation: GenerationOptions) -> list[dict[str, Any]]:
    """The verb ``caption``: a caption of each picture, or one of a video. A table, or JSON.

    A file that cannot be read is told in a line on stderr, and the others are described.

    Returns:
        What JSON has: rows with "image", or of a video "frames", and "text".

    Raises:
        ValueError: if no file could be read. Others: as :func:`find_images`, :func:`load_model` and :func:`read_demonstrations`.
    """
    return _describe(options, generation, "")


def answer(options: AnswerOptions, generation: GenerationOptions) -> list[dict[str, Any]]:
    """The verb ``answer``: as :func:`caption`, but one question is answered about each picture.

    Returns:
        Rows with "image" or "frames", "question" and "answer". Errors: as :func:`caption`.
    """
    return _describe(options, generation, options.question)


def load_model(folder: str | Path) -> MMICTModel:
    """The model in a folder, ready to write, on the device that is there. Errors: :meth:`MMICTModel.from_pretrained`."""
    return MMICTModel.from_pretrained(folder).to(pick_device()).eval()


def read_demonstrations(path: str | Path) -> list[Example]:
    """The rows of a file as demonstrations.

    Raises:
        ValueError: for more than 8, or as :func:`mmict.readers.read_jsonl`.
    """
    found = read_jsonl(path)
    if len(found) > MOST:
        raise ValueError(f"{path}: {len(found)} demonstrations, but at most {MOST} can be shown; leave some out")
    pictures = [[found.images[row] for row in rows] for rows in found.frames]
    return [Example(*row) for row in zip(pictures, found.texts, found.questions, strict=True)]


def _describe(options: CaptionOptions, generation: GenerationOptions, question: str) -> list[dict[str, Any]]:
    paths = find_images(options.images)
    model = load_model(options.model)
    shown = None if options.demos is None else model.encode_demonstrations(read_demonstrations(options.demos))
    readable: list[Path] = []
    queries: Iterator[Any] = _readable(paths, readable)
    if options.frames:
        video = list(queries)
        queries = iter([video] if video else [])
    texts: list[str] = []
    while chunk := list(islice(queries, options.batch_size)):
        texts += model.generate(chunk, [question] * len(chunk), demonstrations=shown, **asdict(generation))
    if not readable:
        raise ValueError(f"none of the {len(paths)} files could be read")
    names: list[dict[str, Any]] = [{"image": str(path)} for path in readable]
    if options.frames:
        names = [{"frames": [str(path) for path in readable]}]
    said = {"question": question} if question else {}
    rows = [name | said | {"answer" if question else "text": text} for name, text in zip(names, texts, strict=True)]
    if options.json == "-":
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return rows
    labels = [f"{readable[0]} and {len(readable) - 1} more"] if options.frames else [str(path) for path in readable]
    heads = ["video" if options.frames else "image", "answer" if question else "caption"]
    print_table(question or f"{len(readable)} of {len(paths)} images", heads, list(zip(labels, texts, strict=True)))
    if options.json is not None:
        console.print(str(write_json(options.json, rows)), soft_wrap=True, markup=False, highlight=False)
    return rows


def _readable(paths: Sequence[Path], readable: list[Path]) -> Iterator[Image.Image]:
    """The pictures that can be opened, in turn; their paths are appended."""
    for path in paths:
        try:
            picture = open_image(path)
        except (ValueError, OSError) as error:
            print(f"mmict: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        readable.append(path)
        yield picture
