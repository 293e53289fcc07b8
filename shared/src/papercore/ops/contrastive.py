"""Contrastive losses whose memory does not grow with the number of pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from papercore.ops._streaming import RowLoss, streamed
from papercore.ops.distributed import gather_features

# A matrix of rows and columns, or a function that gives its rows when they are needed.
Rows = Tensor | Callable[[slice], Tensor]
# (block of logits, its rows) -> what is to be added to it, or None where the function has done so itself.
LogWeights = Callable[[Tensor, slice], Tensor | None]
_TINY = 1e-30  # below this a probability is 0: processors multiply denormal numbers slowly


def info_nce(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m key_d"],
    logit_scale: float | Float[Tensor, ""] = 1.0,
    *,
    positives: Rows | None = None,
    own_positives: Float[Tensor, "own_n own_d"] | None = None,
    mask: Rows | None = None,
    log_weights: Tensor | LogWeights | None = None,
    row_weights: Float[Tensor, " weights"] | None = None,
    symmetric: bool = False,
    gather: bool = False,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
    row_losses: Float[Tensor, " losses"] | None = None,
    block_rows: int | None = None,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of each query's softmax over all keys, in memory O(block x m + (n + m) d), backward included.

    .. math:: L_i = -\sum_j t_{ij} \Bigl(\ell_{ij} - \log \sum_k e^{\ell_{ik}}\Bigr),
        \quad \ell_{ij} = s \langle q_i, k_j \rangle + w_{ij}

    The targets t of a row sum to 1; a row without any teaches nothing. No matrix of n x m is kept: a block of rows is formed,
    turned into its gradient in place, and multiplied at once, so that backward costs nothing more. float16 and bfloat16 are
    computed in float32, without TF32.

    Args:
        queries, keys: rows, normalised by the caller if cosines are meant. Keys without ``requires_grad``, such as a queue,
            cost no gradient.
        logit_scale: s, 1 / temperature, > 0. A tensor gets its gradient.
        positives: of each query. None: key i, or its ``own_positives``. Integers (n): a key's number. bool (n, m): several,
            that share the target equally. Floating (n, m): soft targets, whose rows sum to 1. The last two also as a function
            of a slice of rows.
        own_positives: a positive of each query that is not among the keys, such as MoCo's, whose keys are a queue.
        mask: bool (n, m), True keeps a pair; or a function of a slice of rows.
        log_weights: (n, m), w, constants, added to the logits; -inf masks. A function gets (the block s <q, k>, its slice of
            rows), and may add them in place and return None. Where a query has one positive, as a key's number or its own, mask
            and weights leave that one alone.
        row_weights: v, constants, >= 0: the mean is sum(v L) / sum(v).
        symmetric: the mean of both directions, as CLIP (n = m); row i is the positive of row i, or ``positives`` are bool.
        gather: keys of all ranks; positives and masks count columns over them, rows on this rank alone. The average that
            data-parallel training takes of the ranks' gradients is that of the global mean loss.
        reduction: "mean" or "sum".
        row_losses: (n), is filled with each query's loss, for logs.
        block_rows: rows formed at a time; None: as many as fit 32 MiB, at most 128.

    A row without any negative has loss and gradient 0.

    Raises:
        ValueError: for shapes that do not fit, a scale that is not positive, or options that exclude each other.

    Example:
        >>> rows = torch.eye(3)
        >>> info_nce(rows, rows, 10.0) < info_nce(rows, rows.roll(1, 0), 10.0)
        tensor(True)
    """
    _check(queries, keys, logit_scale, own_positives, reduction)
    for name, of_rows in (("row_weights", row_weights), ("row_losses", row_losses)):
        if of_rows is not None and of_rows.shape != queries.shape[:1]:
            raise ValueError(f"{name} {tuple(of_rows.shape)} do not fit queries {tuple(queries.shape)}: one a row")
    if symmetric:
        if row_losses is not None:
            raise ValueError("symmetric=True has two losses for each row: leave row_losses out")
        matrices: dict[str, Any] = {"positives": positives, "mask": mask, "log_weights": log_weights}
        _check_symmetric(queries, keys, matrices, own_positives, gather)
        turned: dict[str, Any] = {name: None if matrix is None else matrix.mT for name, matrix in matrices.items()}
        shared: dict[str, Any] = {
            "row_weights": row_weights,
            "gather": gather,
            "group": group,
            "reduction": reduction,
            "block_rows": block_rows,
        }
        there = info_nce(queries, keys, logit_scale, **matrices, **shared)
        return (there + info_nce(keys, queries, logit_scale, **turned, **shared)) / 2
    others, offset = keys, 0
    if gather:
        if reduction != "mean" or row_weights is not None or own_positives is not None:
            raise ValueError('gather=True is for reduction="mean" without row_weights and own_positives')
        if torch.is_grad_enabled() and queries.requires_grad and not keys.requires_grad:
            raise ValueError(
                "gather=True with keys that are detached loses the gradient that other ranks' queries give them: pass them as "
                "they are, or, if they are constants, gather them by gather_features and leave out gather"
            )
        (others,), offset = gather_features(keys, group=group)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=queries.device)
        weights = queries.new_ones(len(queries), dtype=dtype) if row_weights is None else row_weights.detach().to(dtype)
        if reduction == "mean":
            weights = weights / weights.sum().clamp_min(torch.finfo(dtype).tiny)
        own = None if own_positives is None else own_positives.to(dtype)
        row_loss = _cross_entropy(positives, own is not None, offset, mask, log_weights, len(queries), len(others))
        loss, losses = streamed(queries.to(dtype), others.to(dtype), scale, row_loss, weights, own, block_rows)
        if row_losses is not None:
            row_losses.copy_(losses)
        return loss


