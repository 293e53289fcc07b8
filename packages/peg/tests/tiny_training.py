"""Rows and models to train on in a second."""

import torch
from datasets import Dataset
from peg.data import FEATURES
from peg.models import new_model

WORDS = ["file", "line", "error", "socket", "thread", "number", "string", "module", "class", "path"]
QUERIES = [f"how to {verb} the {word}" for word in WORDS for verb in ("open", "close")]
CORPUS = [f"{verb}s the {word} and returns {i % 3}" for i, word in enumerate(WORDS) for verb in ("open", "close")]


def rows(count=20, negatives=2, **columns):
    """A positive for each of up to 20 queries, and other queries' passages as negatives."""
    table = [
        {
            "query": QUERIES[i], "pos": [CORPUS[i]], "neg": [CORPUS[(i + 3 + j) % 20] for j in range(negatives)],
            "pos_ids": [], "neg_ids": [], "source": "",
        }
        for i in range(count)
    ]  # fmt: skip
    for name, values in columns.items():
        for row, value in zip(table, values, strict=True):
            row[name] = value
    return Dataset.from_list(table, features=FEATURES)


def bert(width=32, layers=1, seed=0, dropout=0.1):
    """A BERT with random weights."""
    torch.manual_seed(seed)
    model = new_model(f"scratch:{width}x{layers}", [*QUERIES, *CORPUS])
    return set_dropout(model, dropout)


def set_dropout(model, p):
    """That of all layers; attention reads it from there, too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p
    return model


def static(width=16, seed=0):
    """Token embeddings with random weights."""
    torch.manual_seed(seed)
    return new_model(f"static:{width}", [*QUERIES, *CORPUS])


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gradients(model):
    """Of all weights that have any."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
