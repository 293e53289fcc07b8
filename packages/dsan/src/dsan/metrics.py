"""How word recognition is scored: words that are right, and how close the others come. Shares are 0..1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from scipy.stats import binomtest

GROUPS: dict[str, Callable[[str], bool]] = {
    "digit": lambda word: any(c.isdigit() for c in word),
    "short": lambda word: len(word) <= 2,
    "repeat": lambda word: any(a == b for a, b in pairwise(word)),  # CTC needs a blank between the two
}


def simplify(text: str, *, cased: bool = False, punctuation: bool = False) -> str:
    """What is compared: by the usual protocol lower-case, and of that only 0-9 and a-z.

    Args:
        cased: keep the case. punctuation: keep all but white space, other alphabets' letters included.

    >>> simplify("It's 2.50"), simplify("It's", cased=True), simplify("It's", punctuation=True)
    ('its250', 'Its', "it's")
    """
    text = text if cased else text.lower()
    return "".join(text.split()) if punctuation else re.sub("[^0-9a-zA-Z]", "", text)


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions from ``a`` to ``b``: bit-parallel, by Hyyrö's form of Myers' algorithm.

    One column of the table of distances is two whole numbers: bit i says whether the distance rises or falls from row i to i+1.

    >>> levenshtein("coffee", "c0ffe")
    2
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    every, last = (1 << len(a)) - 1, len(a) - 1
    rises, falls, distance = every, 0, len(a)
    for character in b:
        match = places.get(character, 0)
        level = (((match & rises) + rises) ^ rises) | match | falls  # the diagonal keeps its distance
        more, fewer = falls | ~(level | rises), rises & level  # than in the column before
        distance += (more >> last & 1) - (fewer >> last & 1)
        more, fewer = more << 1 | 1, fewer << 1
        rises, falls = (fewer | ~(level | more)) & every, more & level & every
    return distance


def correct(
    predictions: Sequence[str], truths: Sequence[str], *, cased: bool = False, punctuation: bool = False
) -> list[bool]:
    """Which words are right once both sides are :func:`simplify`-ed. Two empty ones are.

    Raises:
        ValueError: if there are no words, or not a prediction for each.
    """
    return [p == t for p, t in _simplified(predictions, truths, cased, punctuation)]


def word_accuracy(
    predictions: Sequence[str], truths: Sequence[str], *, cased: bool = False, punctuation: bool = False
) -> float:
    """Share of the words that are right: the benchmark's figure. Arguments and errors: as :func:`correct`.

    >>> word_accuracy(["hello", "c0ffee"], ["HELLO!", "coffee"])
    0.5
    """
    right = correct(predictions, truths, cased=cased, punctuation=punctuation)
    return sum(right) / len(right)


def exact_accuracy(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Share of the words that are right to the letter: case, punctuation and white space count. Errors: as :func:`correct`."""
    _check(predictions, truths)
    return sum(p == t for p, t in zip(predictions, truths, strict=True)) / len(truths)


def mean_similarity(
    predictions: Sequence[str], truths: Sequence[str], *, cased: bool = False, punctuation: bool = False
) -> float:
    """Mean of 1 - NED, where NED is the :func:`levenshtein` distance over the longer length. Arguments: as :func:`correct`.

    Two empty words have similarity 1, one empty word 0: DTRB gives 0 to both, PARSeq divides by zero at the first.
    """
    pairs = _simplified(predictions, truths, cased, punctuation)
    return sum(1 - levenshtein(p, t) / max(len(p), len(t), 1) for p, t in pairs) / len(pairs)


class McNemar(NamedTuple):
    """Words that only the one recogniser has right, that only the other has, and the two-sided p of a split so uneven."""

    only_a: int
    only_b: int
    p: float


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> McNemar:
    """McNemar's exact test of two recognisers on the same words: is the one right where the other is wrong more often than not?

    >>> mcnemar([True] * 9 + [False], [False] * 8 + [True, True])
    McNemar(only_a=8, only_b=1, p=0.0390625)

    Raises:
        ValueError: if they did not read the same number of words.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(f"the two must have read the same words, got {len(correct_a)} and {len(correct_b)}")
    a, b = (
        sum(bool(x) > bool(y) for x, y in zip(one, other, strict=True))
        for one, other in ((correct_a, correct_b), (correct_b, correct_a))
    )
    return McNemar(a, b, float(binomtest(a, a + b).pvalue) if a + b else 1.0)


def scores(
    predictions: Sequence[str], truths: Sequence[str], *, cased: bool = False, punctuation: bool = False
) -> dict[str, float]:
    """All of these at once: words (their number), accuracy, exact, similarity; and of each of ``GROUPS`` that has words
    accuracy_NAME and words_NAME: those with a digit, of at most two characters, with a character twice in a row.

    Arguments and errors: as :func:`correct`. The groups are of truths as they are compared.
    """
    pairs = _simplified(predictions, truths, cased, punctuation)
    found: dict[str, float] = {"words": len(pairs), "accuracy": sum(p == t for p, t in pairs) / len(pairs)}
    found["exact"] = exact_accuracy(predictions, truths)
    found["similarity"] = mean_similarity(predictions, truths, cased=cased, punctuation=punctuation)
    for name, belongs in GROUPS.items():
        right = [p == t for p, t in pairs if belongs(t)]
        if right:
            found |= {f"words_{name}": len(right), f"accuracy_{name}": sum(right) / len(right)}
    return found


def _simplified(
    predictions: Sequence[str], truths: Sequence[str], cased: bool, punctuation: bool
) -> list[tuple[str, str]]:
    _check(predictions, truths)
    sides = (
        [simplify(text, cased=cased, punctuation=punctuation) for text in texts] for texts in (predictions, truths)
    )
    return list(zip(*sides, strict=True))


def _check(predictions: Sequence[str], truths: Sequence[str]) -> None:
    if len(predictions) != len(truths):
        raise ValueError(f"expected a prediction for each word, got {len(predictions)} for {len(truths)} words")
    if not truths:
        raise ValueError("there are no words to judge")
