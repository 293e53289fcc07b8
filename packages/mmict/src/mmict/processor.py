"""Texts as token ids, for the hub and for the language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from papercore.lab.files import write_json
from transformers import AutoTokenizer

Ids = list[list[int]]


class Processor:
    """The two tokenizers and what they are asked for.

    Args:
        hub_tokenizer: the hub's (official: bert-base-uncased), with its own marks around a text.
        lm_tokenizer: the language model's.
        causal: the language model is decoder-only.
        max_tokens: of each text, marks included (official: 32, 100 for questions).
        official_targets: for a decoder-only model, mark the beginning again before the answer, and end it by a line break, as the
            official code does. By default the target is the answer and the end-of-sequence token.

    Raises:
        ValueError: for a language model's tokenizer without an end-of-sequence token.
    """

    def __init__(
        self, hub_tokenizer: Any, lm_tokenizer: Any, *, causal: bool = False, max_tokens: int = 32, official_targets: bool = False
    ) -> None:  # fmt: skip
        if lm_tokenizer.eos_token_id is None:
            raise ValueError("the language model's tokenizer has no end-of-sequence token, so an answer could not end")
        self.hub_tokenizer, self.lm_tokenizer = hub_tokenizer, lm_tokenizer
        self.causal, self.max_tokens, self.official_targets = causal, max_tokens, official_targets

    def hub(self, texts: Sequence[str]) -> Ids:
        """Of each text, for the hub."""
        return _ids(self.hub_tokenizer, texts, max_length=self.max_tokens)

    def lm(self, texts: Sequence[str]) -> Ids:
        """Of each text, for the language model to read, with the marks of its tokenizer."""
        return _ids(self.lm_tokenizer, texts, max_length=self.max_tokens)

    def targets(self, texts: Sequence[str]) -> Ids:
        """Of each text, for the language model to write."""
        if not self.causal:
            return self.lm(texts)
        if self.official_targets:
            return self.lm([f"{text}\n" for text in texts])
        end = [self.lm_tokenizer.eos_token_id]
        plain = _ids(self.lm_tokenizer, texts, max_length=self.max_tokens - 1, add_special_tokens=False)
        return [ids + end for ids in plain]

    @property
    def pad(self) -> int:
        """The language model's token for padding; where it has none, the one that ends a sequence."""
        own = self.lm_tokenizer.pad_token_id
        return self.lm_tokenizer.eos_token_id if own is None else own

    def text(self, ids: Sequence[int]) -> str:
        """What the language model wrote."""
        return self.lm_tokenizer.decode(ids, skip_special_tokens=True).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Both tokenizers in folders of their own, and processor.json."""
        folder = Path(folder)
        self.hub_tokenizer.save_pretrained(str(folder / "hub_tokenizer"))
        self.lm_tokenizer.save_pretrained(str(folder / "lm_tokenizer"))
        how = {name: getattr(self, name) for name in ("causal", "max_tokens", "official_targets")}
        write_json(folder / "processor.json", how)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Processor:
        """What :meth:`save_pretrained` wrote."""
        folder = Path(folder)
        tokenizers = (AutoTokenizer.from_pretrained(folder / name) for name in ("hub_tokenizer", "lm_tokenizer"))
        return cls(*tokenizers, **json.loads((folder / "processor.json").read_text()))


def _ids(tokenizer: Any, texts: Sequence[str], **how: Any) -> Ids:
    return tokenizer(list(texts), truncation=True, **how)["input_ids"] if texts else []
