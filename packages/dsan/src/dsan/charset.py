"""Which characters a recogniser knows, and their numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

ALPHANUMERIC = "0123456789abcdefghijklmnopqrstuvwxyz"  # the usual 36 of this field's tables


class CTCCharset:
    """Characters 1 to K; 0 is CTC's blank.

    Args:
        characters: each once; the usual 36 by default.

    Raises:
        ValueError: for none, one that is given twice, or white space (labels never keep it).

    >>> charset = CTCCharset()
    >>> charset.normalize("Café No. 7")
    'cafeno7'
    >>> charset.encode(["a1", "z"])
    (tensor([11,  2, 36]), tensor([2, 1]))
    >>> charset.decode([11, 2])
    'a1'
    """

    blank = 0

    def __init__(self, characters: str = ALPHANUMERIC) -> None:
        twice = sorted({c for c in characters if characters.count(c) > 1})
        if not characters or twice or any(c.isspace() for c in characters):
            reason = "is empty" if not characters else f"has {twice[0]!r} twice" if twice else "has white space"
            raise ValueError(f"the charset {reason}: give each character once, such as {ALPHANUMERIC!r}")
        self.characters = characters
        self.table = np.array(["", *characters])  # id -> character
        self._ids = {c: i for i, c in enumerate(characters, 1)}
        self._lower = not any(c.isupper() for c in characters)

    def __len__(self) -> int:
        """K, without the blank."""
        return len(self.characters)

    def normalize(self, text: str) -> str:
        """``text`` as a label: without white space, lower-cased if no character is upper case, compatible forms and accents taken
        apart (NFKD) where the charset lacks the whole, and without what is not in the charset even then."""
        text = unicodedata.normalize("NFC", text)
        if self._lower:
            text = text.lower()
        parts = (c if c in self._ids else unicodedata.normalize("NFKD", c) for c in text)
        return "".join(c for part in parts for c in part if c in self._ids)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids of all texts in one row, and the length of each, both int64.

        Raises:
            ValueError: for a character that the charset lacks.
        """
        try:
            ids = [self._ids[c] for text in texts for c in text]
        except KeyError as missing:
            text = next(t for t in texts if missing.args[0] in t)
            raise ValueError(
                f"{text!r} has {missing.args[0]!r}, which the charset lacks: normalize() it, or add it"
            ) from None
        return torch.tensor(ids, dtype=torch.int64), torch.tensor([len(t) for t in texts], dtype=torch.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids 1 to K."""
        return "".join(self.characters[i - 1] for i in ids)


def required_frames(text: str) -> int:
    """Frames that CTC needs for ``text``: one for each character, and a blank between equal neighbours.

    >>> required_frames("bookkeeper")
    13
    """
    return len(text) + sum(a == b for a, b in pairwise(text))
