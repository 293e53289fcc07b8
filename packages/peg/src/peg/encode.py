"""Texts to embeddings, and the verb ``encode``, which keeps those of a corpus in a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from papercore.lab.cli import flag
from papercore.lab.report import console
from papercore.ops.device import autocast_dtype
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from peg.data import read_corpus
from peg.models import load_model
from peg.sample import sample


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    side: Literal["query", "passage"],
    batch_size: int = 64,
    normalise: bool = True,
) -> Tensor:
    """(texts, dimension) embeddings in float32 on the CPU.

    The model's own prompt for this side is put before each text. Where the hardware multiplies bfloat16 fast the model runs
    in it, which moves a cosine by about 0.001.

    Args:
        model: runs on its own device.
        texts: any number, empty ones allowed.
        side: "query" or "passage".
        batch_size: texts at a time; texts of like length go together.
        normalise: to length 1, so that inner products are cosines. An embedding of zeros stays zeros.

    Raises:
        ValueError: if an embedding is not finite, naming the text.
    """
    if not len(texts):
        return torch.empty(0, model.get_embedding_dimension() or 0)
    encode = model.encode_query if side == "query" else model.encode_document
    dtype = autocast_dtype(model.device)
    with torch.inference_mode(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        embeddings = encode(
            list(texts),
            batch_size=batch_size,
            show_progress_bar=len(texts) > 50 * batch_size,
            convert_to_tensor=True,
            normalize_embeddings=False,
        )
    embeddings = embeddings.float().cpu()
    if not bool(embeddings.isfinite().all()):
        row = int((~embeddings.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"the model gives no finite embedding of {side} {row}, {texts[row][:60]!r}; it may have diverged"
        )
    return torch.nn.functional.normalize(embeddings, dim=1) if normalise else embeddings


def read_documents(data: str) -> dict[str, str]:
    """Documents, id to text: of the sample, of a BEIR folder, or the lines of a text file, whose ids are their numbers from 1.

    Raises:
        FileNotFoundError: if there is no such folder or file. ValueError: for a file that is not UTF-8 or has no text.
    """
    if data == "sample":
        return sample()["test"].corpus
    path = Path(data)
    if path.is_dir():
        return read_corpus(path)
    if not path.is_file():
        raise FileNotFoundError(f"{data}: no such file or folder; expected sample, a BEIR folder or a text file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{data}: not UTF-8 text (byte {error.start}); expected one document a line") from None
    documents = {str(number): line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not documents:
        raise ValueError(f"{data}: no text; expected one document a line")
    return documents


def save_embeddings(path: str | Path, embeddings: Tensor, documents: Mapping[str, str]) -> Path:
    """Write a safetensors file: "embeddings" (documents, dimension) and, in its metadata, "ids" as JSON and "texts", a digest.

    It is written under a temporary name, then renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"ids": json.dumps(list(documents)), "texts": _digest(documents.values())}
    save_file({"embeddings": embeddings.contiguous()}, temporary, metadata)
    return temporary.replace(path)


def load_embeddings(path: str | Path, documents: Mapping[str, str], model: SentenceTransformer) -> Tensor:
    """The embeddings that :func:`save_embeddings` wrote, if they are those of these documents by this model.

    The model is checked by encoding the first document again.

    Raises:
        ValueError: if they are not, or if the file is no such file. FileNotFoundError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; `peg encode` writes one")
    try:
        with safe_open(path, "pt") as file:
            metadata, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
    except SafetensorError as error:
        raise ValueError(f"{path}: no embeddings that `peg encode` wrote: {error}") from None
    if metadata.get("ids") != json.dumps(list(documents)) or metadata.get("texts") != _digest(documents.values()):
        raise ValueError(f"{path}: embeddings of other documents; run `peg encode` on these")
    first = encode_texts(model, [next(iter(documents.values()))], side="passage")[0]
    if first.shape != embeddings[0].shape or float((first - embeddings[0]).norm()) > 0.1:
        raise ValueError(f"{path}: embeddings of another model; run `peg encode` with this one")
    return embeddings


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


@dataclass
class EncodeOptions:
    """What to encode."""

    model: str = flag("folder that `peg train` wrote, or any SentenceTransformer folder or Hub name")
    output_file: str = flag("where the embeddings go: a .safetensors file that also holds the documents' ids")
    data: str = flag("sample, a BEIR folder, or a text file of one document a line", "sample")
    batch_size: int = flag("texts encoded at a time", 64)


def encode_verb(options: EncodeOptions) -> Tensor:
    """The verb ``encode``: the embeddings of a corpus in a file, for ``peg search``."""
    documents, model = read_documents(options.data), load_model(options.model)
    embeddings = encode_texts(model, list(documents.values()), side="passage", batch_size=options.batch_size)
    save_embeddings(options.output_file, embeddings, documents)
    n, d = embeddings.shape
    console.print(f"{options.output_file}: {n} embeddings of {d} numbers", soft_wrap=True)
    return embeddings
