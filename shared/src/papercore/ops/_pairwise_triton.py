"""L1 distances between rows and their gradient on CUDA, in Triton: signs are formed again tile by tile, never stored."""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from papercore.ops._sinkhorn_triton import available, jit, on_device_of, tl, triton

__all__ = ["available", "pairwise_l1_backward", "pairwise_l1_forward"]

PROGRAMS = 512  # about four a multiprocessor; fewer tiles than that divide the channels among several programs
SHARE = 256  # least number of channels of such a program
NARROW = 32  # up to so many channels a row's share few cache lines, and need not be transposed


@jit
@no_type_check
def _distances(
    x, y, out, n, m, channels, share, x_row, x_channel, y_row, y_channel,
    rows: tl.constexpr, columns: tl.constexpr, unroll: tl.constexpr
):  # fmt: skip
    """A tile of distances, summed over one share of the channels."""
    blocks = tl.cdiv(n, rows)
    problem, problems = (tl.program_id(0) // blocks).to(tl.int64), tl.num_programs(0) // blocks
    i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
    j = tl.program_id(1) * columns + tl.arange(0, columns)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, channels)
    x += problem * n * channels + first.to(tl.int64) * x_channel
    y += problem * m * channels + first.to(tl.int64) * y_channel
    total = tl.zeros([rows, columns], tl.float32)
    for begin in range(first, last, unroll):
        for step in tl.static_range(unroll):
            inside = begin + step < last
            x_c = tl.load(x + i[:, None] * x_row, i[:, None] < tl.where(inside, n, 0), 0.0)
            y_c = tl.load(y + j[None, :] * y_row, j[None, :] < tl.where(inside, m, 0), 0.0)
            total += tl.abs(x_c - y_c)
            x += x_channel
            y += y_channel
    out += (tl.program_id(2) * problems + problem) * n * m
    tl.store(out + i[:, None].to(tl.int64) * m + j[None, :], total, (i < n)[:, None] & (j < m)[None, :])


@jit
@no_type_check
def _signs(
    grad, x, y, out, n, m, channels, grad_row, grad_column, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr
):  # fmt: skip
    """out_ic = sum_j grad_ij sign(x_ic - y_jc), the axes of a tile being i, j, c."""
    blocks = tl.cdiv(n, rows)
    problem, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * rows
    i = tl.arange(0, rows)[:, None, None]
    c = (tl.program_id(1) * depth + tl.arange(0, depth))[None, None, :]
    inside = (first + i < n) & (c < channels)
    corner = (problem * n + first) * channels
    x_ic = tl.load(x + corner + i * channels + c, inside, 0.0)
    y += problem * m * channels
    grad += problem * n * m + first.to(tl.int64) * grad_row
    total = tl.zeros([rows, columns, depth], tl.float32)
    for begin in range(0, m, columns):
        j = (begin + tl.arange(0, columns)).to(tl.int64)[None, :, None]
        y_jc = tl.load(y + j * channels + c, (j < m) & (c < channels), 0.0)
        grad_ij = tl.load(grad + j * grad_column + i * grad_row, (first + i < n) & (j < m), 0.0)
        total += tl.where(x_ic > y_jc, grad_ij, 0.0) - tl.where(x_ic < y_jc, grad_ij, 0.0)
    tl.store(out + corner + i * channels + c, tl.sum(total, 1)[:, None, :], inside)


def pairwise_l1_forward(x: Float[Tensor, "batch n c"], y: Float[Tensor, "batch m c"]) -> Float[Tensor, "batch n m"]:
    """sum_c abs(x_ic - y_jc) of contiguous float32 tensors."""
    (batch, n, channels), m = x.shape, y.shape[1]
    strides = channels, 1, channels, 1
    if channels > NARROW:  # a program takes the same channel of many rows: make these neighbours
        x, y, strides = x.mT.contiguous(), y.mT.contiguous(), (1, n, 1, m)
    rows, columns = min(16, triton.next_power_of_2(n)), min(256, triton.next_power_of_2(m))
    grid = batch * triton.cdiv(n, rows), triton.cdiv(m, columns)
    shares = max(1, min(PROGRAMS // max(1, grid[0] * grid[1]), channels // SHARE))
    share = triton.cdiv(channels, shares)
    out = x.new_empty(shares, batch, n, m)
    with on_device_of(x):
        _distances[(*grid, shares)](
            x, y, out, n, m, channels, share, *strides, rows, columns, 8, num_warps=max(1, columns // 64)
        )
    return out.sum(0) if shares > 1 else out[0]


def pairwise_l1_backward(
    grad: Float[Tensor, "batch n m"], x: Float[Tensor, "batch n c"], y: Float[Tensor, "batch m c"]
) -> tuple[Float[Tensor, "batch n c"], Float[Tensor, "batch m c"]]:
    """The gradients of x and y from that of their distances; a tie's sign is 0."""
    m = y.shape[1]
    return _sum_signs(grad, x, y, m, 1), _sum_signs(grad, y, x, 1, m)


def _sum_signs(grad: Tensor, x: Tensor, y: Tensor, grad_row: int, grad_column: int) -> Tensor:
    (batch, n, channels), m = x.shape, y.shape[1]
    depth = min(256, triton.next_power_of_2(channels))  # the rest of a tile's width goes to more of y's rows
    rows, columns = min(16, triton.next_power_of_2(n)), min(256 // depth, triton.next_power_of_2(m))
    grid = batch * triton.cdiv(n, rows), triton.cdiv(channels, depth)
    warps, out = max(1, depth * columns // 64), torch.empty_like(x)
    with on_device_of(x):
        _signs[grid](grad, x, y, out, n, m, channels, grad_row, grad_column, rows, columns, depth, num_warps=warps)
    return out
