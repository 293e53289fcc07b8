"""Exact search: the documents of the largest inner products, in bounded memory; the verb ``search``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from papercore.lab.cli import flag
from papercore.lab.report import print_table
from papercore.ops.device import full_precision
from torch import Tensor

from peg.encode import encode_texts, load_embeddings, read_documents
from peg.models import load_model

GROUP = 32  # neighbouring documents, of which only the best is looked at first
ROWS = 256  # queries at once that keep a matrix product fast
SCORE_BYTES, CANDIDATE_BYTES = 17, 100  # of working memory for a score, and for one that may be among the best
LAST = 2**32 - 1  # documents at most


def top_k(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    memory: int = 128 * 2**20,
    backend: Literal["torch", "faiss"] = "torch",
) -> tuple[Tensor, Tensor]:
    """Scores and indices of each query's k documents of largest inner product, best first.

    Exact in float32. Documents whose scores come out equal are in the order of ``documents``, at the k-th place, too.

    Args:
        queries: (n, d). documents: (m, d), on the same device.
        k: at least 1; there are min(k, m) columns.
        memory: bytes to work in, beside inputs and results.
        backend: "faiss" searches by faiss.IndexFlatIP on the CPU, which leaves the order of equal scores open.

    Returns:
        (n, min(k, m)) float32 scores and int64 indices.

    Raises:
        ValueError: for k below 1, no documents, widths that differ, an unknown backend, or a value that is not finite (naming
            tensor and row).
        ModuleNotFoundError: for the backend faiss without it.

    >>> scores, indices = top_k(torch.eye(2), torch.tensor([[0.0, 1], [0, 1], [1, 0]]), k=2)
    >>> indices
    tensor([[2, 0],
            [0, 1]])
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)} and documents {tuple(documents.shape)} must be matrices of the same width"
        )
    if backend not in ("torch", "faiss"):
        raise ValueError(f"backend must be torch or faiss, got {backend!r}")
    if not len(documents):
        raise ValueError("there are no documents to search in")
    queries, documents = queries.float(), documents.float()
    for name, tensor in (("queries", queries), ("documents", documents)):
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"{name}, row {row}: a value is not finite")
    k = min(k, len(documents))
    if backend == "faiss":
        return _faiss(queries, documents, k)
    scores = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    width = min(len(documents), max(k, memory // (SCORE_BYTES * ROWS)))
    rows = max(1, memory // (SCORE_BYTES * width + CANDIDATE_BYTES * 2 * k))
    with full_precision():
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            best = torch.empty(len(queries[part]), 0, dtype=torch.int64, device=queries.device)
            for start in range(0, len(documents), width):
                best = torch.cat([best, _best(queries[part], documents[start : start + width], start, k)], 1)
                best = best.sort(dim=1, descending=True).values[:, :k] if start else best
            scores[part], indices[part] = _decode(best)
    return scores, indices


def _best(queries: Tensor, documents: Tensor, start: int, k: int) -> Tensor:
    """(n, min(k, m)) keys, descending, of the best of these documents, whose numbers begin at ``start``.

    Neighbouring documents form groups. The k-th best of the groups' best scores cannot exceed the k-th best score, so few
    groups, and few of their members, are left to sort.
    """
    n, m = len(queries), len(documents)
    k = min(k, m)
    size = max(1, min(GROUP, m // (2 * k)))
    groups = -(-m // size)
    scores = queries.new_empty(n, groups * size)
    torch.mm(queries, documents.T, out=scores[:, :m])
    scores[:, m:] = -torch.inf
    tops = scores.view(n, groups, size).amax(2)
    floor = tops.topk(k, sorted=False).values.amin(1)
    row, group = (tops >= floor[:, None]).nonzero(as_tuple=True)
    members = scores.view(n * groups, size).index_select(0, row * groups + group)
    left = members >= floor[row, None]
    counts = torch.zeros(n, dtype=torch.int64, device=scores.device).index_add(
        0, row, left.view(torch.int8).sum(1, dtype=torch.int8).long()
    )
    most = int(counts.max())
    if most > 2 * k + m // 16:  # many scores are equal; in parts, for each takes 40 bytes here
        numbers = torch.arange(start, start + m, device=scores.device)
        return torch.cat([_encode(part, numbers).topk(k).values for part in scores[:, :m].tensor_split(8)])
    pair, member = left.nonzero(as_tuple=True)
    row, document = row[pair], group[pair] * size + member
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    keys = torch.full((n, most), torch.iinfo(torch.int64).min, device=row.device)
    keys[row, column] = _encode(members[pair, member], start + document)
    return keys.sort(dim=1, descending=True).values[:, :k]


def _encode(scores: Tensor, documents: Tensor) -> Tensor:
    """Integers that sort as (score ascending, document descending): the score's bits above the document's number."""
    return (_flip((scores + 0.0).view(torch.int32)).long() << 32) | (LAST - documents)  # + 0.0 makes -0.0 0.0


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    return _flip((keys >> 32).int()).view(torch.float32), LAST - (keys & LAST)


def _flip(bits: Tensor) -> Tensor:
    """Floats order as their bits read as integers, once those below the sign are inverted in the negative ones."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _faiss(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the backend faiss needs the library: pip install 'peg[faiss]'") from None
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents.cpu().numpy())
    scores, indices = index.search(queries.cpu().numpy(), k)
    return torch.from_numpy(scores).to(queries.device), torch.from_numpy(indices).to(queries.device)


@dataclass
class SearchOptions:
    """What to look for, and where."""

    queries: list[str] = flag("one or more, each in quotation marks", positional=True)
    model: str = flag("folder that `peg train` wrote, or any SentenceTransformer folder or Hub name")
    data: str = flag("sample, a BEIR folder, or a text file of one document a line", "sample")
    embeddings: str | None = flag("file that `peg encode` made of these documents by this model: saves the time", None)
    k: int = flag("documents shown for each query", 5)
    batch_size: int = flag("texts encoded at a time", 64)


def search_verb(options: SearchOptions) -> list[list[str]]:
    """The verb ``search``: for each query, a table of the best documents."""
    documents, model = read_documents(options.data), load_model(options.model)
    if options.embeddings is None:
        passages = encode_texts(model, list(documents.values()), side="passage", batch_size=options.batch_size)
    else:
        passages = load_embeddings(options.embeddings, documents, model)
    scores, indices = top_k(encode_texts(model, options.queries, side="query"), passages, options.k)
    ids = list(documents)
    for query, values, row in zip(options.queries, scores.tolist(), indices.tolist(), strict=True):
        shown = [[f"{value:.4f}", ids[i], _shorten(documents[ids[i]])] for value, i in zip(values, row, strict=True)]
        print_table(query, ["cosine", "id", "text"], shown)
    return [[ids[i] for i in row] for row in indices.tolist()]


def _shorten(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."
