"""The embedded convolutional LSTM as its equations stand: one convolution for each gate and depth, one step after another.

Slow on purpose and independent of the layer it checks. Arrays have Keras's layout, as the golden values do, so fusion,
filters and kernel sizes can be read off their shapes. About 35 small operations a step at depth two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "linear": lambda z: z,
    "hard_sigmoid": lambda z: (0.2 * z + 0.5).clamp(0, 1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def literal_eclstm(
    x: Tensor,
    arrays: Mapping[str, Tensor],
    recurrent_activation: Sequence[str],
    conv_activation: Sequence[str],
    stride: int = 1,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Every h_t of x (batch, steps, length, sensors, channels), and the last (h, c); a zero state is convolved like any other."""
    depth = len(recurrent_activation)
    filters = arrays[f"bias_{depth - 1}"].shape[0] // 4
    kernels = [_blocks(arrays[f"kernel_{j}"], arrays[f"bias_{j}"].shape[0] // 4) for j in range(depth)]
    biases = [arrays[f"bias_{j}"].chunk(4) for j in range(depth)]
    recurrent = [_blocks(arrays[f"recurrent_kernel_{j}"], filters) for j in range(depth)]
    a = [ACTIVATIONS[name] for name in conv_activation]
    r = [ACTIVATIONS[name] for name in recurrent_activation]

    h, c = (None, None) if state is None else (s.permute(0, 3, 1, 2) for s in state)
    outputs = []
    for x_t in x.permute(1, 0, 4, 2, 3):  # (batch, channels, length, sensors) of each step
        u = [x_t] * 4
        for j in range(depth):
            u = [F.conv2d(u[g], kernels[j][g], biases[j][g], stride=(stride, 1)) for g in range(4)]
            u = [a[j](z) for z in u] if j < depth - 1 else u
        if h is None:
            h = c = torch.zeros_like(u[0])
        v = [h] * 4
        for j in range(depth):
            v = [_same(v[g], recurrent[j][g]) for g in range(4)]
            v = [r[j](z) for z in v] if j < depth - 1 else v
        i, f, o = (r[-1](u[g] + v[g]) for g in (0, 1, 3))
        convolved = _same(c, recurrent[-1][4]) if len(recurrent[-1]) == 5 else c
        c = f * convolved + i * torch.tanh(u[2] + v[2])
        h = o * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1).permute(0, 1, 3, 4, 2), (h.permute(0, 2, 3, 1), c.permute(0, 2, 3, 1))


def _blocks(array: Tensor, filters: int) -> Sequence[Tensor]:
    """The gates' (out, in, cycles, sensors) kernels of a (cycles, sensors, in, gates * out) array."""
    return [block.contiguous() for block in array.permute(3, 2, 0, 1).split(filters)]


def _same(x: Tensor, kernel: Tensor) -> Tensor:
    """Zero-padded convolution of stride 1: of k - 1 zeros the smaller half comes before, on both axes."""
    cycles, sensors = kernel.shape[2:]
    if cycles % 2 == 0 or sensors % 2 == 0:
        x = F.pad(x, (0, 1 - sensors % 2, 0, 1 - cycles % 2))
    return F.conv2d(x, kernel, padding=((cycles - 1) // 2, (sensors - 1) // 2))


def keras_arrays(cell: torch.nn.Module) -> dict[str, Tensor]:
    """An :class:`eclstm.cell.ECLSTMCell`'s parameters in Keras's layout; gradients flow back to them."""
    arrays = {}
    for j, (kernel, bias, recurrent) in enumerate(zip(cell.kernels, cell.biases, cell.recurrent_kernels, strict=True)):
        if j == len(cell.kernels) - 1 and cell.cell_kernel is not None:
            recurrent = torch.cat([recurrent, cell.cell_kernel])
        arrays |= {
            f"kernel_{j}": kernel.permute(3, 2, 1, 0),
            f"bias_{j}": bias,
            f"recurrent_kernel_{j}": recurrent.permute(3, 2, 1, 0),
        }
    return arrays
