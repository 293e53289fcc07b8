"""Embeddings of as many texts as one likes, in the memory of a few: gradient caching (Gao et al. 2021, arXiv:2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

Features = dict[str, Any]


def encode_features(
    model: Callable[[Features], Features], features: Features, micro_batch_tokens: int | None = None
) -> Tensor:
    """Embeddings (n, d), with gradients, of texts that are tokenised already.

    With ``micro_batch_tokens`` the texts are sorted by length and encoded in micro-batches of at most so many tokens, padding
    included. Each is encoded twice, once for its embeddings and once, when their gradients are known, for its own: activations
    of one micro-batch at a time are held, for about twice the time of a forward more. Dropout is the same both times.

    Args:
        model: a SentenceTransformer, or what wraps one for several devices.
        features: what its ``preprocess`` gives: tensors (n, length), among them ``attention_mask``. Without that tensor, as in
            static embeddings, all texts are one micro-batch.

    Raises:
        ValueError: if a text alone has more tokens than a micro-batch may have.
    """
    mask = features.get("attention_mask")
    if micro_batch_tokens is None or not isinstance(mask, Tensor):
        return model(dict(features))["sentence_embedding"]
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    order: list[int] = []
    embeddings: list[Tensor] = []
    groups = list(micro_batches(mask.sum(1).tolist(), micro_batch_tokens))
    for rows in groups:
        batch = _select(features, torch.tensor(rows, device=mask.device))
        # DistributedDataParallel must see one forward, to know that a backward follows; recomputation must not pass it.
        if len(groups) == 1 or (not order and inner is not model):
            embeddings.append(_embed(model, batch))
        else:
            embeddings.append(checkpoint(_embed, inner, batch, use_reentrant=False))
        order += rows
    places = torch.tensor(order, device=mask.device)
    return torch.cat(embeddings)[places.argsort()]


def micro_batches(lengths: list[int], most_tokens: int) -> Iterator[list[int]]:
    """Numbers of texts, longest first, in groups whose padded size is at most ``most_tokens``.

    >>> list(micro_batches([3, 9, 4, 1], 10))
    [[1], [2, 0], [3]]
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[group[0]] if group else lengths[row]
        if longest > most_tokens:
            raise ValueError(
                f"a text of {longest} tokens does not fit a micro-batch of {most_tokens}: raise micro_batch_tokens or cut texts"
            )
        if group and longest * (len(group) + 1) > most_tokens:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _select(features: Features, rows: Tensor) -> Features:
    """Some rows of all tensors, without the columns that hold only padding."""
    mask: Tensor = features["attention_mask"]
    used = mask[rows].any(0).nonzero().squeeze(1)
    columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    selected: Features = {}
    for name, value in features.items():
        if isinstance(value, Tensor) and len(value) == len(mask):
            value = value[rows]
            selected[name] = value[:, columns] if value.shape[1:2] == mask.shape[1:2] else value
        else:
            selected[name] = value
    return selected


def _embed(model: Callable[[Features], Features], batch: Features) -> Tensor:
    return model(dict(batch))["sentence_embedding"]
