"""Sinkhorn's iterations on one flat batch of problems, and the gradient through all of them.

Shapes: cost (batch, n, m); marginals a (batch, n) and b (batch, m); potentials f and g like a and b. A marginal of 0 masks its
row or column; no problem is masked as a whole. The plan is ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``. ``ka`` and ``kb``
are rho / (rho + eps), 1 if balanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from papercore.ops import _sinkhorn_triton as triton
from papercore.ops.device import full_precision

# Below this many entries of the cost, calls cost more than arithmetic, and numpy's are cheaper than torch's. Its BLAS starts
# no threads at this size.
_SMALL = 96 * 96


class Iterate(torch.autograd.Function):
    """(linear cost, f, g) after ``len(schedule)`` iterations; exact gradients in O(iterations (n + m)) memory.

    ``schedule`` holds (eps, ka, kb) of each iteration. ``path``: "scaling" works on the kernel exp(-C / eps) with one eps,
    "log" in the log domain, "triton" also, fused. With ``implicit`` the gradient is that of the fixed point.
    """

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Sequence[Any], path: str, implicit: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.schedule, ctx.path, ctx.implicit = schedule, path, implicit
        if path == "triton":
            eps, ka, kb = schedule[-1]
            linear, rows, columns = triton.sinkhorn_forward(cost, a, b, g, eps, len(schedule), ka, kb)
            f, g = rows[-1].clone(), columns[-1].clone()
        else:
            solve = _scaling if path == "scaling" else _log_domain
            linear, f, g, rows, columns = solve(cost, a, b, g, schedule)
        if implicit:
            rows = columns = cost.new_zeros(0)
        ctx.save_for_backward(cost, a, b, f, g, rows, columns)
        return linear, f, g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, linear: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        cost, a, b, last_f, last_g, rows, columns = ctx.saved_tensors
        eps, ka, kb = ctx.schedule[-1]
        upstream = linear.contiguous(), f.contiguous(), g.contiguous()
        with torch.autocast(cost.device.type, enabled=False):  # some call backward() inside theirs
            if ctx.implicit:
                grad = _implicit_gradient(cost, a, b, last_f, last_g, ctx.schedule[-1], *upstream)
            elif ctx.path == "triton":
                grad = triton.sinkhorn_backward(cost, a, b, rows, columns, eps, len(ctx.schedule), ka, kb, *upstream)
            elif ctx.path == "scaling":
                grad = _scaling_gradient(cost, a, b, rows, columns, ctx.schedule, *upstream)
            else:
                grad = _log_domain_gradient(cost, a, b, rows, columns, ctx.schedule, *upstream)
        return grad, None, None, None, None, None, None


def _plain(kernel: Tensor, *vectors: Tensor) -> list[Any]:
    """The same numbers for a loop: a lone problem without its batch dimension, as numpy arrays if they are few."""
    if kernel.shape[0] > 1:
        return [kernel, *vectors]
    lone = [kernel.squeeze(0), *(v.squeeze(-2) for v in vectors)]
    small = kernel.device.type == "cpu" and kernel.numel() <= _SMALL and not torch.compiler.is_compiling()
    return [t.numpy() for t in lone] if small else lone


def _history(parts: list[Any]) -> Tensor:
    """(iterations, batch, ...) of what a loop over :func:`_plain` numbers collected."""
    stacked = torch.stack(parts) if isinstance(parts[0], Tensor) else torch.from_numpy(np.stack(parts))
    return stacked if stacked.dim() == 3 else stacked.unsqueeze(1)


def _times(matrix: Any, vector: Any) -> Any:
    return matrix @ vector if matrix.ndim == 2 else (matrix @ vector[..., None])[..., 0]


def _scaling(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Sequence[Any]) -> Any:
    """u = a (K v)^-ka, v = b (K' u)^-kb, with f = eps log(u / a), g = eps log(v / b)."""
    eps, ka, kb = schedule[-1]
    kernel = (cost / -eps).exp_()
    start = b * torch.exp(g / eps)
    matrix, a_, b_, v = _plain(kernel, a, b, start)
    transposed = matrix.swapaxes(-1, -2)
    us, vs = [], []
    with full_precision():
        for _ in schedule:
            u = a_ / _times(matrix, v) if ka == 1 else a_ * _times(matrix, v) ** -ka
            v = b_ / _times(transposed, u) if kb == 1 else b_ * _times(transposed, u) ** -kb
            us.append(u)
            vs.append(v)
        rows, columns = _history(us), torch.cat([start.unsqueeze(0), _history(vs)])
        linear = (rows[-1] * _times(kernel * cost, columns[-1])).sum(-1)
    f, g = (eps * torch.where(m > 0, s / m, 1.0).log() for s, m in ((rows[-1], a), (columns[-1], b)))
    return linear, f, g, rows, columns


def _scaling_gradient(
    cost: Tensor, a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, schedule: Sequence[Any], *upstream: Tensor
) -> Tensor:
    """The adjoints alpha of log u and beta of log v, back through the iterations.

    Each iteration adds two rank-one terms to the gradient, and all of them share the kernel: one product of matrices at the end.
    """
    eps, ka, kb = schedule[-1]
    linear, f, g = upstream
    kernel = (cost / -eps).exp_()
    plan = (linear.unsqueeze(1) * rows[-1]).unsqueeze(2) * kernel
    plan *= columns[-1].unsqueeze(1)
    weighted = plan * cost
    # ka / (K v) and kb / (K' u), from u = a (K v)^-ka.
    slopes = [k * torch.where(m > 0, s / m, 0.0) ** (1 / k) for k, s, m in ((ka, rows, a), (kb, columns[1:], b))]
    matrix, alpha, beta, us, vs, row_slopes, column_slopes = _plain(
        kernel, eps * f + weighted.sum(2), -(eps * g + weighted.sum(1)), rows, columns, *slopes
    )
    left: list[Any] = []
    right: list[Any] = []
    with full_precision():
        for t in reversed(range(len(schedule))):
            right.append(beta * column_slopes[t])
            passed = us[t] * _times(matrix, right[-1])
            left.append((passed if left else passed + alpha) * row_slopes[t])
            beta = vs[t] * _times(matrix.swapaxes(-1, -2), left[-1])
        factors = torch.cat([rows.flip(0), -_history(left)]), torch.cat([_history(right), columns[:-1].flip(0)])
        terms = factors[0].permute(1, 2, 0) @ factors[1].transpose(0, 1)
    terms *= kernel  # in place: at some hundred rows, new memory costs more than arithmetic
    terms += weighted
    terms /= -eps
    terms += plan
    return terms


def _log_domain(cost: Tensor, a: Tensor, b: Tensor, g: Tensor, schedule: Sequence[Any]) -> Any:
    log_a, log_b = a.log(), b.log()
    rows, columns = [], [g]
    for eps, ka, kb in schedule:
        f = -ka * eps * torch.logsumexp(log_b.unsqueeze(1) + (columns[-1].unsqueeze(1) - cost) / eps, 2)
        f = f.masked_fill(a == 0, 0.0)
        g = -kb * eps * torch.logsumexp(log_a.unsqueeze(2) + (f.unsqueeze(2) - cost) / eps, 1)
        rows.append(f)
        columns.append(g.masked_fill(b == 0, 0.0))
    f, g = rows[-1], columns[-1]
    linear = (transport_plan(cost, a, b, f, g, schedule[-1][0]) * cost).sum((1, 2))
    return linear, f, g, torch.stack(rows), torch.stack(columns)


def transport_plan(cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    """P of the last potentials; 0, and never 0 times infinity, where a marginal is 0."""
    f, g = f.masked_fill(a == 0, -torch.inf), g.masked_fill(b == 0, -torch.inf)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps)


def _log_domain_gradient(
    cost: Tensor, a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, schedule: Sequence[Any], *upstream: Tensor
) -> Tensor:
    """Both softmaxes of every iteration, computed again from its potentials."""
    linear, f, g = upstream
    eps = schedule[-1][0]
    plan = linear[:, None, None] * transport_plan(cost, a, b, rows[-1], columns[-1], eps)
    weighted = plan * cost / eps
    grad, alpha, beta = plan - weighted, f + weighted.sum(2), (g + weighted.sum(1)).masked_fill(b == 0, 0.0)
    log_a, log_b = a.log(), b.log()
    for t in reversed(range(len(schedule))):
        eps, ka, kb = schedule[t]
        share = kb * beta.unsqueeze(1) * torch.softmax(log_a.unsqueeze(2) + (rows[t].unsqueeze(2) - cost) / eps, 1)
        grad = grad + share
        alpha = (alpha - share.sum(2)).masked_fill(a == 0, 0.0)
        share = ka * alpha.unsqueeze(2) * torch.softmax(log_b.unsqueeze(1) + (columns[t].unsqueeze(1) - cost) / eps, 2)
        grad = grad + share
        beta = (-share.sum(1)).masked_fill(b == 0, 0.0)
        alpha = torch.zeros_like(alpha)
    return grad


def _implicit_gradient(
    cost: Tensor, a: Tensor, b: Tensor, f: Tensor, g: Tensor, last: Sequence[float], *upstream: Tensor
) -> Tensor:
    """The implicit function theorem at the fixed point: one symmetric (m, m) system by Schur's complement, in float64."""
    eps, ka, kb = last
    cost, a, b, f, g, linear, grad_f, grad_g = (t.double() for t in (cost, a, b, f, g, *upstream))
    plan = transport_plan(cost, a, b, f, g, eps)
    weighted = linear[:, None, None] * plan * cost / eps
    alpha, beta = grad_f + weighted.sum(2), grad_g + weighted.sum(1)
    rows, columns = plan.sum(2), plan.sum(1)
    inverse = torch.where(rows > 0, ka / rows, 0.0)
    system = -plan.mT @ (inverse.unsqueeze(2) * plan)
    diagonal = torch.where(columns > 0, columns / kb, 1.0)
    if ka == kb == 1:  # f + c, g - c is the same plan: fix c
        system = system + (columns.unsqueeze(2) * columns.unsqueeze(1)) / columns.sum(1)[:, None, None].clamp_min(
            1e-300
        )
    system = system + torch.diag_embed(diagonal)
    y = torch.linalg.solve(system, beta - _times(plan.mT, inverse * alpha))
    x = inverse * (alpha - _times(plan, y))
    grad = linear[:, None, None] * plan - weighted + plan * (x.unsqueeze(2) + y.unsqueeze(1))
    return grad.to(upstream[0].dtype)
