"""How predicted quality is compared with human scores: correlations, and a fitted logistic for those in units.

Nothing here turns an undefined correlation into 0: that of equal predictions is NaN, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares
from scipy.special import expit
from scipy.stats import kendalltau, rankdata

Array = NDArray[np.float64]


def srcc(predictions: ArrayLike, scores: ArrayLike) -> float:
    """Spearman's rank correlation, ties by their average rank.

    Args:
        predictions: (n,), n >= 3, any unit. scores: (n,), of the same images.

    Returns:
        -1 to 1. NaN, with a warning, where either side is all equal.

    Raises:
        ValueError: for fewer than 3 images, other shapes, NaN and infinity.

    >>> round(srcc([1.0, 2.0, 4.0, 3.0], [10.0, 20.0, 30.0, 40.0]), 6)
    0.8
    """
    return _defined("SRCC", predictions, scores, lambda x, y: _pearson(rankdata(x), rankdata(y)))


def krcc(predictions: ArrayLike, scores: ArrayLike) -> float:
    """Kendall's tau-b, -1 to 1. Arguments, NaN and errors as :func:`srcc`.

    >>> round(krcc([1.0, 2.0, 4.0, 3.0], [10.0, 20.0, 30.0, 40.0]), 6)
    0.666667
    """
    return _defined("KRCC", predictions, scores, lambda x, y: float(kendalltau(x, y).statistic))


def plcc(predictions: ArrayLike, scores: ArrayLike) -> float:
    """Pearson's linear correlation of the raw predictions, as DEIQT's code reports it. Else as :func:`srcc`.

    >>> round(plcc([1.0, 2.0, 4.0], [10.0, 20.0, 30.0]), 6)
    0.981981
    """
    return _defined("PLCC", predictions, scores, _pearson)


def rmse(predictions: ArrayLike, scores: ArrayLike) -> float:
    """Root of the mean squared difference, in the units of both. Errors as :func:`srcc`."""
    x, y = _checked(predictions, scores)
    return float(np.sqrt(np.mean((x - y) ** 2)))


@dataclass(frozen=True)
class LogisticFit:
    """What :func:`fit_logistic` found.

    ``kind``: "logistic4", "logistic5", or "linear" where neither could be fitted. ``plcc``: Pearson's correlation of fitted
    predictions and scores, never below 0, and 0 where the fit is flat. ``rmse``: in the scores' unit.
    """

    kind: str
    coefficients: tuple[float, ...]  # of predictions and scores that both span 0..1
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    plcc: float
    rmse: float

    def predict(self, predictions: ArrayLike) -> Array:
        """Fitted predictions in the scores' unit, of any shape."""
        x = (np.asarray(predictions, dtype=np.float64) - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        return CURVES[self.kind](np.array(self.coefficients), x) * (self.y_range[1] - self.y_range[0]) + self.y_range[0]


def _logistic4(b: Array, x: Array) -> Array:
    """CVRKD-IQA's: (b0 - b1) / (1 + exp(-(x - b2) / abs(b3))) + b1; the bound keeps the quotient finite."""
    return (b[0] - b[1]) * expit((x - b[2]) / np.maximum(np.abs(b[3]), 1e-6)) + b[1]


def _logistic5(b: Array, x: Array) -> Array:
    """VQEG's: b0 (1/2 - 1 / (1 + exp(b1 (x - b2)))) + b3 x + b4."""
    return b[0] * (expit(b[1] * (x - b[2])) - 0.5) + b[3] * x + b[4]


def _linear(b: Array, x: Array) -> Array:
    return b[0] * x + b[1]


CURVES = {"logistic4": _logistic4, "logistic5": _logistic5, "linear": _linear}


def _starts(kind: str, x: Array, slope: float, offset: float) -> list[list[float]]:
    """Rising and falling curves, steep and less steep, about the middle of the predictions."""
    centre, spread = float(x.mean()), float(x.std())
    widths = (spread / 4, spread)
    if kind == "logistic4":
        return [[float(up), float(not up), centre, width] for up in (True, False) for width in widths]
    return [
        [0.0, 1.0, centre, slope, offset],
        *([sign, 1 / w, centre, 0.0, 0.5] for sign in (1.0, -1.0) for w in widths),
    ]


def fit_logistic(predictions: ArrayLike, scores: ArrayLike, parameters: int = 4) -> LogisticFit:
    """The logistic curve that takes predictions nearest to the scores, by least squares.

    Both are brought to 0..1 first, and the best of several starts is taken: from pyiqa's one start the fit of five parameters
    fails on ordinary scores of 0..9. Where it is no better than a straight line, which the curves contain or approach, or there
    are fewer images than parameters, a line is fitted instead, and a warning says so.

    A falling curve fits a metric of the wrong sign as well as a rising one the right: look at :func:`srcc`, too.

    Args:
        predictions, scores: (n,), n >= 3. parameters: 4 (CVRKD-IQA's code) or 5 (VQEG).

    Raises:
        ValueError: as :func:`srcc`; where all predictions or all scores are equal; for another number of parameters.

    >>> x = np.linspace(-3, 3, 20)
    >>> fit = fit_logistic(x, 100 / (1 + np.exp(-2 * x)))
    >>> fit.kind, round(fit.plcc, 4), round(float(fit.predict(0.0)), 2)
    ('logistic4', 1.0, 50.0)
    """
    x, y = _checked(predictions, scores)
    if parameters not in (4, 5):
        raise ValueError(f"parameters must be 4 or 5, got {parameters}")
    x_range, y_range = ((float(values.min()), float(values.max())) for values in (x, y))
    for name, (low, high) in (("predictions", x_range), ("scores", y_range)):
        if low == high:
            raise ValueError(f"all {name} are {low:g}: there is nothing to fit")
    unit_x, unit_y = ((v - low) / (high - low) for v, (low, high) in ((x, x_range), (y, y_range)))
    slope, offset = np.polyfit(unit_x, unit_y, 1)
    kind, best = "linear", np.array([slope, offset])
    cost = float(np.sum((_linear(best, unit_x) - unit_y) ** 2))
    if len(x) >= parameters:
        curve = CURVES[f"logistic{parameters}"]

        def residuals(b: Array) -> Array:
            return curve(b, unit_x) - unit_y

        for start in _starts(f"logistic{parameters}", unit_x, slope, offset):
            found = least_squares(residuals, start, method="lm", max_nfev=500)
            if np.isfinite(found.x).all() and 2 * found.cost < cost:
                kind, best, cost = f"logistic{parameters}", found.x, 2 * found.cost
    if kind == "linear":
        warnings.warn(
            f"a logistic of {parameters} parameters fits these {len(x)} images no better than a line: took the line",
            stacklevel=2,
        )
    fit = partial(LogisticFit, kind, tuple(best.tolist()), x_range, y_range)
    fitted = fit(0.0, 0.0).predict(x)
    linear = 0.0 if np.ptp(fitted) == 0 else max(0.0, _pearson(fitted, y))
    return fit(linear, rmse(fitted, y))


def correlations(predictions: ArrayLike, scores: ArrayLike, parameters: int = 4) -> dict[str, float]:
    """All measures at once: "srcc", "krcc", "plcc" (raw), "plcc_fitted" and "rmse_fitted" (after :func:`fit_logistic`).

    Warns where SRCC is negative: "plcc_fitted" is positive then, too. All are NaN, with one warning, where either side is
    all equal. Which PLCC the paper reports was not found.

    Raises:
        ValueError: as :func:`fit_logistic`, but for equal values.
    """
    x, y = _checked(predictions, scores)
    names = ("srcc", "krcc", "plcc", "plcc_fitted", "rmse_fitted")
    if _constant(x, y):
        _warn_constant("correlations", x)
        return dict.fromkeys(names, float("nan"))
    fit = fit_logistic(x, y, parameters)
    found = dict(zip(names, (srcc(x, y), krcc(x, y), plcc(x, y), fit.plcc, fit.rmse), strict=True))
    if found["srcc"] < 0:
        warnings.warn(
            f"SRCC is {found['srcc']:.3f}: predictions fall where scores rise, which the positive PLCC after the fit "
            f"({fit.plcc:.3f}) does not show; is lower better in one of them?",
            stacklevel=2,
        )
    return found


def bootstrap_gain(
    predictions: ArrayLike,
    baseline: ArrayLike,
    scores: ArrayLike,
    groups: Sequence[Any] | None = None,
    n: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """SRCC of predictions minus SRCC of a baseline on the same images, with its 95 % percentile interval.

    Each of ``n`` resamples draws images with replacement, the same for both. Those where a side is all equal, which happens with
    a handful of images, have no correlation and are left out.

    Args:
        predictions, baseline, scores: (n,). groups: of each image, such as its reference: whole groups are drawn instead, as
            images of one reference are not independent.

    Returns:
        gain, low, high.

    Raises:
        ValueError: as :func:`srcc`; for groups of another length; where a side is all equal in every resample.
    """
    x, y = _checked(predictions, scores)
    z, _ = _checked(baseline, scores)
    if groups is not None and len(groups) != len(y):
        raise ValueError(f"{len(groups)} groups for {len(y)} images")
    labels = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    random, gains = np.random.default_rng(seed), []
    for _ in range(n):
        rows = np.concatenate([members[i] for i in random.integers(0, len(members), len(members))])
        if not _constant(x[rows], z[rows], y[rows]):
            ranks = rankdata(np.stack([x[rows], z[rows], y[rows]]), axis=1)
            gains.append(_pearson(ranks[0], ranks[2]) - _pearson(ranks[1], ranks[2]))
    if not gains:
        raise ValueError("in every resample all predictions or all scores are equal: there is no interval")
    low, high = np.quantile(gains, (0.025, 0.975)).tolist()
    return srcc(x, y) - srcc(z, y), low, high


def _checked(predictions: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, scores))
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"predictions {x.shape} and scores {y.shape}: expected two rows of one length")
    if len(x) < 3:
        raise ValueError(f"{len(x)} images: a correlation needs at least 3")
    for name, values in (("predictions", x), ("scores", y)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{len(bad)} {name} are NaN or infinite, the first at row {bad[0]}")
    return x, y


def _constant(*sides: Array) -> bool:
    return any(np.ptp(values) == 0 for values in sides)


def _warn_constant(name: str, x: Array) -> None:
    side = "predictions" if np.ptp(x) == 0 else "scores"
    warnings.warn(f"{name}: all {side} are equal, so the correlation is undefined (NaN)", stacklevel=4)


def _defined(name: str, predictions: ArrayLike, scores: ArrayLike, measure: Callable[[Array, Array], float]) -> float:
    x, y = _checked(predictions, scores)
    if _constant(x, y):
        _warn_constant(name, x)
        return float("nan")
    return measure(x, y)


def _pearson(x: Array, y: Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))
