"""Small convolutions as dense matrices: a few hundred inputs and outputs multiply faster than they convolve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LIMIT = 512  # above this many inputs or outputs the convolution is cheaper than its matrix


def same_padding(kernel: int) -> tuple[int, int]:
    """Zeros (before, after) of a same-size convolution; of an even kernel's the smaller half comes first, as in Keras."""
    return (kernel - 1) // 2, kernel // 2


def conv(
    x: Float[Tensor, "n i s l"], kernel: Tensor, bias: Tensor | None, stride: int, groups: int, same: bool
) -> Tensor:
    """Cross-correlation over (sensors, cycles), zero-padded to the same size or valid."""
    if same:
        x = F.pad(x, (*same_padding(kernel.shape[3]), *same_padding(kernel.shape[2])))
    return F.conv2d(x, kernel, bias, stride=(1, stride), groups=groups)


def _line(kernel: int, into: int, out: int, stride: int, before: int) -> Float[Tensor, "kernel into out"]:
    offset = torch.arange(into)[:, None] - stride * torch.arange(out) + before
    return (offset == torch.arange(kernel)[:, None, None]).float()


class ConvolutionMatrix(nn.Module):
    """Turns the kernels of one embedded convolution into the matrix that does the same to a flat state.

    Args:
        kernel_shape: (gates * out, in, sensors, cycles) of the convolution, in ``gates`` groups that do not mix.
        into: (cycles, sensors) of its input; out: of its output.
        gates: number of matrices.

    Shape:
        returns (gates, cycles * sensors * in, cycles' * sensors' * out); the flat state has its channels fastest.
    """

    incidence: Tensor

    def __init__(
        self,
        kernel_shape: torch.Size,
        into: tuple[int, int],
        out: tuple[int, int],
        gates: int = 4,
        stride: int = 1,
        same: bool = False,
    ) -> None:
        super().__init__()
        _, _, sensors, cycles = kernel_shape
        across = _line(sensors, into[1], out[1], 1, same_padding(sensors)[0] if same else 0)
        along = _line(cycles, into[0], out[0], stride, same_padding(cycles)[0] if same else 0)
        # Which kernel element joins which pair of positions.
        pairs = torch.einsum("krs,lpq->klprqs", across, along).flatten(0, 1).flatten(1, 2).flatten(2, 3)
        self.register_buffer("incidence", pairs, persistent=False)
        self.gates = gates

    def forward(self, kernel: Tensor) -> Float[Tensor, "gates into out"]:
        _, into, out = self.incidence.shape
        blocks = kernel.flatten(2).flatten(0, 1) @ self.incidence.flatten(1)
        blocks = blocks.view(self.gates, -1, kernel.shape[1], into, out)  # gate, channel out, channel in, from, to
        return blocks.permute(0, 3, 2, 4, 1).flatten(1, 2).flatten(2, 3)
