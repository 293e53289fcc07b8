"""Retrieval between images and texts: Recall@K and mean average precision, of which no ties make a bad model look good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from papercore.ops import full_precision
from torch import Tensor

BLOCK = 2**24  # cosines held at once: 64 MB
TIE = 1e-6  # cosines nearer than this are equal: float32 does not tell them apart


def retrieval_recall(
    image_features: Float[Tensor, "images width"],
    text_features: Float[Tensor, "texts width"],
    ks: Sequence[int] = (1, 5, 10),
    *,
    text_to_image: Int64[Tensor, " texts"] | None = None,
) -> dict[str, float]:
    """Percent of the queries that find at least one correct item among the K of largest cosine, in both directions.

    The names and the definition are those of clip_benchmark (LAION), but for ties: every wrong item with a cosine equal to the
    correct one's (within 1e-6) counts ahead of it, so that a collapsed model scores 0. A K of as many as there are items is 100.

    Args:
        image_features, text_features: normalised here, in float32; a row of zeros has cosine 0 with all.
        ks: numbers of items looked at, 1 and up.
        text_to_image: of each text the row of its image, where images have several texts. None: text i is image i's.

    Returns:
        "image_retrieval_recall@K" (a text looks for its image) and "text_retrieval_recall@K" (an image for one of its texts).

    Raises:
        ValueError: for features that are NaN, infinite or of different widths (naming which), numbers of rows that do not fit,
            an image without a text, or a K below 1.

    >>> retrieval_recall(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]], ks=[1])
    {'image_retrieval_recall@1': 50.0, 'text_retrieval_recall@1': 50.0}
    >>> retrieval_recall(torch.ones(3, 2), torch.ones(3, 2), ks=[1, 2])["image_retrieval_recall@2"]
    0.0
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of items of at least 1, got {tuple(ks)}")
    images, texts = unit_features(image_features=image_features, text_features=text_features)
    rows = torch.arange(len(images), device=images.device)
    if text_to_image is None:
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} images and {len(texts)} texts: say by text_to_image which image each text is of"
            )
        owners = rows
    else:
        owners = checked_labels("text_to_image", text_to_image, len(texts), len(images)).to(images.device)
        _check_answered("image", rows, "text", owners)
    ranks = {
        "image": correct_ranks(texts, images, owners, rows),
        "text": correct_ranks(images, texts, rows, owners),
    }
    return {
        f"{sought}_retrieval_recall@{k}": 100 * float((rank < k).double().mean())
        for sought, rank in ranks.items()
        for k in ks
    }


def mean_average_precision(
    image_features: Float[Tensor, "images width"],
    text_features: Float[Tensor, "texts width"],
    image_groups: Int64[Tensor, " images"],
    text_groups: Int64[Tensor, " texts"],
) -> dict[str, float]:
    """Many-to-many mean average precision in percent: everything of the query's group is correct. Ties as in
    :func:`retrieval_recall`.

    With the correct items of a query ranked r_1 < r_2 < ... among all items, its average precision is the mean of j / r_j.

    Args:
        image_features, text_features: as for :func:`retrieval_recall`.
        image_groups, text_groups: whole numbers; equal ones are one group.

    Returns:
        "image_retrieval_map" (texts look for images), "text_retrieval_map" (images look for texts) and "map", the mean of both.

    Raises:
        ValueError: for features as in :func:`retrieval_recall`, groups that are not one a row, or a group of one side only.

    >>> groups = torch.tensor([0, 0, 1])
    >>> maps = mean_average_precision(torch.eye(3), torch.eye(3)[[0, 0, 2]], groups, groups)
    >>> {name: round(value, 1) for name, value in maps.items()}
    {'image_retrieval_map': 88.9, 'text_retrieval_map': 86.1, 'map': 87.5}
    """
    images, texts = unit_features(image_features=image_features, text_features=text_features)
    image_groups = checked_labels("image_groups", image_groups, len(images)).to(images.device)
    text_groups = checked_labels("text_groups", text_groups, len(texts)).to(images.device)
    _check_answered("image", image_groups, "text", text_groups)
    _check_answered("text", text_groups, "image", image_groups)
    image_map = _mean_precision(texts, images, text_groups, image_groups)
    text_map = _mean_precision(images, texts, image_groups, text_groups)
    return {"image_retrieval_map": image_map, "text_retrieval_map": text_map, "map": (image_map + text_map) / 2}


