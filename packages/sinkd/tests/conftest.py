import pytest
import torch
from sinkd.models import from_scratch
from sinkd.sample import train_tokenizer
from sinkd.tasks import Examples, generic

TEXTS = ["close the file", "open the file and read it", "raise an error", "the error is raised again", "read a line"]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=80)


@pytest.fixture(scope="session")
def examples():
    """40 texts of two classes that a word tells apart."""
    texts = [f"{TEXTS[i % 5]} number {i}" for i in range(40)]
    return Examples(
        generic("toy", ("file", "error")), texts, None, [int("error" in text) for text in texts], list(range(40))
    )


@pytest.fixture
def make_model(tokenizer, examples):
    """A tiny model of an architecture."""

    def make(architecture="encoder", width=32, layers=1, seed=0, task=examples.task):
        torch.manual_seed(seed)
        return from_scratch(architecture, task, tokenizer, width, layers)

    return make
