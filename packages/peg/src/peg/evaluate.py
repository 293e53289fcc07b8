"""Judging an encoder on a retrieval set: exact search, then the metrics; the verb ``eval``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from sentence_transformers import SentenceTransformer
from torch import Tensor

from peg.bm25 import bm25_run
from peg.data import RetrievalData, read_beir
from peg.encode import encode_texts
from peg.metrics import RetrievalMetrics, retrieval_metrics
from peg.models import load_model
from peg.sample import sample
from peg.search import top_k

COLUMNS = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP@100")


def read_split(data: str, split: str) -> RetrievalData:
    """A split of the sample (``data`` is "sample") or of a BEIR folder.

    Raises:
        ValueError, OSError: as :func:`peg.data.read_beir`, and for a split that the sample lacks.
    """
    if data != "sample":
        return read_beir(data, split)
    splits = sample()
    if split not in splits:
        raise ValueError(f"the sample has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def model_run(
    model: SentenceTransformer,
    data: RetrievalData,
    k: int = 100,
    *,
    batch_size: int = 64,
    documents: Tensor | None = None,
) -> dict[str, list[str]]:
    """Each query's k documents of highest cosine, best first; equal ones in the order of the corpus.

    Args:
        documents: the corpus's embeddings, if they are known.
    """
    queries = encode_texts(model, list(data.queries.values()), side="query", batch_size=batch_size)
    if documents is None:
        documents = encode_texts(model, list(data.corpus.values()), side="passage", batch_size=batch_size)
    ids = list(data.corpus)
    found = top_k(queries, documents, k)[1].tolist()
    return {query: [ids[i] for i in row] for query, row in zip(data.queries, found, strict=True)}


def evaluate(
    model: SentenceTransformer,
    data: RetrievalData,
    *,
    ks: Sequence[int] = (10, 100),
    batch_size: int = 64,
    documents: Tensor | None = None,
) -> RetrievalMetrics:
    """The metrics of a model's exact search, by cosine.

    Args:
        ks: cutoffs. batch_size: texts encoded at a time. documents: the corpus's embeddings, if they are known.

    Raises:
        ValueError: as :func:`peg.metrics.retrieval_metrics` and :func:`peg.encode.encode_texts`.
    """
    return retrieval_metrics(
        model_run(model, data, max(ks), batch_size=batch_size, documents=documents), data.qrels, ks=ks
    )


@dataclass
class EvalOptions:
    """What to judge."""

    model: str | None = flag("folder that `peg train` wrote, or any SentenceTransformer folder or Hub name", None)
    data: str = flag("sample, or a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, plain or .gz", "sample")
    split: str = flag("which queries", "test")
    bm25: bool = flag("judge BM25, too", False)
    batch_size: int = flag("texts encoded at a time", 64)
    output_dir: str | None = flag(
        "where metrics.json and per_query.json go; eval-DATA-SPLIT in the model's folder if not given", None
    )


def evaluate_verb(options: EvalOptions) -> dict[str, RetrievalMetrics]:
    """The verb ``eval``: a table, metrics.json, and per_query.json for paired tests."""
    if options.model is None and not options.bm25:
        raise ValueError("nothing to judge: give --model, --bm25, or both")
    model = None if options.model is None else load_model(options.model)
    data = read_split(options.data, options.split)
    results: dict[str, RetrievalMetrics] = {}
    if options.bm25:
        results["BM25"] = retrieval_metrics(bm25_run(data), data.qrels)
    if model is not None:
        results[str(options.model)] = evaluate(model, data, batch_size=options.batch_size)
    judged = len(next(iter(results.values())).per_query[COLUMNS[0]])
    dropped = len(data.qrels) - judged
    without = f"; {dropped} more without a relevant document left out" if dropped else ""
    print_table(
        f"{options.data}, {options.split}: {judged} queries, {len(data.corpus)} documents{without}",
        ["", *COLUMNS],
        [[name, *(f"{result.mean[column]:.4f}" for column in COLUMNS)] for name, result in results.items()],
    )
    name = re.sub(r"[^\w.-]+", "-", f"eval-{Path(options.data).name}-{options.split}")
    inside = options.model if options.model is not None and Path(options.model).is_dir() else "runs"
    folder = Path(options.output_dir or Path(inside) / name)
    means = {name: result.mean for name, result in results.items()}
    write_json(
        folder / "metrics.json",
        {"data": options.data, "split": options.split, "queries": judged, "dropped": dropped, "metrics": means},
    )
    write_json(folder / "per_query.json", {name: result.per_query for name, result in results.items()})
    console.print(f"{folder / 'metrics.json'}, per_query.json", soft_wrap=True)
    return results
