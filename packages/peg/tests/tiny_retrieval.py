"""A model of chosen word vectors, so that every cosine is known, and a set to search in."""

import math

import numpy as np
from peg.data import RetrievalData
from peg.models import static_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


def word_model(vectors):
    """A SentenceTransformer whose embedding of a text is the mean of its words' vectors, of length 1; other words do nothing."""
    words = ["[UNK]", *vectors]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    width = len(next(iter(vectors.values())))
    return static_model(tokenizer, width, np.array([[0.0] * width, *vectors.values()], np.float32))


def cosine_model(cosines, query="query"):
    """Words whose cosine with ``query`` is given."""
    vectors = {word: [c, math.sqrt(1 - c * c)] for word, c in cosines.items()}
    return word_model({query: [1.0, 0.0], **vectors})


def one_query(cosines, positives, query="query"):
    """Documents of one word each, named by it, with these positives of the one query "q"."""
    return RetrievalData({"q": query}, {word: word for word in cosines}, {"q": dict.fromkeys(positives, 1)})


def random_set(queries=40, documents=120, width=8, seed=0):
    """(model, data): each text a few words of a random model, with one to three relevant documents of gains 1 to 3, or none."""
    rng = np.random.default_rng(seed)
    model = word_model({f"w{i}": rng.normal(size=width).tolist() for i in range(60)})
    texts = [" ".join(f"w{i}" for i in rng.integers(60, size=4)) for _ in range(queries + documents)]
    corpus = {f"d{i}": text for i, text in enumerate(texts[queries:])}
    qrels = {}
    for i in range(queries):
        judged = rng.choice(documents, size=4, replace=False)
        qrels[f"q{i}"] = {f"d{d}": int(rng.integers(1, 4)) for d in judged[: rng.integers(1, 4)]} | {f"d{judged[3]}": 0}
    return model, RetrievalData({f"q{i}": text for i, text in enumerate(texts[:queries])}, corpus, qrels)
