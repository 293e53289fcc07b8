"""Encoders: from a folder, from the Hub, or new."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from sentence_transformers.util import is_sentence_transformer_model
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from peg.sample import train_tokenizer

POOLINGS = {"cls": "cls", "mean": "mean", "last": "lasttoken"}


def load_model(name: str, pooling: str | None = None) -> SentenceTransformer:
    """The encoder in a folder or on the Hub. A plain transformers model gets a pooling, and embeddings of length 1.

    Args:
        pooling: cls, mean or last, for a plain transformers model; None: cls, as the authors' model.

    Raises:
        FileNotFoundError: if there is no such folder and the name cannot be one of the Hub.
        ValueError: for an unknown pooling, or one for a model that has its own.
    """
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()):
        raise FileNotFoundError(f"{name}: no such folder; expected a model that `peg train` wrote, or a Hub name")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    if is_sentence_transformer_model(name):
        if pooling is not None:
            raise ValueError(f"{name} is a SentenceTransformer with a pooling of its own: leave out --pooling")
        return SentenceTransformer(name)
    return _with_pooling(Transformer(name), pooling or "cls")


def new_model(name: str, texts: Iterable[str]) -> SentenceTransformer | None:
    """A model with random weights and a vocabulary made of ``texts``; None where ``name`` is not one of these words.

    Args:
        name: ``static:WIDTH``, the mean of token embeddings, or ``scratch:WIDTHxLAYERS``, a BERT with mean pooling.

    Example:
        >>> new_model("static:8", ["Close the file.", "Open the file."])[0].embedding.weight.shape[1]
        8

    Raises:
        ValueError: for such a word without a proper size.
    """
    kind = name.partition(":")[0]
    if kind not in ("static", "scratch"):
        return None
    size = re.fullmatch(r"static:([1-9]\d*)|scratch:([1-9]\d*)x([1-9]\d*)", name)
    if size is None:
        raise ValueError(f"{name}: a new model is named static:WIDTH or scratch:WIDTHxLAYERS, such as scratch:128x2")
    tokenizer = train_tokenizer(texts)
    if kind == "static":
        return static_model(tokenizer.backend_tokenizer, int(size[1]))
    width, layers = int(size[2]), int(size[3])
    config = BertConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    # sentence-transformers takes folders; the model's own save_pretrained writes in the first of several processes alone
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(BertModel(config).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(folder)
        return _with_pooling(Transformer(folder), "mean")


def static_model(tokenizer: Tokenizer, width: int, weights: object = None) -> SentenceTransformer:
    """Mean of token embeddings, of length 1; ``weights`` (tokens, width) to begin with."""
    embedding = StaticEmbedding(tokenizer, embedding_weights=weights, embedding_dim=width)  # type: ignore[arg-type]
    if weights is None:  # rows of length 1, as pretrained ones about are; the library's are longer, and learn late
        torch.nn.init.normal_(embedding.embedding.weight, std=width**-0.5)
    return SentenceTransformer(modules=[embedding, Normalize()])


def _with_pooling(transformer: Transformer, pooling: str) -> SentenceTransformer:
    pool = Pooling(transformer.get_embedding_dimension(), POOLINGS[pooling])
    return SentenceTransformer(modules=[transformer, pool, Normalize()])
