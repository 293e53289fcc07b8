"""Batches of queries, positives and hard negatives, in which every text is encoded once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peg.grad_cache import Features

Rows = Sequence[dict[str, Any]]


@dataclass
class PegCollator:
    """Rows of :mod:`peg.data` (query, pos, neg, and ids where known) as a batch for :class:`ProgressiveContrastiveLoss`.

    A query with several positives gets one of them, one with more hard negatives than wanted a sample; the draw depends on seed,
    ``epoch`` and query alone. A missing hard negative is masked, not filled up.

    Args:
        preprocess: texts, prompt and, if one is set, max_length -> features, as SentenceTransformer.preprocess.
        hard_negatives: of each query, k. sources: names of the rows' sources, in the order of the loss's ``in_batch``.
        query_prompt, passage_prompt: put before the texts. query_length, passage_length: tokens; None: the model's own.
        mask_known: give the ids by which known positives are masked.
    """

    preprocess: Callable[..., Features]
    hard_negatives: int = 5
    seed: int = 0
    query_prompt: str | None = None
    passage_prompt: str | None = None
    query_length: int | None = None
    passage_length: int | None = None
    sources: Sequence[str] = ()
    mask_known: bool = True
    epoch: int = 0
    valid_label_columns: list[str] = field(default_factory=list)  # the trainer asks

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """{"queries": features, "passages": features, "batch": where which text is, and ids for masks}.

        Raises:
            ValueError: for a row without a query or a positive, or of an unknown source.
        """
        queries, passages = _Distinct(), _Distinct()
        positives: list[tuple[str, str | None]] = []
        negatives: list[list[tuple[str, str | None]]] = []
        for row in rows:
            if not row.get("query") or not row.get("pos"):
                raise ValueError(f"a training row needs a query and a positive: {str(row)[:80]}")
            draw = random.Random(f"{self.seed} {self.epoch} {row['query']}")
            positives.append(_passages(row, "pos", 1, draw)[0])
            negatives.append(_passages(row, "neg", self.hard_negatives, draw))
        candidates = [*positives]
        mask = torch.tensor([[i < len(few) for i in range(self.hard_negatives)] for few in negatives], dtype=torch.bool)
        for i in range(self.hard_negatives):  # a missing one stands as the row's positive, masked
            candidates += [
                few[i] if i < len(few) else (text, None) for few, (text, _) in zip(negatives, positives, strict=True)
            ]
        batch: dict[str, Any] = {
            "queries": torch.tensor([queries.place(row["query"]) for row in rows]),
            "candidates": torch.tensor([passages.place(text) for text, _ in candidates]),
            "mask": mask.view(len(rows), self.hard_negatives),
        }
        if self.mask_known:
            ids = [(_number(text), -1 if id is None else _number(f"id {id}")) for text, id in candidates]
            batch["candidate_ids"] = torch.from_numpy(np.array(ids))  # faster than torch.tensor of lists
            batch["positive_ids"] = _known(rows)
        if self.sources:
            batch["sources"] = torch.tensor([self._source(row) for row in rows])
        return {
            "queries": self._tokens(queries.texts, self.query_prompt, self.query_length),
            "passages": self._tokens(passages.texts, self.passage_prompt, self.passage_length),
            "batch": batch,
        }

    def _tokens(self, texts: list[str], prompt: str | None, length: int | None) -> Features:
        return self.preprocess(texts, prompt=prompt, **({} if length is None else {"max_length": length}))

    def _source(self, row: dict[str, Any]) -> int:
        if row.get("source") not in self.sources:
            raise ValueError(f"a row is of source {row.get('source')!r}; known are {', '.join(self.sources)}")
        return list(self.sources).index(row["source"])


class _Distinct:
    """Texts in order of first use, each once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))

    @property
    def texts(self) -> list[str]:
        return list(self.places)


def _passages(row: dict[str, Any], which: str, most: int, draw: random.Random) -> list[tuple[str, str | None]]:
    """Up to ``most`` passages of a row, each with its id or None."""
    texts, ids = row.get(which) or [], row.get(f"{which}_ids") or []
    both = list(zip(texts, ids or [None] * len(texts), strict=True))
    return draw.sample(both, most) if len(both) > most else both


def _known(rows: Rows) -> Tensor:
    """Hashes of texts and ids of all positives of each query (b, p), filled up by -1; rows with the same query share theirs."""
    of_query: dict[str, set[int]] = {}
    for row in rows:
        ids = (f"id {id}" for id in row.get("pos_ids") or ())
        of_query.setdefault(row["query"], set()).update(_number(word) for word in (*row["pos"], *ids))
    width = max(map(len, of_query.values()))
    known = [sorted(of_query[row["query"]]) for row in rows]
    return torch.tensor([[*few, *[-1] * (width - len(few))] for few in known])


def _number(text: str) -> int:
    """63 bits that tell texts apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
