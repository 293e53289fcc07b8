"""Weighted k-nearest-neighbour classification of frozen features: how good they are, without training anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from papercore.ops.device import full_precision
from torch import Tensor

BLOCK = 2**25  # cosines held at once: 128 MB


def knn_predict(
    bank: Float[Tensor, "bank width"],
    bank_labels: Int64[Tensor, " bank"],
    queries: Float[Tensor, "queries width"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    block_rows: int | None = None,
) -> Int64[Tensor, " queries"]:
    r"""The class of largest vote among the k features of the bank with the largest cosine (Wu et al. 2018, section 3.4).

    .. math:: \hat y = \arg\max_c \sum_{i \in N_k} [y_i = c] \exp(\cos(q, b_i) / T)

    Features are normalised here, in float32; a feature of zeros has cosine 0 with all. Of neighbours whose cosines come out equal
    those that come first in the bank count, of classes with equal votes the lowest.

    Args:
        bank, queries: features, on one device. bank_labels: classes, 0 and up.
        k: neighbours, 1 to the size of the bank. temperature: T > 0.
        block_rows: queries at a time; the memory is that of block_rows x bank floats (None: 128 MB).

    Raises:
        ValueError: for a k or T out of range, features of different widths or with NaN or inf (naming the row), labels that are
            missing, negative or not as many as the features.

    Example:
        >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([3, 3, 5])
        >>> knn_predict(bank, labels, torch.tensor([[2.0, 0.0], [0.1, 4.0]]), k=2)
        tensor([3, 5])
    """
    return _predict(bank, bank_labels, queries, [k], temperature, block_rows)[k]


@overload
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor | None, queries: Tensor, query_labels: Tensor | None, *,
    k: int = ..., temperature: float = ..., block_rows: int | None = ...,
) -> float: ...  # fmt: skip


@overload
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor | None, queries: Tensor, query_labels: Tensor | None, *,
    k: Sequence[int], temperature: float = ..., block_rows: int | None = ...,
) -> dict[int, float]: ...  # fmt: skip


def knn_accuracy(
    bank: Float[Tensor, "bank width"],
    bank_labels: Int64[Tensor, " bank"] | None,
    queries: Float[Tensor, "queries width"],
    query_labels: Int64[Tensor, " queries"] | None,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    block_rows: int | None = None,
) -> float | dict[int, float]:
    """Percent of the queries of which :func:`knn_predict` tells the class; for several k at once a dict by k.

    Args:
        query_labels: their classes. The other arguments are those of :func:`knn_predict`.

    Raises:
        ValueError: as :func:`knn_predict`.

    Example:
        >>> bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> knn_accuracy(bank, labels, bank[:2], torch.tensor([0, 2]), k=[1, 3])
        {1: 50.0, 3: 50.0}
    """
    check_features("queries", queries, query_labels)
    assert query_labels is not None
    ks = [k] if isinstance(k, int) else list(k)
    predicted = _predict(bank, bank_labels, queries, ks, temperature, block_rows)
    accuracy = {k: 100 * float((guess == query_labels).double().mean()) for k, guess in predicted.items()}
    return accuracy[k] if isinstance(k, int) else accuracy


@torch.no_grad()
def _predict(
    bank: Tensor,
    labels: Tensor | None,
    queries: Tensor,
    ks: Sequence[int],
    temperature: float,
    block_rows: int | None,
) -> dict[int, Tensor]:
    """By k, the class of each query."""
    check_features("bank", bank, labels)
    assert labels is not None
    _check_finite("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank's features are {bank.shape[1]} wide, those of the queries {queries.shape[1]}")
    if not ks:
        raise ValueError("k is an empty list: give at least one number of neighbours")
    for k in ks:
        if not 1 <= k <= len(bank):
            raise ValueError(f"k must be 1 to the size of the bank, {len(bank)}; got {k}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, got {temperature}")
    rows = max(1, BLOCK // len(bank)) if block_rows is None else block_rows
    if rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    bank, queries, classes = (
        F.normalize(bank.float(), dim=1),
        F.normalize(queries.float(), dim=1),
        int(labels.max()) + 1,
    )
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    with full_precision(), torch.autocast(bank.device.type, enabled=False):
        for block in queries.split(rows):
            cosines, places = _nearest(block @ bank.T, max(ks))
            weights = ((cosines - cosines[:, :1]) / temperature).exp()  # the nearest weighs 1, so nothing overflows
            for k in predicted:
                votes = weights.new_zeros(len(block), classes)
                votes.scatter_add_(1, labels[places[:, :k]], weights[:, :k])
                predicted[k].append(votes.argmax(1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def _nearest(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(rows, k) largest values and their places, descending; equal ones in the order of their places."""
    values, places = cosines.topk(min(k + 1, cosines.shape[1]))
    tied = values[:, k - 1] == values[:, -1] if values.shape[1] > k else values.new_zeros(len(values), dtype=torch.bool)
    places = places[:, :k]
    if tied.any():  # topk may have taken any of the equal ones
        places[tied] = cosines[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(1).values
    values, order = cosines.gather(1, places).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def check_features(name: str, features: Tensor, labels: Tensor | None) -> None:
    """Refuse features that are no finite (n, width) matrix, or labels that are not n classes.

    Raises:
        ValueError: saying which.

    >>> check_features("bank", torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]))
    Traceback (most recent call last):
    ValueError: bank, row 1: a feature is NaN or infinite
    """
    _check_finite(name, features)
    if labels is None:
        raise ValueError(f"{name}: no labels, and without labels nothing can be judged")
    if labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"{name}: labels must be {len(features)} whole numbers, one for each row of features; got "
            f"{tuple(labels.shape)} of {labels.dtype}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"{name}, row {int(labels.argmin())}: the label is {int(labels.min())}; classes count from 0")


def _check_finite(name: str, features: Tensor) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{name}: expected features of shape (n, width) with n above 0, got {tuple(features.shape)}")
    finite = features.isfinite()
    if not finite.all():
        raise ValueError(f"{name}, row {int((~finite).any(1).nonzero()[0])}: a feature is NaN or infinite")
