"""How good rankings are: nDCG, MRR, Recall and MAP, with the conventions of TREC's evaluation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`retrieval_metrics` returns.

    Attributes:
        mean: metric -> its mean over the queries, between 0 and 1. Metrics are "nDCG@k", "MRR@k", "Recall@k", "MAP@k".
        per_query: metric -> query id -> value, in the order of the qrels; for paired tests.
        dropped: queries left out because no document is relevant to them.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    dropped: int


def retrieval_metrics(
    run: Mapping[str, Sequence[str] | Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ks: Sequence[int] = (10, 100),
    map_denominator: Literal["relevant", "min"] = "relevant",
) -> RetrievalMetrics:
    """Judge the ranking of every query that has a relevant document, that is one of gain above 0.

    With gain g_r at rank r, at each cutoff k::

        nDCG   = DCG / (DCG of all judged documents in the best order);  DCG = sum_{r <= k} g_r / log2(r + 1)
        MRR    = 1 / rank of the first relevant document, 0 if none is among the first k
        Recall = share of the relevant documents among the first k
        MAP    = sum_{r <= k, relevant} precision at r / relevant documents

    The gain is linear and documents that were not judged have gain 0, as in trec_eval and pytrec_eval.

    Args:
        run: query id -> document ids, best first; or -> {document id: score}, higher is better, where documents of equal score
            keep the order given. A query without results has an empty list. Queries that ``qrels`` lacks are ignored.
        qrels: query id -> {document id: gain}.
        ks: cutoffs, 1 or more.
        map_denominator: what MAP divides by: all relevant documents, or "min": at most k of them, as sentence-transformers does.

    Raises:
        ValueError: if the run lacks a query, ranks a document twice or has a score that is no number; if no query has a
            relevant document; for a cutoff below 1.

    >>> result = retrieval_metrics({"q": ["b", "a", "c"]}, {"q": {"a": 2, "c": 1}, "unanswerable": {"a": 0}}, ks=[2])
    >>> {name: round(value, 3) for name, value in result.mean.items()}, result.dropped
    ({'nDCG@2': 0.48, 'MRR@2': 0.5, 'Recall@2': 0.5, 'MAP@2': 0.25}, 1)
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be cutoffs of at least 1, got {tuple(ks)}")
    if map_denominator not in ("relevant", "min"):
        raise ValueError(f"map_denominator must be relevant or min, got {map_denominator!r}")
    judged = {query: gains for query, gains in qrels.items() if any(gain > 0 for gain in gains.values())}
    if not judged:
        raise ValueError(f"none of the {len(qrels)} queries has a relevant document; nothing can be measured")
    if missing := [query for query in judged if query not in run]:
        raise ValueError(
            f"the run lacks {len(missing)} judged queries ({', '.join(map(str, missing[:5]))}); "
            "give a query without results an empty list"
        )
    per_query: dict[str, dict[str, float]] = {
        f"{name}@{k}": {} for name in ("nDCG", "MRR", "Recall", "MAP") for k in ks
    }
    for query, gains in judged.items():
        ranking = [max(gains.get(document, 0), 0) for document in _ranking(query, run[query])]
        best = sorted((gain for gain in gains.values() if gain > 0), reverse=True)
        hits = [gain > 0 for gain in ranking]
        found = list(itertools.accumulate(hits))
        for k in ks:
            precisions = [found[r] / (r + 1) for r, hit in enumerate(hits[:k]) if hit]
            denominator = min(k, len(best)) if map_denominator == "min" else len(best)
            per_query[f"nDCG@{k}"][query] = _dcg(ranking[:k]) / _dcg(best[:k])
            per_query[f"MRR@{k}"][query] = 1 / (1 + hits.index(True)) if any(hits[:k]) else 0.0
            per_query[f"Recall@{k}"][query] = len(precisions) / len(best)
            per_query[f"MAP@{k}"][query] = sum(precisions) / denominator
    mean = {name: math.fsum(values.values()) / len(values) for name, values in per_query.items()}
    return RetrievalMetrics(mean, per_query, len(qrels) - len(judged))


def _ranking(query: str, results: Sequence[str] | Mapping[str, float]) -> list[str]:
    if isinstance(results, Mapping):
        for document, score in results.items():
            if math.isnan(score):
                raise ValueError(f"query {query}: the score of document {document} is not a number")
        return sorted(results, key=results.__getitem__, reverse=True)  # a stable sort
    if len(set(results)) < len(results):
        twice = next(document for i, document in enumerate(results) if document in results[:i])
        raise ValueError(f"query {query}: document {twice} is ranked twice; list each document once")
    return list(results)


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
