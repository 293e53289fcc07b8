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
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: None if value is None else value.to(device) for name, value in moved.items()}
        return Dialogs(**moved)


def make_dialogs(
    queries: Corpus,
    rows: Sequence[int],
    pool: Corpus,
    demonstrations: Sequence[Sequence[int]],
    choices: Sequence[int] | None = None,
) -> Dialogs:
    """Dialogs of query ``rows``, each after its demonstrations: rows of ``pool``. ``choices``: prompts of captions, by number."""
    pairs: list[Pair] = []
    for i, row in enumerate(rows):
        pairs += [(pool, shown, (pool.hub_texts[shown], pool.lm_texts[shown]), False) for shown in demonstrations[i]]
        pairs.append((queries, row, queries.prompt(row, choices[i] if choices is not None else 0), True))
    return _collate(pairs, pad([queries.targets[row] for row in rows], -100)[0])


def make_demonstrations(pool: Corpus) -> Dialogs:
    """All of a corpus as demonstrations without a query."""
    return _collate([(pool, i, (pool.hub_texts[i], pool.lm_texts[i]), False) for i in range(len(pool))], None)


Pair = tuple[
    Corpus, int, tuple[list[int], list[int]], bool
]  # of which samples, row, text for the hub and the LM, query


def _collate(pairs: Sequence[Pair], labels: Tensor | None) -> Dialogs:
    seen: dict[int, tuple[Corpus, dict[int, int]]] = {}  # by corpus: image -> number among those of it
    numbered = []
    for corpus, row, _, _ in pairs:
        _, numbers = seen.setdefault(id(corpus), (corpus, {}))
        numbered.append([(id(corpus), numbers.setdefault(i, len(numbers))) for i in corpus.samples.frames[row]])
    sizes = [len(numbers) for _, numbers in seen.values()]
    before = {key: sum(sizes[:i]) for i, key in enumerate(seen)}
    vision = torch.cat([corpus.pictures(torch.tensor(list(numbers))) for corpus, numbers in seen.values()])
    frames = pad([[before[key] + number for key, number in of] for of in numbered], -1)[0]
    hub_ids, hub_mask = pad([texts[0] for _, _, texts, _ in pairs])
    lm_ids, lm_mask = pad([texts[1] for _, _, texts, _ in pairs], pairs[0][0].processor.pad)
    query = torch.tensor([last for _, _, _, last in pairs])
    return Dialogs(vision, frames, hub_ids, hub_mask, lm_ids, lm_mask, query, labels)


def pad(ids: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different length in one tensor, filled up with ``value``; and where they are: (rows, longest), int64 and bool."""
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = torch.full(mask.shape, value)
    padded[mask] = torch.tensor([i for row in ids for i in row])
    return padded, mask
