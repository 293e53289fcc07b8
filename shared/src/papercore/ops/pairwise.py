"""Distances between all pairs of rows, without a tensor of all differences."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from papercore.ops import _pairwise_triton as triton
from papercore.ops.device import full_precision

_EXACT = "donot_use_mm_for_euclid_dist"  # |x|^2 + |y|^2 - 2xy cancels for near rows
_ELEMENTS = 2**24  # of the largest temporary of the chunked gradient


def pairwise_lp(
    x: Float[Tensor, "*batch n c"], y: Float[Tensor, "*batch m c"], p: int = 1, squared: bool = False
) -> Float[Tensor, "*batch n m"]:
    r"""The distance of every row of ``x`` to every row of ``y``, in memory O(nm + (n + m)c), forward and backward.

    .. math:: d_{ij} = \Bigl(\sum_c |x_{ic} - y_{jc}|^p\Bigr)^{1/p}

    ``torch.cdist`` keeps n m c numbers for its gradient on CUDA; here a tile of differences is formed, used and formed again.
    The gradient of \|x\| at 0 is taken as 0, for p = 1 in each column, for p = 2 as a whole.

    Args:
        x, y: rows; float16 and bfloat16 are computed in float32. p: 1 or 2. squared: with p = 2, return the square.

    Raises:
        ValueError: for another p, ``squared`` with p = 1, or different numbers of columns.

    Example:
        >>> pairwise_lp(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[2., 0.]])
    """
    if p not in (1, 2) or (squared and p == 1):
        raise ValueError(f"pairwise_lp: p must be 1 or 2, and 2 if squared; got p {p}, squared {squared}")
    if x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
        raise ValueError(
            f"pairwise_lp: x {tuple(x.shape)} and y {tuple(y.shape)} must differ in the number of rows alone"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        # On a CPU the engine's own gradient is frugal already.
        distance = torch.cdist(x, y, p, _EXACT) if x.device.type == "cpu" else _Pairwise.apply(x, y, p)
        return distance.square() if squared else distance


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, p: int) -> Tensor:
        batch = x.shape[:-2]
        x, y = (t.reshape(-1, *t.shape[-2:]).contiguous() for t in (x, y))
        ctx.p, ctx.fused = p, p == 1 and x.dtype == torch.float32 and triton.available(x)
        distance = triton.pairwise_l1_forward(x, y) if ctx.fused else torch.cdist(x, y, p, _EXACT)
        ctx.save_for_backward(x, y, distance)
        return distance.view(*batch, *distance.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, distance = ctx.saved_tensors
        batch, grad = grad.shape[:-2], grad.reshape(distance.shape).contiguous()
        grad_x = grad_y = None
        if ctx.fused:
            grad_x, grad_y = triton.pairwise_l1_backward(grad, x, y)
        else:
            weight, pull = grad, _signs
            if ctx.p == 2:
                weight, pull = torch.where(distance > 0, grad / distance, 0.0), _differences
            with full_precision(), torch.autocast(x.device.type, enabled=False):
                grad_x = pull(weight, x, y) if ctx.needs_input_grad[0] else None
                grad_y = pull(weight.mT, y, x) if ctx.needs_input_grad[1] else None
        x_shape, y_shape = (*batch, *x.shape[1:]), (*batch, *y.shape[1:])
        return None if grad_x is None else grad_x.view(x_shape), None if grad_y is None else grad_y.view(y_shape), None


def _differences(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_j weight_ij (x_i - y_j)."""
    return weight.sum(2, keepdim=True) * x - weight @ y


def _signs(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """sum_j weight_ij sign(x_i - y_j), some rows at a time."""
    rows = max(1, _ELEMENTS // max(1, y.shape[0] * y.shape[1] * y.shape[2]))
    parts = [
        torch.einsum("bnm,bnmc->bnc", w, torch.sign(part.unsqueeze(2) - y.unsqueeze(1)))
        for w, part in zip(weight.split(rows, 1), x.split(rows, 1), strict=True)
    ]
    return torch.cat(parts, 1)