def _cross_entropy(
    positives: Rows | None,
    has_own: bool,
    offset: int,
    mask: Rows | None,
    log_weights: Tensor | LogWeights | None,
    n: int,
    m: int,
) -> RowLoss:
    """The loss of a block of rows, in place: see :data:`papercore.ops._streaming.RowLoss`."""
    if has_own and positives is not None:
        raise ValueError("positives and own_positives both say what a query belongs to: give one")
    for name, rows in (("positives", positives), ("mask", mask), ("log_weights", log_weights)):
        wanted = [(n, m), (n,)] if name == "positives" else [(n, m)]
        if isinstance(rows, Tensor) and tuple(rows.shape) not in wanted:
            raise ValueError(f"{name} {tuple(rows.shape)} does not fit {n} queries and {m} keys")
    if positives is None and not has_own and offset + n > m:
        raise ValueError(f"{n} queries and {m} keys: without positives, key i must belong to query i")

    def hard(part: slice, device: torch.device) -> Tensor | None:
        """The column of each row's positive in its block of logits, if there is one alone."""
        if has_own:
            return torch.zeros(part.stop - part.start, dtype=torch.long, device=device)
        if positives is None:
            return torch.arange(part.start, part.stop, device=device) + offset
        if isinstance(positives, Tensor) and positives.dim() == 1:
            return positives[part].to(device)
        return None

    def row_loss(logits: Tensor, part: slice) -> Tensor:
        pairs = logits[:, int(has_own) :]
        column = hard(part, logits.device)
        place = None if column is None else column.unsqueeze(1)
        kept = None if place is None else logits.gather(1, place)
        if log_weights is not None:
            added = log_weights[part] if isinstance(log_weights, Tensor) else log_weights(pairs, part)
            if added is not None:
                pairs += added
        if mask is not None:
            pairs.masked_fill_(~(mask(part) if callable(mask) else mask[part]), -torch.inf)
        if place is not None and kept is not None:  # weights and masks are of negatives
            logits.scatter_(1, place, kept)
            target, gold = None, kept.squeeze(1)
        else:
            assert positives is not None
            target = positives(part) if callable(positives) else positives[part]
            target = _shares(target, pairs, part)
            gold = (target * pairs.masked_fill(target == 0, 0.0)).sum(1)
        top = logits.amax(1, keepdim=True)
        torch.softmax(logits, 1, out=logits)
        log_total = top - logits.amax(1, keepdim=True).log()  # the largest probability is e^(top - log_total)
        if place is None:  # a row without any target may be masked whole
            log_total.masked_fill_(top == -torch.inf, 0.0)
            logits.masked_fill_(top == -torch.inf, 0.0)
        torch.threshold_(logits, _TINY, 0.0)
        if place is not None:
            logits.scatter_add_(1, place, -torch.ones_like(top))
            return log_total.squeeze(1) - gold
        assert target is not None
        mass = target.sum(1, keepdim=True)
        torch.sub(pairs.mul_(mass), target, out=pairs)
        return torch.where(mass > 0, mass * log_total, 0.0).squeeze(1) - gold

    return row_loss


def _shares(target: Tensor, like: Tensor, part: slice) -> Tensor:
    """Soft targets of a block; several positives share theirs equally, and a row without any has none."""
    if target.shape != like.shape:
        raise ValueError(
            f"positives of rows {part.start} to {part.stop} are {tuple(target.shape)}, expected {tuple(like.shape)}"
        )
    if target.dtype == torch.bool:
        return target.to(like) / target.sum(1, keepdim=True).clamp_min(1)
    return target.to(like)


def _check(
    queries: Tensor, keys: Tensor, logit_scale: float | Tensor, own_positives: Tensor | None, reduction: str
) -> None:
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or not len(queries) or not len(keys):
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)} must be (n, d) and (m, d), with no side of 0"
        )
    if own_positives is not None and own_positives.shape != queries.shape:
        raise ValueError(f"own_positives {tuple(own_positives.shape)} must be as queries {tuple(queries.shape)}")
    if not isinstance(logit_scale, Tensor) and not logit_scale > 0:
        raise ValueError(f"logit_scale is 1 / temperature and must be positive, got {logit_scale}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")


def _check_symmetric(
    queries: Tensor, keys: Tensor, matrices: dict[str, Any], own_positives: Tensor | None, gather: bool
) -> None:
    if len(queries) != len(keys) or own_positives is not None:
        raise ValueError(f"symmetric=True needs as many keys as queries; got {len(queries)} and {len(keys)}")
    positives, given = matrices["positives"], [m for m in matrices.values() if m is not None]
    if any(callable(m) for m in given) or (gather and given):
        raise ValueError(
            "symmetric=True takes positives, mask and log_weights as whole matrices, and none with gather=True"
        )
    if isinstance(positives, Tensor) and positives.dtype != torch.bool:
        raise ValueError("symmetric=True takes bool positives: soft targets differ by direction, so call once for each")
