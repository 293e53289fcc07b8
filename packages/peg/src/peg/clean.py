"""Cleaning rows of queries and positives: what to drop before training, by rules that are ours throughout."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.report import console, print_table
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from peg.data import read_rows, write_rows
from peg.encode import encode_texts
from peg.models import load_model
from peg.search import top_k

ROWS = 2048  # at once
Row = Mapping[str, Any]


def clean_rows(
    rows: Iterable[Row],
    dropped: Counter[str],
    *,
    min_characters: int = 2,
    max_query_characters: int = 2_000,
    max_text_characters: int = 50_000,
) -> Iterator[dict[str, Any]]:
    """Drop rows, positives and negatives that teach nothing or the wrong thing, one row at a time.

    - A row goes if its query is too short (or empty) or too long, or if no positive is left.
    - A positive goes if it is too short or too long, if it is the query, or if the same query and positive came before.
    - A negative goes if it is too short or too long, if it is the query or a positive (one that went, too), or if the row has
      it before.

    Texts lose the white space at their ends and are equal if they then are. Memory grows by about 100 bytes a positive.

    Args:
        rows: as :func:`peg.data.read_rows` gives them.
        dropped: is counted up, by rule.
        min_characters: of a query or text, 1 or more; also an empty one is too short.
        max_query_characters, max_text_characters: at most.

    Raises:
        ValueError: at the first row, for limits out of order.

    >>> dropped = Counter()
    >>> rows = [{"query": " who? ", "pos": ["me", "me"], "neg": ["you", "me"]}, {"query": "", "pos": ["I am"], "neg": []}]
    >>> [row["pos"] + row["neg"] for row in clean_rows(rows, dropped)]
    [['me', 'you']]
    >>> sorted(dropped)
    ['negatives: equal to a positive', 'positives: pair seen before', 'rows: query too short']
    """
    if not 1 <= min_characters <= min(max_query_characters, max_text_characters):
        raise ValueError(f"min_characters must be at least 1 and below the largest lengths, got {min_characters}")
    seen: set[bytes] = set()

    for row in rows:
        query = row["query"].strip()
        positives, negatives = ([text.strip() for text in row.get(side) or ()] for side in ("pos", "neg"))
        if len(query) < min_characters or len(query) > max_query_characters:
            dropped[f"rows: query too {'short' if len(query) < min_characters else 'long'}"] += 1
            continue
        rules = [
            {
                "too short": len(text) < min_characters,
                "too long": len(text) > max_text_characters,
                "equal to the query": text == query,
                "pair seen before": _repeated(_digest(query, text), seen),
            }
            for text in positives
        ]
        kept = {**row, "query": query, **_keep(row, "pos", rules, dropped)}
        if not kept["pos"]:
            dropped["rows: no positive left"] += 1
            continue
        listed: set[str] = set()
        rules = [
            {
                "too short": len(text) < min_characters,
                "too long": len(text) > max_text_characters,
                "equal to the query": text == query,
                "equal to a positive": text in positives,
                "listed twice": _repeated(text, listed),
            }
            for text in negatives
        ]
        yield kept | _keep(row, "neg", rules, dropped)


def _repeated(value: Any, seen: set[Any]) -> bool:
    """Whether it was seen before; from now on it was."""
    if value in seen:
        return True
    seen.add(value)
    return False


def _digest(query: str, text: str) -> bytes:
    return hashlib.blake2b(f"{len(query)} {query}{text}".encode(), digest_size=16).digest()


def _keep(row: Row, side: str, rules: Sequence[Mapping[str, bool]], dropped: Counter[str]) -> dict[str, list[str]]:
    """The texts of a side, stripped, for which no rule holds, and their ids where there are any. The first rule counts."""
    kept = []
    for i, broken in enumerate(rules):
        rule = next((rule for rule, holds in broken.items() if holds), None)
        if rule is None:
            kept.append(i)
        else:
            dropped[f"{'positives' if side == 'pos' else 'negatives'}: {rule}"] += 1
    ids = row.get(f"{side}_ids")
    return {side: [row[side][i].strip() for i in kept], f"{side}_ids": [ids[i] for i in kept] if ids else []}


def sample_pool(rows: Iterable[Row], size: int, seed: int = 0) -> list[str]:
    """A random sample of the positives of all rows, each text once: at most ``size``, in one pass and bounded memory."""
    draw, pool = random.Random(seed), list[str]()
    for count, text in enumerate((text for row in rows for text in row["pos"]), 1):  # reservoir sampling
        if len(pool) < size:
            pool.append(text)
        elif (place := draw.randrange(count)) < size:
            pool[place] = text
    return list(dict.fromkeys(pool))


def consistent_rows(
    model: SentenceTransformer,
    rows: Iterable[Row],
    pool: list[str],
    dropped: Counter[str],
    *,
    k: int = 10,
    batch_size: int = 64,
) -> Iterator[dict[str, Any]]:
    """Drop positives that are not among the model's k best of a random pool and themselves, and rows that lose all of theirs.

    The query's own positives do not count as passages of the pool.

    Args:
        model: the scorer, by cosine.
        pool: different texts, more than k of them, as :func:`sample_pool` draws them.
        dropped: is counted up, by rule.
        batch_size: texts encoded at a time.

    Raises:
        ValueError: at the first row, if the pool has no more than k texts, which any positive would pass, or if k is below 1.
    """
    if not 1 <= k < len(pool):
        raise ValueError(f"k must be at least 1 and below the {len(pool)} passages of the pool, got {k}")
    passages = encode_texts(model, pool, side="passage", batch_size=batch_size)
    rows = iter(rows)
    while block := list(islice(rows, ROWS)):
        queries = encode_texts(model, [row["query"] for row in block], side="query", batch_size=batch_size)
        texts = [text for row in block for text in row["pos"]]
        sizes = [len(row["pos"]) for row in block]
        own = torch.arange(len(block)).repeat_interleave(torch.tensor(sizes))
        cosines = (queries[own] * encode_texts(model, texts, side="passage", batch_size=batch_size)).sum(1).split(sizes)
        scores, found = top_k(queries, passages, k + max(sizes))
        for row, mine, values, places in zip(block, cosines, scores.tolist(), found.tolist(), strict=True):
            others = [value for value, i in zip(values, places, strict=True) if pool[i] not in row["pos"]]
            floor = others[k - 1] if len(others) >= k else -1.0
            rules = [{f"not among the best {k} of the pool": cosine < floor} for cosine in mine.tolist()]
            kept = {**row, **_keep(row, "pos", rules, dropped)}
            if kept["pos"]:
                yield kept
            else:
                dropped["rows: no positive left"] += 1


@dataclass
class CleanOptions:
    """What to clean, and by which rules."""

    data: str = flag("rows of query, pos and neg: .jsonl, plain or .gz, a folder of such files, or a saved data set")
    output_file: str = flag("where the rows go: .jsonl or .jsonl.gz")
    model: str | None = flag("scorer: also drop positives that it does not rank among the best k of a pool", None)
    k: int = flag("with a model: rank in the pool that a positive must reach", 10)
    pool_size: int = flag("with a model: passages in the pool, drawn from all positives", 10_000)
    min_characters: int = flag("of a query or text", 2)
    max_query_characters: int = flag("of a query", 2_000)
    max_text_characters: int = flag("of a positive or negative", 50_000)
    batch_size: int = flag("texts encoded at a time", 64)
    seed: int = flag("of the pool", 0)


def clean_verb(options: CleanOptions) -> Counter[str]:
    """The verb ``clean``: the rows that stay, and a table of what each rule dropped."""

    def cleaned(counts: Counter[str]) -> Iterator[dict[str, Any]]:
        return clean_rows(
            tqdm(read_rows(options.data), desc="clean", unit=" rows", delay=2, leave=False),
            counts,
            min_characters=options.min_characters,
            max_query_characters=options.max_query_characters,
            max_text_characters=options.max_text_characters,
        )

    dropped: Counter[str] = Counter()
    rows = cleaned(dropped)
    if options.model is not None:
        model = load_model(options.model)
        pool = sample_pool(cleaned(Counter()), options.pool_size, options.seed)
        rows = consistent_rows(model, rows, pool, dropped, k=options.k, batch_size=options.batch_size)
    kept = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal kept
        for row in rows:
            kept += 1
            yield row

    write_rows(options.output_file, counted())
    print_table(options.data, ["rule", "dropped"], [[rule, str(number)] for rule, number in sorted(dropped.items())])
    console.print(f"{options.output_file}: {kept} rows kept", soft_wrap=True)
    return dropped
