"""A batch of dialogs, each some demonstrations and a query, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmict.corpus import Corpus


@dataclass
class Dialogs:
    """Pairs in the order of the dialogs; the last pair of a dialog is its query.

    ``vision``: (images, tokens, width) features, or (images, 3, s, s) normalised pixels, each distinct image once. ``frames``:
    (pairs, frames) rows of it, -1 where a pair has fewer. ``hub_ids``, ``hub_mask``: (pairs, text), what the hub reads: a
    demonstration's text, a query's prompt. ``lm_ids``, ``lm_mask``: (pairs, tokens), the same for the language model. ``query``:
    (pairs,). ``labels``: (dialogs, tokens) to be written, -100 where there is none; or None.
    """

    vision: Tensor
    frames: Tensor
    hub_ids: Tensor
    hub_mask: Tensor
    lm_ids: Tensor
    lm_mask: Tensor
    query: Tensor
    labels: Tensor | None = None

    def to(self, device: Any) -> Dialogs:
        """The same on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Dialogs(**{name: None if value is None else value.to(device) for name, value in moved.items()})


def make_dialogs(
    queries: Corpus,
    rows: Sequence[int],
    pool: Corpus,
    demonstrations: Sequence[Sequence[int]],
    choices: Sequence[int] | None = None,
) -> Dialogs:
    """Dialogs of query ``rows``, each after its demonstrations: rows of ``pool``. ``choices``: prompts of captions, by number."""
    seen: dict[bool, dict[int, int]] = {False: {}, True: {}}  # of the pool or not: image -> number among these
    frames, hub, lm, query = [], [], [], []

    def add(corpus: Corpus, row: int, texts: tuple[list[int], list[int]], last: bool) -> None:
        numbers = seen[corpus is pool]
        frames.append([(corpus is pool, numbers.setdefault(i, len(numbers))) for i in corpus.samples.frames[row]])
        hub.append(texts[0])
        lm.append(texts[1])
        query.append(last)

    for i, row in enumerate(rows):
        for shown in demonstrations[i]:
            add(pool, shown, (pool.hub_texts[shown], pool.lm_texts[shown]), False)
        add(queries, row, queries.prompt(row, choices[i] if choices is not None else 0), True)
    vision = [
        corpus.pictures(torch.tensor(list(numbers)))
        for corpus, numbers in ((queries, seen[False]), (pool, seen[True]))
        if numbers
    ]
    numbered = [[number + of_pool * len(seen[False]) for of_pool, number in of] for of in frames]
    hub_ids, hub_mask = pad(hub)
    lm_ids, lm_mask = pad(lm, queries.processor.pad)
    return Dialogs(
        torch.cat(vision), pad(numbered, -1)[0], hub_ids, hub_mask, lm_ids, lm_mask,
        torch.tensor(query), pad([queries.targets[row] for row in rows], -100)[0],
    )  # fmt: skip


def pad(ids: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different length in one tensor, filled up with ``value``; and where they are: (rows, longest), int64 and bool."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.full(mask.shape, value)
    padded[mask] = torch.tensor([i for row in ids for i in row])
    return padded, mask
