"""The metrics of GLUE and SuperGLUE, and how near a student is to its teacher."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats


def accuracy(true: ArrayLike, predicted: ArrayLike) -> float:
    """Share of equal entries.

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    return float(np.mean(np.asarray(true) == np.asarray(predicted)))


def f1(true: ArrayLike, predicted: ArrayLike, positive: int = 1) -> float:
    """F1 of one class, 0 if it is neither present nor predicted.

    >>> round(f1([1, 0, 1, 1], [1, 1, 0, 1]), 4)
    0.6667
    """
    t, p = np.asarray(true) == positive, np.asarray(predicted) == positive
    total = int(t.sum()) + int(p.sum())
    return 2 * int((t & p).sum()) / total if total else 0.0


def macro_f1(true: ArrayLike, predicted: ArrayLike) -> float:
    """Mean F1 over the classes that occur in either.

    >>> round(macro_f1([0, 1, 2, 2], [0, 1, 1, 2]), 4)
    0.7778
    """
    classes = np.union1d(np.asarray(true), np.asarray(predicted))
    return float(np.mean([f1(true, predicted, int(c)) for c in classes]))


def matthews(true: ArrayLike, predicted: ArrayLike) -> float:
    """Matthews correlation of two classes, 0 if a margin is empty.

    >>> round(matthews([1, 1, 0, 0], [1, 0, 0, 0]), 4)
    0.5774
    """
    t, p = np.asarray(true) == 1, np.asarray(predicted) == 1
    tp, tn, fp, fn = (float(np.sum(x)) for x in (t & p, ~t & ~p, ~t & p, t & ~p))
    bottom = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / bottom**0.5 if bottom else 0.0


def pearson(true: ArrayLike, predicted: ArrayLike) -> float:
    """Linear correlation; NaN if one side is constant."""
    return float(stats.pearsonr(np.asarray(true), np.asarray(predicted)).statistic)


def spearman(true: ArrayLike, predicted: ArrayLike) -> float:
    """Rank correlation; NaN if one side is constant."""
    return float(stats.spearmanr(np.asarray(true), np.asarray(predicted)).statistic)


METRICS = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def likeness(student: NDArray[np.float32], teacher: NDArray[np.float32], tau: float) -> dict[str, float]:
    """How near two models' logits (rows, classes) are: share of equal choices, mean L1 distance of softmax(logits / tau)."""

    def soften(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        shifted = np.exp((logits - logits.max(1, keepdims=True)).astype(np.float64) / tau)
        return shifted / shifted.sum(1, keepdims=True)

    return {
        "agreement": float(np.mean(student.argmax(1) == teacher.argmax(1))),
        "teacher_l1": float(np.abs(soften(student) - soften(teacher)).sum(1).mean()),
    }
