"""Pictures or videos with texts: what is learned from, judged on, and shown as demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from papercore.lab.images import open_image


@dataclass
class Samples:
    """n pairs of a picture, or a video's frames, and a text. Pictures are decoded when they are asked for.

    Args:
        images: distinct pictures: paths, or uint8 arrays (h, w, 3).
        frames: of each sample its rows of ``images``, in order: one of a picture, several of a video.
        texts: captions, cleaned (:func:`mmict.texts.clean_caption`), or answers.
        questions: "" for a caption.
        groups: equal for the same picture, video or concept; such samples are never demonstrations of each other.
        ids: unique.
        references: of each sample all captions of its pictures, or the answers of all annotators.
        demos: of each sample the ids of fixed demonstrations, which are training samples. None: they are to be drawn.
        splits: of each sample "train", "validation" or "test", as the data has it. None: it does not say.

    Raises:
        ValueError: for lists of other lengths, an id that is there twice, a sample without frames, a row that is not there.
    """

    images: list[Any]
    frames: list[tuple[int, ...]]
    texts: list[str]
    questions: list[str]
    groups: list[str]
    ids: list[str]
    references: list[list[str]]
    demos: list[tuple[str, ...]] | None = None
    splits: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "questions", "groups", "ids", "references", "demos", "splits"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{name} must be as many as texts, {len(self)}; got {len(values)}")
        twice = [name for name, count in Counter(self.ids).items() if count > 1]
        if twice:
            raise ValueError(f"each sample needs an id of its own, but {twice[0]!r} is there more than once")
        for name, rows in zip(self.ids, self.frames, strict=True):
            if not rows:
                raise ValueError(f"sample {name!r} has no frames; it needs at least 1 picture")
            if not 0 <= min(rows) <= max(rows) < len(self.images):
                raise ValueError(f"sample {name!r}: frames are rows of the {len(self.images)} images, got {rows}")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def kind(self) -> Literal["captions", "questions", "both"]:
        """What the texts are; "captions" if there are none."""
        if not any(self.questions):
            return "captions"
        return "questions" if all(self.questions) else "both"

    def open(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """The image of this row, upright by its EXIF data, in RGB; transparent pixels are on white.

        Raises:
            ValueError: if it cannot be decoded, naming the file. OSError: if it cannot be read.
        """
        name = f"image {row}" if isinstance(self.images[row], np.ndarray) else None
        return np.asarray(open_image(self.images[row], name).convert("RGB"))

    def select(self, rows: Sequence[int] | np.ndarray) -> Samples:
        """The samples of these rows, in this order, with no other images than theirs."""
        frames = [self.frames[i] for i in rows]
        used = sorted({row for each in frames for row in each})
        place = {row: i for i, row in enumerate(used)}
        return Samples(
            [self.images[row] for row in used],
            [tuple(place[row] for row in each) for each in frames],
            [self.texts[i] for i in rows],
            [self.questions[i] for i in rows],
            [self.groups[i] for i in rows],
            [self.ids[i] for i in rows],
            [self.references[i] for i in rows],
            None if self.demos is None else [self.demos[i] for i in rows],
            None if self.splits is None else [self.splits[i] for i in rows],
        )

    def check_demos(self, train: Samples) -> None:
        """Refuse fixed demonstrations that are no training samples, or that give the answer away.

        Raises:
            ValueError: for an id that ``train`` has not, or one of the sample itself or of its group; both are named.
        """
        groups = dict(zip(train.ids, train.groups, strict=True))
        for name, group, demos in zip(self.ids, self.groups, self.demos or [()] * len(self), strict=True):
            for demo in demos:
                if demo not in groups:
                    raise ValueError(
                        f"sample {name!r}: its demonstration {demo!r} is not among the training samples; give rows a split, "
                        "and do not cut the training samples short"
                    )
                if groups[demo] == group:
                    raise ValueError(
                        f"sample {name!r}: its demonstration {demo!r} is of the same group {group!r} and would give the "
                        "answer away; name another"
                    )
