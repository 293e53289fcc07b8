"""Samples made ready: texts as token ids, pictures as features or pixels, and what neighbours are found by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from papercore.lab.images import Source
from torch import Tensor

from mmict.demonstrations import SAMPLERS, DemonstrationSampler
from mmict.features import encode
from mmict.processor import Processor
from mmict.samples import Samples
from mmict.texts import demonstration_text, prompt
from mmict.vision import VisionEncoder

Pictures = Callable[[Tensor], Tensor]
Images = Source | Sequence[Source]  # a picture, or the frames of a video


class Corpus:
    """Samples whose texts are tokenized once, and whose pictures can be had by row.

    Args:
        samples: see :class:`mmict.samples.Samples`. processor: tokenizes.
        pictures: rows of ``samples.images`` -> features (n, tokens, width) or pixels (n, 3, s, s) of them.

    ``visual`` and ``text``: (samples, width), what neighbours are found by; None where there is none.
    """

    def __init__(self, samples: Samples, processor: Processor, pictures: Pictures) -> None:
        self.samples, self.processor, self.pictures = samples, processor, pictures
        shown = [demonstration_text(*pair) for pair in zip(samples.texts, samples.questions, strict=True)]
        self.hub_texts, self.lm_texts = processor.hub(shown), processor.lm(shown)
        self.targets = processor.targets(samples.texts)
        self.visual: Tensor | None = None
        self.text: Tensor | None = None
        self._prompts: dict[str, tuple[list[int], list[int]]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def prompt(self, row: int, choice: int = 0) -> tuple[list[int], list[int]]:
        """The prompt of a query for the hub and for the language model; ``choice`` is which of the prompts for captions."""
        text = prompt(self.samples.questions[row], len(self.samples.frames[row]) > 1, choice)
        if text not in self._prompts:
            self._prompts[text] = (self.processor.hub([text])[0], self.processor.lm([text])[0])
        return self._prompts[text]

    def demonstrations(
        self, rows: Sequence[int], sampler: DemonstrationSampler, pool: Corpus, k: int, epoch: int = 0
    ) -> list[list[int]]:
        """Rows of the pool for each of these queries: the k that come last of those it names itself, or else drawn ones."""
        found: list[list[int]] = [[] for _ in rows]
        fixed = self.samples.demos or [()] * len(self)
        drawn = [i for i, row in enumerate(rows) if not fixed[row]]
        for i, row in enumerate(rows):
            if fixed[row] and k:
                found[i] = [pool.row_of[name] for name in fixed[row][-k:]]
        if drawn and k:
            at = [rows[i] for i in drawn]
            chosen = sampler.draw(
                [self.samples.ids[row] for row in at], [self.samples.groups[row] for row in at],
                visual=None if self.visual is None else self.visual[at], text=None if self.text is None else self.text[at],
                epoch=epoch, k=k,
            )  # fmt: skip
            for i, rows_of in zip(drawn, chosen.tolist(), strict=True):
                found[i] = rows_of
        return found

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Of each id."""
        return {name: row for row, name in enumerate(self.samples.ids)}


@dataclass
class Example:
    """A demonstration: its picture (or the frames of its video), the text, and the question that the text answers, if any.

    >>> caption = Example("dog.jpg", "a dog runs")
    >>> answer = Example(["first.jpg", "last.jpg"], "red", question="what colour is the car?")  # frames of a video
    >>> caption.question, answer.text
    ('', 'red')
    """

    images: Images
    text: str
    question: str = ""


def corpus_of(examples: Sequence[Example], processor: Processor, vision: VisionEncoder) -> Corpus:
    """Examples as samples, each of a group of its own; their pictures are pixels."""
    images: list[Any] = []
    frames = []
    for example in examples:
        own = list(example.images) if isinstance(example.images, list | tuple) else [example.images]
        frames.append(tuple(range(len(images), len(images) + len(own))))
        images += own
    names = [str(i) for i in range(len(examples))]
    texts, questions = [example.text for example in examples], [example.question for example in examples]
    samples = Samples(images, frames, texts, questions, names, names, [[text] for text in texts])
    return Corpus(samples, processor, lambda rows: vision.pixels([samples.open(i) for i in rows.tolist()]))


def prepare(model: Any, samples: Samples, cache: str | Path | None = None) -> Corpus:
    """Samples for a model: every image is encoded once and its features are kept in ``cache`` (None: in memory)."""
    features = encode(model.vision, samples, cache, device=model.device)
    corpus = Corpus(samples, model.processor, features.__getitem__)
    pooled = features.pooled()
    corpus.visual = torch.stack([pooled[list(frames)].mean(0) for frames in samples.frames])
    if any(samples.questions):
        table = model.lm.get_input_embeddings().weight.detach().float().cpu()
        tokens = model.processor.lm(samples.questions)
        corpus.text = torch.stack([F.normalize(table[ids], dim=1).mean(0) for ids in tokens])
    return corpus


def augmented(corpus: Corpus, vision: VisionEncoder) -> Corpus:
    """The same samples, but their pictures are pixels of random crops, drawn by torch's global generator."""

    def crops(rows: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, ()))
        opened = [corpus.samples.open(i) for i in rows.tolist()]
        return vision.augmented(opened, torch.Generator().manual_seed(seed))

    found = copy.copy(corpus)
    found.pictures = crops
    return found


def new_sampler(pool: Corpus, sampler: str = "random", k: int = 2, seed: int = 0) -> DemonstrationSampler:
    """A sampler over a corpus. Text neighbours are those of the questions, since a caption is not known before it is written.

    Raises:
        ValueError: for text neighbours of samples without questions, and as :class:`DemonstrationSampler`.
    """
    needed: tuple[str, ...] = SAMPLERS.get(sampler, ())
    if "text" in needed and pool.text is None:
        raise ValueError(f"sampler {sampler!r} compares questions, but these samples have none: take random or visual")
    samples = pool.samples
    given = {name: getattr(pool, name) for name in needed}
    return DemonstrationSampler(samples.ids, samples.groups, k=k, sampler=sampler, seed=seed, **given)
