"""The progressively weighted contrastive loss. The paper's own weights are unknown to us: those here are a reconstruction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Float
from papercore.ops import info_nce
from torch import Tensor

from peg._negatives import LogWeight, Negatives


@runtime_checkable
class WeightSchedule(Protocol):
    """What a schedule must have: write your own, should you know a better formula than ours.

    >>> class Squared:
    ...     def lam(self, step, total):
    ...         return 5.0 * step / total
    ...     def log_weight(self, sim, sim_pos, lam):
    ...         return lam * sim.square()
    >>> isinstance(Squared(), WeightSchedule)
    True
    >>> rows = torch.eye(4)
    >>> output = progressive_info_nce(rows, rows, hardness=2.5, difficulty=Squared().log_weight)
    """

    def lam(self, step: int, total: int) -> float:
        """The hardness after ``step`` of ``total`` optimiser steps."""

    def log_weight(self, sim: Tensor, sim_pos: Tensor, lam: float) -> Tensor:
        """Log-weights of negatives of similarities ``sim`` (rows, c), where the positive has ``sim_pos`` (rows, 1)."""


@dataclass(frozen=True)
class HardnessSchedule:
    """Hardness that moves from ``start`` to ``end``, so that hard negatives count more and more (ours: see the README).

    Args:
        start, end: lambda, a factor of the cosine; 0: all negatives alike; below 0 favours easy ones.
        ramp: share of training after which ``end`` is reached, above 0 to 1.
        shape: linear, cosine, step (half-way up the ramp), or constant (``end`` all the time).
        difficulty: cosine, or margin: cosine less that of the positive.

    Raises:
        ValueError: for an unknown shape or difficulty, or a ramp outside (0, 1].

    Example:
        >>> schedule = HardnessSchedule(0.0, 5.0)
        >>> [schedule.lam(step, 100) for step in (0, 40, 80, 100)]
        [0.0, 2.5, 5.0, 5.0]
    """

    start: float = 0.0
    end: float = 5.0
    ramp: float = 0.8
    shape: str = "linear"
    difficulty: str = "cosine"

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, ("linear", "cosine", "step", "constant"))
        _one_of("difficulty", self.difficulty, ("cosine", "margin"))
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp is a share of training, above 0 to 1; got {self.ramp}")

    def lam(self, step: int, total: int) -> float:
        """The hardness after ``step`` of ``total`` optimiser steps.

        Raises:
            ValueError: if ``total`` is not known (0 or less).
        """
        if self.shape == "constant":
            return self.end
        if total <= 0:
            raise ValueError(f"a {self.shape} hardness needs the number of training steps; got {total}")
        u = min(1.0, step / total / self.ramp)
        share = {"linear": u, "cosine": (1 - math.cos(math.pi * u)) / 2, "step": float(u >= 0.5)}[self.shape]
        return self.start + (self.end - self.start) * share

    def log_weight(self, sim: Tensor, sim_pos: Tensor, lam: float) -> Tensor:
        """lambda h, where h is the difficulty."""
        return lam * (sim - sim_pos if self.difficulty == "margin" else sim)


class ProgressiveOutput(NamedTuple):
    """The loss and, detached, what to log beside it. The last three are None unless ``statistics`` were asked for.

    >>> rows = torch.eye(4)
    >>> output = progressive_info_nce(rows, rows, statistics=True)
    >>> output.effective_negatives, output.masked
    (tensor(3.), tensor(0.))
    """

    loss: Tensor
    positive_probability: Tensor  # mean over the queries of the softmax's share of the positive
    mean_weight: Tensor | None  # of negatives that are not masked
    effective_negatives: Tensor | None  # mean over the queries of (sum w)^2 / sum w^2
    masked: Tensor | None  # share of the negatives that are


def progressive_info_nce(
    queries: Float[Tensor, "b d"],
    positives: Float[Tensor, "rows width"],
    negatives: Tensor | Sequence[Tensor] | None = None,
    *,
    temperature: float = 0.02,
    hardness: float = 0.0,
    difficulty: str | LogWeight = "cosine",
    normalise: str = "none",
    apply_to: str = "all",
    mask: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    margin_strategy: str = "absolute",
    sources: Tensor | None = None,
    in_batch: str | Sequence[str] = "all",
    query_weights: Float[Tensor, " weights"] | None = None,
    gamma: float = 0.0,
    layout: str = "column",
    gather: bool = False,
    group: dist.ProcessGroup | None = None,
    statistics: bool = False,
    check_finite: bool = False,
) -> ProgressiveOutput:
    r"""InfoNCE over all candidates of a batch, in which harder negatives count more.

    .. math:: L_i = -\frac{s_{ii}}{\tau} + \log \Bigl(e^{s_{ii}/\tau} + \sum_{j} \omega_{ij} e^{s_{ij}/\tau}\Bigr),
        \quad \log \omega_{ij} = \lambda h_{ij}

    s are cosines in float32 at least; h is the difficulty of a negative, a constant. The candidates C = b (1 + k) of a batch are,
    in this order, all positives, all first hard negatives, all second ones, and so on; each is a negative of every query but
    its own. The b x C matrix is never whole. lambda = 0 is plain InfoNCE. The paper says that weights depend on the difficulty
    and change while training; this formula is our reconstruction.

    Args:
        queries, positives: (b, d). negatives: hard ones, (b, k, d), k tensors (b, d), or flat (b k, d) as ``layout`` says.
        temperature: tau, above 0 (ours: the paper's is unknown).
        hardness: lambda, a factor of the cosine, not of cosine / tau.
        difficulty: cosine, margin (cosine less the positive's), or a function: see :class:`WeightSchedule`.
        normalise: none, or mean1: a query's weights have mean 1, so that only their distribution changes.
        apply_to: which negatives are weighted: all, hard (the query's own), in_batch (all others).
        mask: bool, True keeps: (b, k) which hard negatives there are, or (b, C) which pairs count (C over all ranks).
        candidate_ids: (C) or (C, several), integers such as document ids and hashes of texts; -1: none.
        positive_ids: (b, p), known positives of each query among such integers, filled up by -1: such a candidate is no negative.
        false_negative_margin: masks what is more similar than the positive by more than this: absolute, or relative to the
            positive's |cosine| with ``margin_strategy``.
        sources: (b), where each query comes from: numbers from 0. in_batch: all, own (candidates of the own source alone), none
            (the query's own hard negatives alone); or one such word for each source.
        query_weights: (b), constants, >= 0.
        gamma: above 0, queries weigh (1 - p)^gamma too, p the positive's probability; costs one more forward.
        layout: of flat negatives. column: all first ones, then all second ones; interleaved: query by query.
        gather: candidates of all ranks; the rows are this rank's.
        statistics: compute the last three fields of the result, for logs.
        check_finite: look for NaN and infinity first.

    A query without any negative has loss 0. A zero vector has cosine 0 with everything.

    Raises:
        ValueError: for shapes, types, devices or options that do not fit; the message names them.

    Example:
        >>> rows = torch.eye(4)
        >>> easy = progressive_info_nce(rows, rows, rows.roll(1, 0)[:, None], temperature=0.2)
        >>> hard = progressive_info_nce(rows, rows, rows[:, None], temperature=0.2, hardness=5.0)
        >>> bool(easy.loss < hard.loss)
        True
    """
    _one_of("normalise", normalise, ("none", "mean1"))
    _one_of("apply_to", apply_to, ("all", "hard", "in_batch"))
    _one_of("margin_strategy", margin_strategy, ("absolute", "relative"))
    if not callable(difficulty):
        _one_of("difficulty", difficulty, ("cosine", "margin"))
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    b, hard = len(queries), _hard_negatives(negatives, queries, layout)
    _check(queries, positives, hard)
    if check_finite:
        for name, rows in (
            ("queries", queries),
            ("positives", positives),
            *((f"negatives {i}", n) for i, n in enumerate(hard)),
        ):
            bad = ~rows.isfinite().all(1)
            if bad.any():
                raise ValueError(f"{name} hold NaN or infinity, first in row {int(bad.nonzero()[0])}")
    q, c = _unit(queries), torch.cat([_unit(positives), *map(_unit, hard)])
    with torch.no_grad():
        pairs = Negatives((q * c[:b]).sum(1, keepdim=True), len(hard), temperature, gather, group)
        if pairs.count == 1:
            warnings.warn("one query and no negatives: the loss is 0 and teaches nothing", stacklevel=2)
        if statistics:
            pairs.count_figures()
        if mask is not None:
            pairs.mask_given(mask)
        if candidate_ids is not None and positive_ids is not None:
            pairs.mask_known(candidate_ids, positive_ids)
        if sources is not None:
            pairs.mask_sources(sources, in_batch)
        elif in_batch != "all":
            raise ValueError(f"in_batch {in_batch!r} needs sources, the number of each query's source")
        if false_negative_margin is not None:
            pairs.mask_more_similar(false_negative_margin, margin_strategy == "relative")
        if hardness != 0 or callable(difficulty):
            pairs.weigh(hardness, difficulty, apply_to, normalise == "mean1")
    losses = q.new_empty(b)

    def loss(weights: Tensor | None) -> Tensor:
        return info_nce(
            q, c, 1 / temperature, positives=pairs.own.squeeze(1), log_weights=pairs if pairs.acts else None,
            row_weights=weights, gather=gather, group=group, row_losses=losses,
        )  # fmt: skip

    weights = query_weights
    if gamma > 0:
        with torch.no_grad():
            loss(None)
        weights = (1 - torch.exp(-losses)).pow(gamma) * (1 if query_weights is None else query_weights)
        if statistics:
            pairs.count_figures()  # anew
    value = loss(weights)
    return ProgressiveOutput(value, torch.exp(-losses).mean(), *_figures(pairs))


def _hard_negatives(negatives: Tensor | Sequence[Tensor] | None, queries: Tensor, layout: str) -> list[Tensor]:
    """k tensors (b, d), whatever the form they were given in."""
    _one_of("layout", layout, ("column", "interleaved"))
    if negatives is None:
        return []
    if not isinstance(negatives, Tensor):
        return list(negatives)
    b, flat = len(queries), negatives
    if negatives.dim() == 2:
        if b == 0 or len(negatives) % b:
            raise ValueError(f"{len(negatives)} flat negatives are not the same number for each of {b} queries")
        return list(flat.chunk(len(flat) // b)) if layout == "column" else list(flat.unflatten(0, (b, -1)).unbind(1))
    return list(negatives.unbind(1))


def _check(queries: Tensor, positives: Tensor, hard: Sequence[Tensor]) -> None:
    if queries.dim() != 2 or not len(queries):
        raise ValueError(f"queries {tuple(queries.shape)} must be (b, d), at least one")
    for name, rows in (("positives", positives), *((f"negatives {i}", rows) for i, rows in enumerate(hard))):
        if rows.shape != queries.shape:
            raise ValueError(f"{name} {tuple(rows.shape)} do not fit queries {tuple(queries.shape)}")
        if rows.device != queries.device:
            raise ValueError(f"{name} are on {rows.device}, queries on {queries.device}")


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, at least in float32; zero rows stay, with a finite gradient."""
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        norms = rows.norm(dim=1, keepdim=True)
        return rows / torch.where(norms > 0, norms.clamp_min(1e-12), 1.0)


def _figures(pairs: Negatives) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if pairs.figures is None:
        return None, None, None
    negatives = pairs.figures["negatives"]
    return (
        pairs.figures["weight"] / negatives.clamp_min(1),
        pairs.figures["effective"] / pairs.b,
        1 - negatives / max(1, pairs.b * (pairs.count - 1)),
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
