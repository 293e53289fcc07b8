"""BM25, the word-matching baseline that every table of retrieval has."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from peg.data import RetrievalData

WORDS = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
QUERIES = 256  # at once


def bm25_run(data: RetrievalData, k: int = 100, *, k1: float = 1.2, b: float = 0.75) -> dict[str, list[str]]:
    """Each query's k best documents by BM25, best first; equal scores in the order of the corpus.

    A document of length l scores the sum over the query's words, with n_w of N documents holding w and f of it in this one, of ::

        log(1 + (N - n_w + 1/2) / (n_w + 1/2)) f / (f + k1 (1 - b + b l / mean l))

    as in Lucene (Robertson and Zaragoza, 2009; the factor k1 + 1 changes no order). Words are lower-cased runs of letters and
    digits; a Chinese, Japanese or Korean character is a word. Nothing is stemmed or left out.

    Args:
        k: documents at most; those that share no word with the query are not listed.
        k1: how soon repeated words stop to count, at least 0. b: how much long documents are discounted, 0 to 1.

    Raises:
        ValueError: if no document has a word.

    >>> bm25_run(RetrievalData({"q": "blue whale"}, {"a": "the red house", "b": "a blue whale", "c": "blue ink"}, {}))
    {'q': ['b', 'c']}
    """
    vectorizer = CountVectorizer(token_pattern=WORDS, dtype=np.float32)
    try:
        counts = sparse.csr_array(vectorizer.fit_transform(data.corpus.values()))
    except ValueError:
        raise ValueError(f"none of the {len(data.corpus)} documents has a word for BM25 to match") from None
    n, holding = counts.shape[0], np.bincount(counts.indices, minlength=counts.shape[1])
    lengths = counts.sum(axis=1)
    row = np.repeat(np.arange(n), np.diff(counts.indptr))
    saturated = counts.data / (counts.data + k1 * (1 - b + b * lengths[row] / lengths.mean()))
    idf = np.log1p((n - holding + 0.5) / (holding + 0.5))
    weights = sparse.csr_array((saturated * idf[counts.indices], counts.indices, counts.indptr), shape=counts.shape)
    queries = sparse.csr_array(vectorizer.transform(data.queries.values()))
    by_word, documents = weights.T.tocsr(), list(data.corpus)
    run: dict[str, list[str]] = {}
    for start in range(0, len(data.queries), QUERIES):
        scores = sparse.csr_array(queries[start : start + QUERIES] @ by_word)
        for i, query in enumerate(list(data.queries)[start : start + QUERIES]):
            part = slice(scores.indptr[i], scores.indptr[i + 1])
            found, values = scores.indices[part], scores.data[part]
            run[query] = [documents[j] for j in found[np.lexsort((found, -values))[:k]]]
    return run
