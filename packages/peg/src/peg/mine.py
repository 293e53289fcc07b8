"""Hard negatives: what the encoder ranks high and nobody judged relevant, by rules that are ours throughout."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from papercore.lab.cli import flag
from papercore.lab.report import console
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from peg.data import RetrievalData, training_rows, write_rows
from peg.encode import encode_texts
from peg.evaluate import read_split
from peg.models import load_model
from peg.search import top_k

logger = logging.getLogger(__name__)

QUERIES = 4096  # at once


def mine_hard_negatives(
    model: SentenceTransformer,
    data: RetrievalData,
    *,
    ranks: tuple[int, int] = (10, 210),
    num_negatives: int = 5,
    relative: float | None = 0.95,
    margin: float = 0.05,
    seed: int = 0,
    batch_size: int = 64,
    documents: Tensor | None = None,
) -> dict[str, list[str]]:
    """For each query, documents that the model ranks high without being relevant, drawn at random.

    Candidates are the documents of ranks ``ranks[0]`` to ``ranks[1] - 1`` by cosine s(q, d), counted from 0 over all documents.
    Left out are

    - the query's positives (gain above 0), and documents with the text of one, or of the query;
    - what scores like a positive, and may be one that nobody judged: with s the cosine of the query's best positive,
      s(q, d) > relative * s if s > 0, else s(q, d) > s - margin (a factor below 1 would raise a threshold below 0);
    - all but the first of documents with the same text.

    A query's draw depends on the seed, its id and its candidates alone, not on other queries.

    Args:
        model: encodes both sides; best the one that training starts from.
        data: the split to mine for; every query needs a positive.
        ranks: first rank, and the one after the last (FlagEmbedding's default range).
        num_negatives: for each query, at most; where fewer are left the list is shorter, which is logged. In random order,
            so that the first n of a list are a random sample, too.
        relative: 0 to 1; None keeps documents whatever they score.
        margin: of a cosine, at least 0.
        batch_size: texts encoded at a time.
        documents: the corpus's embeddings, if they are known.

    Returns:
        query id -> document ids.

    Raises:
        ValueError: for options out of range, and for queries without a positive; it lists the first five.

    Example:
        >>> from peg.models import new_model
        >>> corpus = {"a": "opens the file", "b": "closes the file", "c": "counts the lines"}
        >>> data = RetrievalData({"q": "how to open it"}, corpus, {"q": {"a": 1}})
        >>> model = new_model("static:8", corpus.values())  # random weights; best the encoder that training starts from
        >>> mined = mine_hard_negatives(model, data, ranks=(0, 3), num_negatives=2, relative=None)
        >>> sorted(mined["q"])
        ['b', 'c']
    """
    if not 0 <= ranks[0] < ranks[1]:
        raise ValueError(f"ranks must be a first rank of at least 0 and a larger end, got {tuple(ranks)}")
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
    if relative is not None and not 0 < relative <= 1:
        raise ValueError(f"relative must be above 0 and at most 1, or None, got {relative}")
    if margin < 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    positives = {query: [d for d, gain in data.qrels.get(query, {}).items() if gain > 0] for query in data.queries}
    if lonely := [query for query, found in positives.items() if not found]:
        raise ValueError(
            f"no positive document for {len(lonely)} of {len(data.queries)} queries: {', '.join(lonely[:5])}; leave them out"
        )
    queries = encode_texts(model, list(data.queries.values()), side="query", batch_size=batch_size)
    if documents is None:
        documents = encode_texts(model, list(data.corpus.values()), side="passage", batch_size=batch_size)
    ids, texts = list(data.corpus), list(data.corpus.values())
    number = {id: i for i, id in enumerate(ids)}
    mined: dict[str, list[str]] = {}
    names = list(data.queries)
    for start in tqdm(range(0, len(names), QUERIES), desc="mine", unit="block", disable=len(names) <= QUERIES):
        block = names[start : start + QUERIES]
        own = [[number[d] for d in positives[query]] for query in block]
        found = _candidates(queries[start : start + QUERIES], documents, own, ranks, relative, margin)
        for query, mine, candidates in zip(block, own, found, strict=True):
            known = {data.queries[query], *(texts[i] for i in mine)}
            left: dict[str, int] = {}
            for i in candidates:
                if texts[i] not in known:
                    left.setdefault(texts[i], i)
            chosen = list(left.values())
            draw = random.Random(f"{seed} {query}")
            mined[query] = [ids[i] for i in draw.sample(chosen, min(num_negatives, len(chosen)))]
    if short := sum(len(found) < num_negatives for found in mined.values()):
        logger.warning(
            "%d of %d queries have fewer than %d negatives, %d none: too few documents of these ranks score below their best "
            "positive; a larger end of the ranks helps",
            short,
            len(mined),
            num_negatives,
            sum(not found for found in mined.values()),
        )
    return mined


def _candidates(
    queries: Tensor,
    documents: Tensor,
    positives: list[list[int]],
    ranks: tuple[int, int],
    relative: float | None,
    margin: float,
) -> Iterator[list[int]]:
    """For each query the documents of these ranks that do not score like its best positive."""
    scores, found = (part[:, ranks[0] :] for part in top_k(queries, documents, ranks[1]))
    if relative is None:
        yield from found.tolist()
        return
    rows = torch.tensor([row for row, own in enumerate(positives) for _ in own])
    pairs = (queries[rows] * documents[torch.tensor([i for own in positives for i in own])]).sum(1)
    best = torch.full((len(queries),), -torch.inf).scatter_reduce(0, rows, pairs, "amax")
    ceiling = torch.where(best > 0, relative * best, best - margin)
    for row, keep in zip(found, scores <= ceiling[:, None], strict=True):
        yield row[keep].tolist()


@dataclass
class MineOptions:
    """What to mine, and how."""

    model: str = flag("encoder to rank by: best the one that training starts from")
    output_file: str = flag("where the rows go: .jsonl or .jsonl.gz")
    data: str = flag("sample, or a BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv, plain or .gz", "sample")
    split: str = flag("which queries", "train")
    first_rank: int = flag("ranks above, counted from 0, are too likely to be relevant", 10)
    end_rank: int = flag("ranks from here on are too easy", 210)
    num_negatives: int = flag("for each query, at most (paper: 5)", 5)
    relative: float | None = flag("leave out what scores above this share of the best positive's cosine", 0.95)
    margin: float = flag("where that cosine is not positive: leave out what scores above it less this", 0.05)
    batch_size: int = flag("texts encoded at a time", 64)
    seed: int = flag("of the draw", 0)


def mine_verb(options: MineOptions) -> dict[str, list[str]]:
    """The verb ``mine``: a file of rows for ``peg train``."""
    model, data = load_model(options.model), read_split(options.data, options.split)
    mined = mine_hard_negatives(
        model,
        data,
        ranks=(options.first_rank, options.end_rank),
        num_negatives=options.num_negatives,
        relative=options.relative,
        margin=options.margin,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    write_rows(options.output_file, training_rows(data, mined, Path(options.data).name))
    total = sum(map(len, mined.values()))
    console.print(f"{options.output_file}: {total} negatives for {len(mined)} queries", soft_wrap=True)
    return mined
