"""Soft targets for contrastive losses, in log space: probabilities as small as e^-100 have logarithms but no float32 value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


def soft_cross_entropy(
    logits: Float[Tensor, "n m"], target: Float[Tensor, "target_n target_m"], *, reduction: str = "mean"
) -> Float[Tensor, "*_"]:
    r""":math:`-\sum_j t_{ij} \log \mathrm{softmax}(\ell_i)_j`: its least value is the entropy of the target, not 0.

    Args:
        logits: float16 and bfloat16 are computed in float32.
        target: rows that sum to 1.
        reduction: "mean" over rows, "sum", or "none".

    Raises:
        ValueError: for shapes that differ, or rows of targets that do not sum to 1 (by more than 1e-3).

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]))  # log 2
        tensor(0.6931)
    """
    _same_shape(logits, target)
    total = target.detach().sum(1)
    if not ((total - 1).abs() <= 1e-3).all():
        row = int((total - 1).abs().argmax())
        raise ValueError(f"row {row} of target sums to {float(total[row]):.4g}: rows of targets must sum to 1")
    log_q = _log_softmax(logits).masked_fill(target == 0, 0.0)  # before the product: -inf times 0 is NaN
    return _reduce(-(target * log_q).sum(1), reduction)


def soft_kl(
    logits: Float[Tensor, "n m"],
    target: Float[Tensor, "target_n target_m"] | None = None,
    log_target: Float[Tensor, "target_n target_m"] | None = None,
    *,
    symmetric: bool = False,
    reduction: str = "mean",
) -> Float[Tensor, "*_"]:
    r""":math:`\mathrm{KL}(t_i \| q_i)` with q = softmax(logits); symmetric: the mean of both directions.

    Args:
        target, log_target: one of both. -inf is a target of 0. Pairs with ``logits`` -inf are in neither distribution.
        symmetric: ½ [KL(t‖q) + KL(q‖t)]. Infinite for a target of 0 where q is not.
        reduction: "mean" over rows, "sum", or "none".

    Raises:
        ValueError: for shapes that differ, or if not exactly one of the two targets is given.

    Example:
        >>> target = torch.tensor([[0.7, 0.3]])
        >>> soft_kl(torch.zeros(1, 2), target), soft_kl(torch.zeros(1, 2), target, symmetric=True)
        (tensor(0.0823), tensor(0.0847))
    """
    if (target is None) == (log_target is None):
        raise ValueError("give either target or log_target")
    given = log_target if target is None else target
    assert given is not None
    _same_shape(logits, given)
    log_t, log_q = given.to(torch.promote_types(given.dtype, torch.float32)), _log_softmax(logits)
    if target is not None:
        log_t = log_t.masked_fill(target == 0, 1.0).log().masked_fill(target == 0, -torch.inf)  # log 0 has no gradient

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        # Masked before the product: -inf times 0 is NaN, in the gradient too.
        present = log_a != -torch.inf
        log_a, log_b = log_a.masked_fill(~present, 0.0), log_b.masked_fill(~present, 0.0)
        return torch.where(present, log_a.exp() * (log_a - log_b), 0.0).sum(1)

    rows = (kl(log_t, log_q) + kl(log_q, log_t)) / 2 if symmetric else kl(log_t, log_q)
    return _reduce(rows, reduction)


def negatives_log_softmax(
    logits: Float[Tensor, "n m"], positives: Shaped[Tensor, "*_"] | None = None
) -> Float[Tensor, "n m"]:
    """Log-softmax over each row's negatives alone; -inf at the positives, and nowhere NaN, in the gradient neither.

    Args:
        positives: as in :func:`soften`. A row without negatives is -inf throughout.

    Example:
        >>> negatives_log_softmax(torch.tensor([[100.0, 1.0, 1.0]]), torch.tensor([0])).exp()
        tensor([[0.0000, 0.5000, 0.5000]])
    """
    mask = _positives(logits, positives)
    empty = mask.all(1, keepdim=True)
    kept = logits.masked_fill(mask & ~empty, -torch.inf)
    return _log_softmax(kept).masked_fill(mask, -torch.inf)


def soften(
    log_p: Float[Tensor, "n m"], beta: float | Float[Tensor, "n 1"], positives: Shaped[Tensor, "*_"] | None = None
) -> Float[Tensor, "n m"]:
    r""":math:`\log[(1 - \beta) h + \beta p]`, h the hard target: 1 at the positive, shared equally by several.

    Args:
        log_p: logarithms of probabilities. beta: 0 to 1, or one for each row (n, 1).
        positives: column of each row's positive, int (n); or bool (n, m); None: the diagonal.

    Raises:
        ValueError: for a beta outside 0 to 1.

    Example:
        >>> soften(torch.tensor([[0.5, 0.5]]).log(), 0.2, torch.tensor([0])).exp()
        tensor([[0.9000, 0.1000]])
    """
    beta = torch.as_tensor(beta, dtype=log_p.dtype, device=log_p.device)
    if not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError(f"beta must be from 0 to 1, got {beta.tolist()}")
    mask = _positives(log_p, positives)
    soft = log_p + beta.log()
    hard = (1 - beta).log() - mask.sum(1, keepdim=True).clamp_min(1).to(log_p.dtype).log()
    return torch.where(mask, torch.logaddexp(soft, hard.expand_as(soft)), soft)


def _positives(like: Tensor, positives: Tensor | None) -> Bool[Tensor, "n m"]:
    n, m = like.shape
    if positives is not None and positives.dtype == torch.bool:
        _same_shape(like, positives)
        return positives
    rows = torch.arange(n, device=like.device) if positives is None else positives
    if rows.shape != (n,) or n == 0 or int(rows.max()) >= m or int(rows.min()) < 0:
        raise ValueError(f"positives {tuple(rows.shape)} must name a column of 0 to {m - 1} for each of {n} rows")
    return F.one_hot(rows.long(), m).bool()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    return rows if reduction == "none" else getattr(rows, reduction)()


def _same_shape(logits: Tensor, other: Tensor) -> None:
    if logits.shape != other.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(other.shape)} differ in shape")
