"""Logits of a model for many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from papercore.ops import pick_device
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkd.encode import Collator, Features
from sinkd.models import architecture_of

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


@torch.inference_mode()
def logits_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Features, batch_size: int, start: int = 0
) -> Iterator[list[Tensor]]:
    """For each batch of rows the logits of each: (1, classes), or (predicted tokens, vocabulary) of a language model."""
    architecture = architecture_of(model)
    device = pick_device()
    model.eval().to(device)
    collate = Collator(tokenizer)
    for first in tqdm(range(start, len(rows), batch_size), desc="teacher", unit="batch", disable=len(rows) < 5000):
        batch: dict[str, Any] = collate([{**row} for row in rows[first : first + batch_size]])
        batch = {key: value.to(device) for key, value in batch.items() if key in _INPUTS}
        labels = batch.get("labels")
        if architecture == "encoder":
            batch.pop("labels", None)
        logits = model(**batch).logits.float().cpu()
        if architecture == "encoder":
            yield list(logits.unsqueeze(1))
            continue
        assert labels is not None
        valid = labels.cpu() != -100
        if architecture == "decoder":
            valid = F.pad(valid[:, 1:], (0, 1))
        yield [row[keep] for row, keep in zip(logits, valid, strict=True)]
