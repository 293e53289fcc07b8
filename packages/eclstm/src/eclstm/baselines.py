"""The networks the embedded convolutional LSTM is compared with, in the same scaffold.

Each reads standardised segments (batch, rows, sensors), cuts them into overlapping sub-windows of ``length`` rows, and
returns flat features of the last step. Batch normalisation follows every recurrent layer, as in the authors' network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sub_windows(
    segments: Float[Tensor, "batch rows sensors"], length: int
) -> Float[Tensor, "batch steps sensors length"]:
    """Views of the overlapping sub-windows, each one row later than the one before."""
    return segments.unfold(1, length, 1)


class ChannelNorm(nn.BatchNorm1d):
    """Batch normalisation over all but the last axis, with Keras's epsilon.

    Momentum is torch's 0.1 unless told otherwise: with the authors' 0.01 (Keras 0.99) the running statistics are still far
    off after some hundred steps, and so is everything measured in evaluation mode.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__(channels, eps=1e-3, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class FlatLSTM(nn.Module):
    """LSTM over flattened sub-windows: what the paper argues against. ``hidden`` gives the size of each layer."""

    def __init__(self, sensors: int, length: int, hidden: Sequence[int] = (120, 160), momentum: float = 0.1) -> None:
        super().__init__()
        self.length = length
        sizes = [length * sensors, *hidden]
        self.layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in zip(sizes, hidden, strict=False))
        self.norms = nn.ModuleList(ChannelNorm(b, momentum) for b in hidden)
        self.output_size = hidden[-1]

    def forward(self, segments: Tensor) -> Float[Tensor, "batch features"]:
        return self.recur(sub_windows(segments, self.length).flatten(2))

    def recur(self, x: Float[Tensor, "batch steps inputs"]) -> Float[Tensor, "batch features"]:
        """The last step's output, from flat sub-windows."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)[0])
        return x[:, -1]


class ConvolutionalFlatLSTM(nn.Module):
    """Two convolutions over all sensors of each sub-window, flattened into an LSTM: order inside, but not in the state."""

    def __init__(self, sensors: int, length: int, hidden: Sequence[int] = (60,), momentum: float = 0.1) -> None:
        super().__init__()
        self.length = length
        self.convolutions = nn.Sequential(nn.Conv1d(sensors, 10, 3), nn.ReLU(), nn.Conv1d(10, 10, 3), nn.ReLU())
        self.recurrent = FlatLSTM(10, length - 4, hidden, momentum)
        self.output_size = hidden[-1]

    def forward(self, segments: Tensor) -> Float[Tensor, "batch features"]:
        windows = sub_windows(segments, self.length)
        maps = self.convolutions(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).flatten(2)
        return self.recurrent.recur(maps)


class ConvLSTM(nn.Module):
    """Textbook ConvLSTM in one dimension (Shi et al. 2015, without peepholes): sensors are channels, same padding."""

    def __init__(self, sensors: int, length: int, filters: Sequence[int] = (10, 20), momentum: float = 0.1) -> None:
        super().__init__()
        self.length, self.filters = length, list(filters)
        channels = [sensors, *filters]
        self.gates = nn.ModuleList(
            nn.Conv1d(a + b, 4 * b, 3, padding=1) for a, b in zip(channels, filters, strict=False)
        )
        self.norms = nn.ModuleList(ChannelNorm(b, momentum) for b in filters)
        self.output_size = filters[-1] * length

    def forward(self, segments: Tensor) -> Float[Tensor, "batch features"]:
        steps = list(sub_windows(segments, self.length).unbind(1))
        for convolution, norm, filters in zip(self.gates, self.norms, self.filters, strict=True):
            h = c = steps[0].new_zeros(segments.shape[0], filters, self.length)
            outputs = []
            for x in steps:
                i, f, g, o = convolution(torch.cat([x, h], 1)).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                outputs.append(h)
            steps = list(norm(torch.stack(outputs, 1).transpose(2, 3)).transpose(2, 3).unbind(1))
        return steps[-1].flatten(1)
