"""Sinkhorn's iterations on CUDA, fused by Triton: the same numbers as ``_sinkhorn.py``, where the symbols are explained.

A cost that fits one program's registers takes one launch forward and one backward, a program to a problem. A larger one is
streamed, a launch to half an iteration, with a running log-sum-exp in every lane. Nothing of the cost's size is stored but its
gradient, and nothing waits for the device.

The kernels count in base 2: ``scale = log2(e) / eps`` is multiplied into the cost and the potentials as they are loaded. A
marginal of 0 has the logarithm -inf, which is how its row or column is known to be masked.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["available", "jit", "on_device_of", "sinkhorn_backward", "sinkhorn_forward", "tl", "triton"]

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # it comes with torch where torch comes with CUDA
    triton = tl = None

jit: Any = no_type_check if triton is None else triton.jit
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on a CPU, slowly
FUSED = 128 * 64  # entries of the largest cost, padded, that the registers hold
ROWS, COLUMNS = 32, 64  # tile of the streamed gradient

Problems: TypeAlias = Float[Tensor, " batch"]
Costs: TypeAlias = Float[Tensor, "batch n m"]
Rows: TypeAlias = Float[Tensor, "batch n"]
Columns: TypeAlias = Float[Tensor, "batch m"]
RowHistory: TypeAlias = Float[Tensor, "n_iters batch n"]
ColumnHistory: TypeAlias = Float[Tensor, "n_iters+1 batch m"]


def available(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: it is on CUDA, or Triton's interpreter is on."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@jit
@no_type_check
def _scaled_cost(cost, i, j, n, m, row_stride, column_stride, u, v, scale):
    """A tile of the cost; 0 where u_i or v_j is -inf, since what stands there need not even be finite."""
    offsets = i[:, None].to(tl.int64) * row_stride + j[None, :].to(tl.int64) * column_stride
    c = scale * tl.load(cost + offsets, (i < n)[:, None] & (j < m)[None, :], 0.0)
    return tl.where((u[:, None] > -float("inf")) & (v[None, :] > -float("inf")), c, 0.0)


@jit
@no_type_check
def _potential(x, log_marginal, k, axis: tl.constexpr):
    """-k log2 sum 2^x along an axis; 0 if masked, or if all of x is."""
    top = tl.maximum(tl.max(x, axis), -1e38)  # finite, so that x - top is never inf - inf
    lse = top + tl.log2(tl.sum(tl.exp2(x - tl.expand_dims(top, axis)), axis))
    return tl.where((log_marginal > -float("inf")) & (lse > -float("inf")), -k * lse, 0.0)


@jit
@no_type_check
def _masked(x, log_marginal):
    return tl.where(log_marginal > -float("inf"), x, -float("inf"))


@jit
@no_type_check
def _fused_forward(
    cost, a, b, start, f, g, linear, scale, n_iters, k_a, k_b, n, m, rows: tl.constexpr, columns: tl.constexpr
):
    problem, problems = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i, j = tl.arange(0, rows), tl.arange(0, columns)
    log_a = tl.log2(tl.load(a + problem * n + i, i < n, 0.0))
    log_b = tl.log2(tl.load(b + problem * m + j, j < m, 0.0))
    c = _scaled_cost(cost + problem * n * m, i, j, n, m, m, 1, log_a, log_b, scale)
    f += problem * n
    g += problem * m
    v = tl.load(start + problem * m + j, j < m, 0.0)
    tl.store(g + j, v, j < m)
    v *= scale
    u = tl.zeros_like(log_a)
    for _ in range(n_iters):
        u = _potential((log_b + v)[None, :] - c, log_a, k_a, 1)
        tl.store(f + i, u / scale, i < n)
        v = _potential((log_a + u)[:, None] - c, log_b, k_b, 0)
        g += problems * m
        tl.store(g + j, v / scale, j < m)
        f += problems * n
    plan = tl.exp2((log_a + u)[:, None] + (log_b + v)[None, :] - c)
    tl.store(linear + problem, tl.sum(tl.sum(plan * c, 1), 0) / scale)


@jit
@no_type_check
def _fused_backward(
    cost, a, b, f, g, grad_linear, grad_f, grad_g, grad_cost, scale, n_iters, k_a, k_b, n, m,
    rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    problem, problems = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    i, j = tl.arange(0, rows), tl.arange(0, columns)
    log_a = tl.log2(tl.load(a + problem * n + i, i < n, 0.0))
    log_b = tl.log2(tl.load(b + problem * m + j, j < m, 0.0))
    c = _scaled_cost(cost + problem * n * m, i, j, n, m, m, 1, log_a, log_b, scale)
    f += ((n_iters - 1) * problems + problem) * n
    g += (n_iters * problems + problem) * m
    u = scale * tl.load(f + i, i < n, 0.0)
    v = scale * tl.load(g + j, j < m, 0.0)
    plan = tl.load(grad_linear + problem) * tl.exp2((log_a + u)[:, None] + (log_b + v)[None, :] - c)
    weighted = 0.6931471805599453 * plan * c  # P C / eps
    alpha = tl.load(grad_f + problem * n + i, i < n, 0.0) + tl.sum(weighted, 1)
    beta = tl.load(grad_g + problem * m + j, j < m, 0.0) + tl.sum(weighted, 0)
    grad = plan - weighted
    for t in range(n_iters, 0, -1):
        f -= problems * n
        g -= problems * m
        earlier_u = scale * tl.load(f + i, (i < n) & (t > 1), 0.0)  # early, to hide the wait
        earlier_v = scale * tl.load(g + j, j < m, 0.0)
        share = (k_b * beta)[None, :] * tl.exp2((log_a + u)[:, None] + _masked(v / k_b, log_b)[None, :] - c)
        grad += share
        alpha -= tl.sum(share, 1)
        share = (k_a * alpha)[:, None] * tl.exp2(_masked(u / k_a, log_a)[:, None] + (log_b + earlier_v)[None, :] - c)
        grad += share
        beta = -tl.sum(share, 0)
        alpha = tl.zeros_like(alpha)
        u, v = earlier_u, earlier_v
    inside = (i < n)[:, None] & (j < m)[None, :]
    tl.store(grad_cost + problem * n * m + i[:, None] * m + j[None, :], grad, inside)


@jit
@no_type_check
def _half_iteration(
    cost, log_own, log_other, other, own, scale, k, n, m, row_stride, column_stride, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """The potential of some of the n rows, from that of the m columns."""
    blocks = tl.cdiv(n, rows)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
    cost += problem * n * m
    log_own = tl.load(log_own + problem * n + i, i < n, -float("inf"))
    top = tl.full([rows, columns], -1e38, tl.float32)
    total = tl.zeros([rows, columns], tl.float32)
    for begin in range(0, m, columns):
        j = begin + tl.arange(0, columns)
        v = tl.load(log_other + problem * m + j, j < m, -float("inf"))
        v += scale * tl.load(other + problem * m + j, j < m, 0.0)
        x = v[None, :] - _scaled_cost(cost, i, j, n, m, row_stride, column_stride, log_own, v, scale)
        shrink = tl.exp2(-tl.abs(x - top))  # of the smaller one, the only exponential
        total = tl.where(x > top, total * shrink + 1, total + shrink)
        top = tl.maximum(top, x)
    potential = _potential(top + tl.log2(total), log_own, k, 1)
    tl.store(own + problem * n + i, potential / scale, i < n)


@jit
@no_type_check
def _weighted_sum(
    cost, u, v, z, out, scale, k, n, m, row_stride, column_stride, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """out_i = k (out_i - sum_j 2^(u_i + v_j - C_ij) z_j), or without z: out_i = sum_j 2^(u_i + v_j - C_ij) C_ij."""
    blocks = tl.cdiv(n, rows)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
    cost += problem * n * m
    u = tl.load(u + problem * n + i, i < n, -float("inf"))
    total = tl.zeros([rows, columns], tl.float32)
    for begin in range(0, m, columns):
        j = begin + tl.arange(0, columns)
        v_j = tl.load(v + problem * m + j, j < m, -float("inf"))
        c = _scaled_cost(cost, i, j, n, m, row_stride, column_stride, u, v_j, scale)
        weight = tl.exp2(u[:, None] + v_j[None, :] - c)
        if z is None:
            total += weight * c
        else:
            total += weight * tl.load(z + problem * m + j, j < m, 0.0)[None, :]
    result = tl.sum(total, 1)
    out += problem * n + i
    if z is None:
        tl.store(out, result / scale, i < n)
    else:
        tl.store(out, k * (tl.load(out, i < n, 0.0) - result), i < n)


@jit
@no_type_check
def _streamed_gradient(
    cost, log_a_u, log_b_v, u_k, v_k, alpha, beta, grad_linear, grad_cost, scale, n_iters, n, m,
    rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """A tile of the gradient: the plan's share, and each iteration's two softmaxes times the adjoints alpha and beta."""
    blocks = tl.cdiv(n, rows)
    problem, problems = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0).to(tl.int64) // blocks
    i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
    j = tl.program_id(1) * columns + tl.arange(0, columns)
    row, column = ((n_iters - 1) * problems + problem) * n, (n_iters * problems + problem) * m
    u = tl.load(log_a_u + row + i, i < n, -float("inf"))
    v = tl.load(log_b_v + column + j, j < m, -float("inf"))
    c = _scaled_cost(cost + problem * n * m, i, j, n, m, m, 1, u, v, scale)
    plan = tl.load(grad_linear + problem) * tl.exp2(u[:, None] + v[None, :] - c)
    grad = plan - 0.6931471805599453 * plan * c
    for _ in range(n_iters):
        u = tl.load(log_a_u + row + i, i < n, -float("inf"))
        v = tl.load(v_k + column + j, j < m, -float("inf"))
        grad += tl.load(beta + column + j, j < m, 0.0)[None, :] * tl.exp2(u[:, None] + v[None, :] - c)
        column -= problems * m
        u = tl.load(u_k + row + i, i < n, -float("inf"))
        v = tl.load(log_b_v + column + j, j < m, -float("inf"))
        grad += tl.load(alpha + row + i, i < n, 0.0)[:, None] * tl.exp2(u[:, None] + v[None, :] - c)
        row -= problems * n
    offsets = i[:, None].to(tl.int64) * m + j[None, :]
    tl.store(grad_cost + problem * n * m + offsets, grad, (i < n)[:, None] & (j < m)[None, :])


def _fused(n: int, m: int) -> dict[str, int] | None:
    """Shape of the tile and its warps, at 16 entries a thread; None if it is too large."""
    rows, columns = triton.next_power_of_2(n), triton.next_power_of_2(m)
    if rows * columns > FUSED:
        return None
    return {"rows": rows, "columns": columns, "num_warps": max(1, rows * columns // 512)}


def _stream(kernel: Any, cost: Tensor, by_row: bool, *arguments: Any) -> None:
    """Launch a kernel whose programs own some rows of the cost each (not ``by_row``: columns) and loop over the other side."""
    batch, n, m = cost.shape
    if by_row:
        tile, sizes = (4, 256), (n, m, m, 1)
    else:  # neighbouring rows are neighbours in memory
        tile, sizes = (16, 64), (m, n, 1, m)
    kernel[(batch * triton.cdiv(sizes[0], tile[0]),)](cost, *arguments, *sizes, *tile)


def sinkhorn_forward(
    cost: Costs, a: Rows, b: Columns, g0: Columns, eps: float, n_iters: int, k_a: float, k_b: float
) -> tuple[Problems, RowHistory, ColumnHistory]:
    """(linear cost, every f, every g from ``g0`` on) of contiguous float32 tensors; potentials are 0 where masked."""
    batch, n, m = cost.shape
    scale = math.log2(math.e) / eps
    f, g = cost.new_empty(n_iters, batch, n), cost.new_empty(n_iters + 1, batch, m)
    with on_device_of(cost):
        if tile := _fused(n, m):
            linear = cost.new_empty(batch)
            _fused_forward[(batch,)](cost, a, b, g0, f, g, linear, scale, n_iters, k_a, k_b, n, m, **tile)
            return linear, f, g
        log_a, log_b = a.log2(), b.log2()
        g[0] = g0
        for t in range(n_iters):
            _stream(_half_iteration, cost, True, log_a, log_b, g[t], f[t], scale, k_a)
            _stream(_half_iteration, cost, False, log_b, log_a, f[t], g[t + 1], scale, k_b)
        row_costs = torch.empty_like(a)
        u, v = log_a + scale * f[-1], log_b + scale * g[-1]
        _stream(_weighted_sum, cost, True, u, v, None, row_costs, scale, 1.0)
        return row_costs.sum(1), f, g


def sinkhorn_backward(
    cost: Costs, a: Rows, b: Columns, f: RowHistory, g: ColumnHistory, eps: float, n_iters: int, k_a: float, k_b: float,
    grad_linear_cost: Problems, grad_f: Rows, grad_g: Columns
) -> Costs:  # fmt: skip
    """The cost's gradient through all iterations, from what :func:`sinkhorn_forward` returned and its last values' gradients.

    alpha and beta are the adjoints of f and g; an iteration's softmaxes follow from its potentials, which are their normalisers.
    """
    batch, n, m = cost.shape
    scale = math.log2(math.e) / eps
    grad_cost = torch.empty_like(cost)
    with on_device_of(cost):
        if tile := _fused(n, m):
            tensors = cost, a, b, f, g, grad_linear_cost, grad_f, grad_g, grad_cost
            _fused_backward[(batch,)](*tensors, scale, n_iters, k_a, k_b, n, m, **tile)
            return grad_cost
        log_a, log_b = a.log2(), b.log2()
        u, v = log_a + scale * f, log_b + scale * g
        u_k = (scale / k_a * f).masked_fill_(a == 0, -torch.inf)
        v_k = (scale / k_b * g).masked_fill_(b == 0, -torch.inf)
        moments = torch.empty_like(a), torch.empty_like(b)
        _stream(_weighted_sum, cost, True, u[-1], v[-1], None, moments[0], scale, 1.0)
        _stream(_weighted_sum, cost, False, v[-1], u[-1], None, moments[1], scale, 1.0)
        grad_moment = (grad_linear_cost / eps).unsqueeze(1)
        alpha, beta = torch.zeros_like(f), torch.zeros_like(g)  # times k_a, k_b
        alpha[-1] = torch.addcmul(grad_f, grad_moment, moments[0])
        beta[-1] = k_b * torch.addcmul(grad_g, grad_moment, moments[1])
        for t in reversed(range(n_iters)):
            _stream(_weighted_sum, cost, True, u[t], v_k[t + 1], beta[t + 1], alpha[t], scale, k_a)
            _stream(_weighted_sum, cost, False, v[t], u_k[t], alpha[t], beta[t], scale, k_b)
        grid = batch * triton.cdiv(n, ROWS), triton.cdiv(m, COLUMNS)
        vectors = u, v, u_k, v_k, alpha, beta, grad_linear_cost
        _streamed_gradient[grid](cost, *vectors, grad_cost, scale, n_iters, n, m, ROWS, COLUMNS)
        return grad_cost
