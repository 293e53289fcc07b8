"""Losses over all pairs of rows whose matrix of logits is never whole: the one primitive under the contrastive losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from papercore.ops.device import full_precision

# Of a block of logits: small enough for a processor's cache, large enough for its matrix products.
_BYTES, _MOST_ROWS = 2**25, 128

# (logits of some rows, which rows) -> loss of each; the logits are overwritten by their gradient. The first column is the
# row's own positive, where rows have one apart from the keys.
RowLoss = Callable[[Tensor, slice], Tensor]


def streamed(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    row_loss: RowLoss,
    weights: Tensor,
    own: Tensor | None = None,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_i weights_i loss_i of the logits scale <queries_i, keys_j>, in O(block x columns) memory, backward included; and the
    loss of each row, without a gradient.

    Every row of logits is formed once, and its gradient with it, so that backward has only to multiply. All tensors are of one
    floating dtype, at least float32; ``weights`` are constants.
    """
    return _Streamed.apply(queries, keys, scale, own, weights, row_loss, block_rows)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        own: Tensor | None,
        weights: Tensor,
        row_loss: RowLoss,
        block_rows: int | None,
    ) -> tuple[Tensor, Tensor]:
        wants_queries, wants_keys, wants_scale, wants_own = ctx.needs_input_grad[:4]
        columns = len(keys) + (own is not None)
        rows = block_rows or max(1, min(_MOST_ROWS, _BYTES // (columns * keys.element_size())))
        losses = queries.new_empty(len(queries))
        grad_queries = torch.empty_like(queries) if wants_queries or wants_scale else None
        grad_keys = torch.zeros_like(keys) if wants_keys else None
        grad_own = torch.empty_like(own) if own is not None and wants_own else None
        logits = queries.new_empty(min(rows, len(queries)), columns)  # one buffer for all blocks
        with full_precision():
            for start in range(0, len(queries), rows):
                part = slice(start, min(start + rows, len(queries)))
                q, weight, block = queries[part], weights[part].unsqueeze(1), logits[: part.stop - part.start]
                pairs = block[:, columns - len(keys) :]
                torch.mm(q * scale, keys.T, out=pairs)  # scales and weights touch q, which is smaller than the block
                if own is not None:
                    block[:, 0] = (q * own[part]).sum(1) * scale
                losses[part] = row_loss(block, part)
                if grad_queries is not None:
                    grad_queries[part] = pairs @ keys
                    if own is not None:
                        grad_queries[part] += block[:, :1] * own[part]
                    grad_queries[part] *= weight
                if grad_keys is not None:
                    grad_keys.addmm_(pairs.T, q * weight)
                if grad_own is not None:
                    grad_own[part] = block[:, :1] * q * weight
        # The gradient of the scale, sum_ij G_ij <q_i, k_j>, is that of the queries times the queries.
        grad_scale = (grad_queries * queries).sum() if grad_queries is not None and wants_scale else None
        ctx.save_for_backward(grad_queries if wants_queries else None, grad_keys, grad_scale, grad_own, scale)
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; the gradient would silently be taken for a constant
            raise RuntimeError("streamed losses have no second derivative: leave out create_graph=True")
        grad_queries, grad_keys, grad_scale, grad_own, scale = ctx.saved_tensors
        of_rows = [None if g is None else g * (upstream * scale) for g in (grad_queries, grad_keys, grad_own)]
        return (
            of_rows[0],
            of_rows[1],
            None if grad_scale is None else grad_scale * upstream,
            of_rows[2],
            None,
            None,
            None,
        )
