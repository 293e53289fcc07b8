import math
import os
from collections import Counter
from pathlib import Path

import pytest
from peg.bm25 import bm25_run
from peg.data import RetrievalData, read_beir
from peg.metrics import retrieval_metrics

REAL = pytest.mark.skipif("PAPERCORE_DATA" not in os.environ, reason="PAPERCORE_DATA is not set: no real data to read")
CORPUS = {
    "a": "The whale, the whale!", "b": "a blue WHALE", "c": "blue ink and a pen and paper", "d": "", "e": "the sea",
    "f": "A blue whale.",
}  # fmt: skip


def literal(query, corpus, k1=1.2, b=0.75):
    """The formula, word by word: {document: score} of those that share a word."""
    words = {d: [w.strip(".,!?") for w in text.lower().split()] for d, text in corpus.items()}
    mean = sum(map(len, words.values())) / len(words)
    scores = {}
    for d, own in words.items():
        f = Counter(own)
        score = 0.0
        for w in query.lower().split():
            n = sum(w in others for others in words.values())
            if f[w]:
                idf = math.log(1 + (len(words) - n + 0.5) / (n + 0.5))
                score += idf * f[w] / (f[w] + k1 * (1 - b + b * len(own) / mean))
        if score:
            scores[d] = score
    return scores


@pytest.mark.parametrize("query", ["the blue whale", "whale whale pen", "paper", "the the sea"])
def test_equal_to_the_formula(query):
    for options in ({}, {"k1": 0.5, "b": 0.2}):
        scores = literal(query, CORPUS, **options)
        expected = sorted(scores, key=lambda d: (-round(scores[d], 5), d))
        assert bm25_run(RetrievalData({"q": query}, CORPUS, {}), **options) == {"q": expected}


def test_equal_scores_in_the_order_of_the_corpus_and_at_most_k():
    assert bm25_run(RetrievalData({"q": "blue whale"}, CORPUS, {}), k=2) == {"q": ["b", "f"]}
    assert bm25_run(RetrievalData({"q": "unheard of"}, CORPUS, {})) == {"q": []}


def test_chinese_characters_are_words():
    corpus = {"a": "北京是中国的首都", "b": "长江很长"}
    assert bm25_run(RetrievalData({"q": "首都在哪里?", "r": "长江"}, corpus, {})) == {"q": ["a"], "r": ["b"]}


def test_documents_without_words():
    with pytest.raises(ValueError, match="none of the 2 documents has a word for BM25 to match"):
        bm25_run(RetrievalData({"q": "a"}, {"a": "", "b": "..."}, {}))


@REAL
def test_cranfield_is_in_the_published_range():
    """nDCG@10 of BM25 on Cranfield's graded judgements is about 0.4 with stemming, a little less without."""
    data = read_beir(Path(os.environ["PAPERCORE_DATA"]) / "peg" / "cranfield", "test")
    result = retrieval_metrics(bm25_run(data), data.qrels)
    assert 0.3 < result.mean["nDCG@10"] < 0.5
