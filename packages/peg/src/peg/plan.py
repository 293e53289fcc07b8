"""What a training step holds in memory, before it is tried."""

from __future__ import annotations

import math

import datasets
import torch
from papercore.ops import peak_memory
from sentence_transformers import SentenceTransformer

from peg.batches import PegCollator
from peg.grad_cache import encode_features, micro_batches
from peg.trainer import PegConfig

MIB = 2**20
SEEN = 2000  # rows from which the texts of a step are estimated


def memory_plan(model: SentenceTransformer, config: PegConfig, rows: datasets.Dataset) -> list[list[str]]:
    """Rows of a table: what for, MiB, how known. The micro-batch is measured, on the longest texts of some rows.

    Args:
        model: on the device where it is to be trained. rows: of training.
    """
    b, k = config.per_device_train_batch_size, config.hard_negatives
    candidates = b * (1 + k)
    world = config.world_size if config.gather else 1
    collate = PegCollator(model.preprocess, k, query_length=config.query_length, passage_length=config.passage_length)
    some = rows.select(range(min(SEEN, b, len(rows))))
    passages = collate(list(some))["passages"]
    mask = passages.get("attention_mask")
    if config.micro_batch_tokens is not None and isinstance(mask, torch.Tensor):
        groups = list(micro_batches(mask.sum(1).tolist(), config.micro_batch_tokens))
        first = torch.tensor(groups[0])
        passages = {key: value[first] if isinstance(value, torch.Tensor) else value for key, value in passages.items()}
        encoded = (
            f"measured: one micro-batch of {len(first)} texts; at most {math.ceil(candidates / len(first))} in a step"
        )
    else:
        first, encoded = None, f"measured on {len(some)} queries' passages, for {candidates:,} candidates at once"
    passages = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in passages.items()
    }
    with peak_memory(model.device) as peak:
        embeddings = encode_features(model, passages)
        embeddings.sum().backward()
    model.zero_grad()
    width = embeddings.shape[1]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    columns = candidates * world
    whole = 4 * b * columns
    share = (
        1.0 if first is not None else candidates / len(embeddings)
    )  # rows may have no negatives yet, and share texts
    held = {
        "weights and AdamW": (12 * parameters, f"12 bytes for each of {parameters:,} parameters"),
        "activations, weights' gradients": (share * peak.bytes, encoded),
        "embeddings and their gradients": (
            4 * 5 * (b + columns) * width,
            f"{b:,} queries, {columns:,} candidates, {width} wide, five copies in float32",
        ),
        "blocks of logits": (2 * min(2**25, whole), f"two of 32 MiB at most; the whole matrix is {whole / MIB:,.0f} MiB"),
    }  # fmt: skip
    total = sum(size for size, _ in held.values())
    return [[name, f"{size / MIB:,.0f}", how] for name, (size, how) in held.items()] + [
        ["together", f"{total / MIB:,.0f}", ""]
    ]
