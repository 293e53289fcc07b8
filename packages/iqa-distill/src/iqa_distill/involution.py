"""Involution (Li et al., CVPR 2021): a kernel of its own for every position, shared by the channels of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Aggregate(torch.autograd.Function):
    """Multiply and add, once for each place of the kernel; all that one column of it sees is copied at a time.

    Unfolding copies the input k * k times. Autograd would keep k * k temporaries and add up as many gradients of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, stride: int) -> Tensor:
        size, groups, (height, width) = round(kernels.shape[2] ** 0.5), kernels.shape[1], kernels.shape[3:]
        border = size // 2
        below = border + -(x.shape[2] + 2 * border) % stride
        padded = F.pad(x, (border, border, border, below)).unflatten(1, (groups, -1))
        out = padded.new_zeros(*padded.shape[:3], height, width)
        for left in range(size):
            seen = _columns(padded, left, stride, width).contiguous()
            for top in range(size):
                out.addcmul_(kernels[:, :, top * size + left, None], seen[_rows(top, stride, height)])
        ctx.save_for_backward(padded, kernels)
        ctx.size, ctx.stride, ctx.rows = size, stride, x.shape[2]
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, kernels = ctx.saved_tensors
        size, border, (height, width) = ctx.size, ctx.size // 2, kernels.shape[3:]
        grad_out = grad_out.unflatten(1, (kernels.shape[1], -1)).contiguous()
        grad_padded, grad_kernels = torch.zeros_like(padded), torch.empty_like(kernels)
        for left in range(size):
            seen = _columns(padded, left, ctx.stride, width).contiguous()
            grad_seen = torch.zeros_like(seen)
            for top in range(size):
                rows, place = _rows(top, ctx.stride, height), top * size + left
                grad_seen[rows].addcmul_(kernels[:, :, place, None], grad_out)
                grad_kernels[:, :, place] = (grad_out * seen[rows]).sum(2)
            _columns(grad_padded, left, ctx.stride, width).add_(grad_seen)
        grad_x = grad_padded.flatten(1, 2)[:, :, border : border + ctx.rows, border : padded.shape[-1] - border]
        return grad_x, grad_kernels, None


def _columns(padded: Tensor, left: int, stride: int, width: int) -> Tensor:
    """A view (..., stride, rows / stride, width): what the kernel's column ``left`` sees, every ``stride``-th row together."""
    columns = padded[..., left : left + stride * (width - 1) + 1 : stride]
    return columns.unflatten(-2, (-1, stride)).movedim(-2, -3)


def _rows(top: int, stride: int, height: int) -> tuple[Any, ...]:
    """Of :func:`_columns`: the rows that the kernel's row ``top`` sees."""
    return ..., top % stride, slice(top // stride, top // stride + height), slice(None)


class Involution(nn.Module):
    """y[c, p] = sum over the neighbours q of p of kernel[g(c), p, q - p] x[c, q], the kernel computed from x at p.

    A convolution shares its kernel among positions and has one for each channel; this is the reverse. The kernel at p is
    conv2(ReLU(norm(conv1(x)))), two 1 x 1 convolutions, at the mean of the ``stride`` x ``stride`` pixels from p on. Beyond the
    image is 0. The modules have the published code's names (``conv1.conv``, ``conv1.bn``, ``conv2.conv``).

    Computed in the precision of its parameters, float32 inside autocast: sums of k * k products overflow float16.
    The gradient can't be differentiated again.

    Args:
        channels: of input and output.
        kernel_size: odd.
        stride: of the output.
        group_channels: channels that share a kernel; divides ``channels``.
        reduction_ratio: conv1 has channels / reduction_ratio outputs.

    Shape:
        x: (batch, channels, height, width). Returns (batch, channels, ceil(height / stride), ceil(width / stride)).

    Raises:
        ValueError: for an even kernel size, or channels that are no multiple of group_channels and reduction_ratio.

    Example:
        >>> Involution(32, stride=2)(torch.zeros(2, 32, 14, 10)).shape
        torch.Size([2, 32, 7, 5])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        *,
        group_channels: int = 16,
        reduction_ratio: int = 4,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if channels % group_channels or channels % reduction_ratio:
            raise ValueError(
                f"channels must be a multiple of group_channels {group_channels} and of reduction_ratio {reduction_ratio}, "
                f"got {channels}"
            )
        super().__init__()
        self.groups, self.stride = channels // group_channels, stride
        reduced = channels // reduction_ratio
        self.conv1 = conv_norm(channels, reduced, 1)
        self.conv2 = nn.Sequential()
        self.conv2.add_module("conv", nn.Conv2d(reduced, kernel_size**2 * self.groups, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h_out w_out"]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(next(self.parameters()).dtype)
            at = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
            kernels = self.conv2(self.conv1(at)).unflatten(1, (self.groups, -1))
            out: Tensor = _Aggregate.apply(x, kernels, self.stride)
        return out


def conv_norm(channels: int, out: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU: ``conv``, ``bn``, ``activate``."""
    layers = nn.Sequential()
    layers.add_module("conv", nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(out))
    layers.add_module("activate", nn.ReLU(inplace=True))
    return layers