def correct_ranks(queries: Tensor, items: Tensor, query_ids: Tensor, item_ids: Tensor) -> Int64[Tensor, " queries"]:
    """How many wrong items stand ahead of each query's best correct one, the tied included; unit rows, correct by equal ids.

    >>> correct_ranks(torch.eye(2), torch.eye(2)[[0, 0, 1]], torch.tensor([4, 5]), torch.tensor([5, 4, 5]))
    tensor([1, 0])
    """
    ranks = []
    for cosines, correct in _blocks(queries, items, query_ids, item_ids):
        best = cosines.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
        ranks.append(((cosines > best) & ~correct).sum(1))
    return torch.cat(ranks)


def unit_features(**named: Tensor) -> list[Float[Tensor, "n width"]]:
    """The rows as unit vectors in float32.

    Raises:
        ValueError: if a tensor is no finite (n, width) matrix with n above 0, or the widths differ, naming it.

    >>> unit_features(image_features=torch.tensor([[0.0], [float("nan")]]))
    Traceback (most recent call last):
    ValueError: image_features, row 1: a feature is NaN or infinite
    """
    for name, features in named.items():
        if features.ndim != 2 or not len(features):
            raise ValueError(
                f"{name}: expected features of shape (n, width) with n above 0, got {tuple(features.shape)}"
            )
        finite = features.isfinite().all(1)
        if not finite.all():
            raise ValueError(f"{name}, row {int(finite.logical_not().nonzero()[0])}: a feature is NaN or infinite")
    if len({features.shape[1] for features in named.values()}) > 1:
        widths = ", ".join(f"{name} {features.shape[1]}" for name, features in named.items())
        raise ValueError(f"the features have different widths: {widths}")
    return [F.normalize(features.float(), dim=1) for features in named.values()]


def checked_labels(name: str, labels: Tensor, rows: int, count: int | None = None) -> Int64[Tensor, " rows"]:
    """``labels``, a whole number for each of ``rows`` rows and, with ``count``, each in 0 to count - 1.

    Raises:
        ValueError: if they are not that.

    >>> checked_labels("labels", torch.tensor([0, 7]), 2, 5)
    Traceback (most recent call last):
    ValueError: labels, row 1: 7 is not in 0 to 4
    """
    if labels.shape != (rows,) or labels.is_floating_point():
        raise ValueError(f"{name} must be {rows} whole numbers, one a row; got {tuple(labels.shape)} of {labels.dtype}")
    if count is not None and (wrong := (labels < 0) | (labels >= count)).any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name}, row {row}: {int(labels[row])} is not in 0 to {count - 1}")
    return labels


def _mean_precision(queries: Tensor, items: Tensor, query_ids: Tensor, item_ids: Tensor) -> float:
    total = 0.0
    places = torch.arange(1, len(items) + 1, device=items.device)
    for cosines, correct in _blocks(queries, items, query_ids, item_ids):
        hits = correct.gather(1, cosines.argsort(1, descending=True))
        precisions = hits.cumsum(1) / places * hits
        total += float((precisions.sum(1) / hits.sum(1)).double().sum())
    return 100 * total / len(queries)


@torch.no_grad()
def _blocks(
    queries: Tensor, items: Tensor, query_ids: Tensor, item_ids: Tensor
) -> Iterator[tuple[Float[Tensor, "rows items"], Tensor]]:
    """For some queries at a time: the cosines, those of correct items less what a tie may be; and which items are correct."""
    with full_precision(), torch.autocast(queries.device.type, enabled=False):
        for rows in torch.arange(len(queries), device=queries.device).split(max(1, BLOCK // len(items))):
            correct = query_ids[rows, None] == item_ids
            yield queries[rows] @ items.T - TIE * correct, correct


def _check_answered(name: str, ids: Tensor, other: str, other_ids: Tensor) -> None:
    unanswered = ~torch.isin(ids, other_ids)
    if unanswered.any():
        raise ValueError(
            f"{name} {int(unanswered.nonzero()[0])} has no {other} ({int(unanswered.sum())} such): leave it out, for it "
            "could find nothing"
        )
