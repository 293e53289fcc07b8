"""Texts as token ids, and batches of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from sinkd.prompts import Prompted
from sinkd.tasks import Examples

Features = list[dict[str, Any]]


def encode_texts(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
    """Ids of each text or pair, with its label, for a classifier."""
    pairs = () if examples.second is None else (examples.second,)
    encoded = tokenizer(examples.first, *pairs, truncation=True, max_length=max_length)
    rows: Features = [{key: value[i] for key, value in encoded.items()} for i in range(len(examples))]
    if examples.labels is not None:
        rows = [{**row, "labels": label} for row, label in zip(rows, examples.labels, strict=True)]
    return rows


def encode_prompts(
    prompted: Sequence[Prompted], tokenizer: PreTrainedTokenizerBase, max_length: int, architecture: str
) -> Features:
    """Source and target of each prompt. A decoder reads both as one text, of which only the target has labels.

    A source that is too long loses its first tokens; the target is kept.

    Raises:
        ValueError: if a target alone is longer than ``max_length``.
    """
    rows: Features = []
    for prompt in prompted:
        source = tokenizer(prompt.source, add_special_tokens=False)["input_ids"]
        target = tokenizer(str(prompt.target), add_special_tokens=False)["input_ids"]
        if architecture == "encoder-decoder":
            target = [*target, tokenizer.eos_token_id]
        if len(target) >= max_length:
            raise ValueError(
                f"the answer {str(prompt.target)[:40]!r} has {len(target)} tokens: max_length must be more"
            )
        if architecture == "encoder-decoder":
            rows.append({"input_ids": source[-max_length:], "labels": target})
        else:
            source = source[-(max_length - len(target)) :]
            rows.append({"input_ids": source + target, "labels": [-100] * len(source) + target})
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]


def encode_language(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
    """Plain texts for a causal language model: every token but the first is predicted. Texts of one token are left out."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [(tokenizer(text, add_special_tokens=False)["input_ids"] + eos)[:max_length] for text in texts]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids if len(row) > 1]


def fingerprint(rows: Features) -> str:
    """What tells one encoded data set from another."""
    ids = [[row.get("teacher_inputs", row)["input_ids"], row.get("labels")] for row in rows]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def numbered(rows: Features) -> Features:
    """Each row with its place, by which a teacher's cached logits are found."""
    return [{**row, "index": i} for i, row in enumerate(rows)]


def with_teacher_inputs(rows: Features, teacher_rows: Features) -> Features:
    """Each row with what a teacher of another tokenizer reads."""
    kept = [{k: v for k, v in row.items() if k != "labels"} for row in teacher_rows]
    return [{**row, "teacher_inputs": other} for row, other in zip(rows, kept, strict=True)]


class Collator:
    """Pads a batch; ``teacher_inputs`` are padded by the teacher's tokenizer; labels of tokens by -100."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer

    def __call__(self, rows: Features) -> dict[str, Any]:
        rows = [dict(row) for row in rows]
        theirs = [row.pop("teacher_inputs") for row in rows if "teacher_inputs" in row]
        many = bool(rows) and isinstance(rows[0].get("labels"), list)
        collate = DataCollatorForSeq2Seq(self.tokenizer) if many else DataCollatorWithPadding(self.tokenizer)
        batch = dict(collate(rows))
        if theirs and self.teacher_tokenizer is not None:
            batch["teacher_inputs"] = dict(DataCollatorWithPadding(self.teacher_tokenizer)(theirs))
        return batch
