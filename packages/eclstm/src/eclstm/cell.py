"""The embedded convolutional LSTM: a recurrent layer whose state is a feature map over the cycles inside a sub-window.

Paper: Zhou et al., "Automatic Remaining Useful Life Estimation Framework with Embedded Convolutional LSTM as the
Backbone", ECML PKDD 2020 (arXiv 2008.03961). Gates are stored in the order input, forget, cell, output throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eclstm import _dense
from eclstm._recurrence import ACTIVATIONS, DenseRecurrence, update

Map = Float[Tensor, "batch length_out sensors_out filters"]
State = tuple[Map, Map]


FUSIONS = ("early", "hybrid")


def state_length(length: int, kernel_sizes: Sequence[int], stride: int = 1) -> int:
    """Positions left of a sub-window of ``length`` cycles after the valid input convolutions.

    >>> state_length(16, [3, 3])
    12

    Raises:
        ValueError: if the sub-window is shorter than the kernels need; the message gives the minimum.
    """
    needed = 1
    for kernel_size in reversed(kernel_sizes):
        needed = (needed - 1) * stride + kernel_size
    if length < needed:
        raise ValueError(
            f"window {length} < {needed} needed by kernels {list(kernel_sizes)} with stride {stride}: "
            "lengthen the window or shorten the kernels"
        )
    for kernel_size in kernel_sizes:
        length = (length - kernel_size) // stride + 1
    return length


def _one_each(name: str, value: str | int | Sequence[Any], filters: Sequence[int]) -> list[Any]:
    values = [value] * len(filters) if isinstance(value, str | int) else list(value)
    if len(values) != len(filters):
        raise ValueError(
            f"{name} {values} has {len(values)} entries and filters {list(filters)} has {len(filters)}: give one each"
        )
    return values


def _known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(known)}")


class ECLSTMCell(nn.Module):
    r"""One step of the embedded convolutional LSTM.

    For each gate :math:`g \in \{i, f, c, o\}`, with :math:`*` a valid and :math:`\circledast` a zero-padded same-size
    cross-correlation over the cycles (and sensors) of the sub-window,

    .. math::
        u^g_0 &= x_t, & u^g_{j+1} &= a_j(W^g_j * u^g_j + b^g_j) \\
        v^g_0 &= h_{t-1}, & v^g_{j+1} &= r_j(V^g_j \circledast v^g_j) \\
        i, f, o &= r(u + v), & \tilde c &= \tanh(u^c + v^c) \\
        c_t &= f \odot (W_c \circledast c_{t-1}) + i \odot \tilde c, & h_t &= o \odot \tanh(c_t)

    The last convolution of a stack is followed by the sum at once: :math:`r` of the gates is the last
    ``recurrent_activation`` and the last ``conv_activation`` is unused. Each gate has a stack of its own.

    Args:
        input_size: (length, sensors, channels) of one sub-window; length in cycles; channels is 1 for raw data.
        filters: output channels of each embedded convolution. The state has the last one's.
        kernel_sizes: widths in cycles, one for each convolution or one for all.
        fusion: ``"early"`` spans all sensors and leaves one, ``"hybrid"`` keeps the sensor axis; one for each or for all.
        recurrent_activation: r, one for each convolution. None: linear, and hard_sigmoid for the gates
            (authors' naive network).
        conv_activation: a, one for each convolution or one for all.
        stride: of the input convolutions, in cycles.
        cell_convolution: False drops :math:`W_c` (an ablation).

    Shape:
        x: (batch, length, sensors, channels).
        state: (h, c), each (batch, length', sensors', filters); zeros if None. Returns the next (h, c).

    Raises:
        ValueError: for lists of unequal length, an unknown fusion or activation, a window too short for its kernels.

    Example:
        >>> cell = ECLSTMCell((16, 14, 1), filters=[10, 10])
        >>> h, c = cell(torch.randn(2, 16, 14, 1))
        >>> h.shape
        torch.Size([2, 12, 1, 10])
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        filters: Sequence[int],
        kernel_sizes: int | Sequence[int] = 3,
        fusion: str | Sequence[str] = "early",
        recurrent_activation: str | Sequence[str] | None = None,
        conv_activation: str | Sequence[str] = "hard_sigmoid",
        stride: int = 1,
        cell_convolution: bool = True,
    ) -> None:
        super().__init__()
        length, sensors, channels = self.input_size = tuple(input_size)
        self.filters = list(filters)
        if not self.filters or min(self.filters) < 1:
            raise ValueError(f"filters must be one or more positive integers, got {self.filters}")
        depth = len(self.filters)
        if recurrent_activation is None:
            recurrent_activation = ["linear"] * (depth - 1) + ["hard_sigmoid"]
        self.kernel_sizes = _one_each("kernel_sizes", kernel_sizes, self.filters)
        self.fusion = _one_each("fusion", fusion, self.filters)
        self.recurrent_activation = _one_each("recurrent_activation", recurrent_activation, self.filters)
        self.conv_activation = _one_each("conv_activation", conv_activation, self.filters)
        self.stride = stride
        if min(self.kernel_sizes) < 1 or stride < 1:
            raise ValueError(f"kernel_sizes and stride must be positive, got {self.kernel_sizes} and {stride}")
        _known("fusion", self.fusion, FUSIONS)
        _known("recurrent_activation", self.recurrent_activation, list(ACTIVATIONS))
        _known("conv_activation", self.conv_activation, list(ACTIVATIONS))

        hidden = self.filters[-1]
        self.output_size = (
            state_length(length, self.kernel_sizes, stride),
            1 if "early" in self.fusion else sensors,
            hidden,
        )
        # The authors take the recurrent width from the length without stride, even when there is one.
        unstrided = length - sum(k - 1 for k in self.kernel_sizes)
        self.kernels, self.biases, self.recurrent_kernels = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for out, kernel_size, fusion_j in zip(self.filters, self.kernel_sizes, self.fusion, strict=True):
            width, sensors = (sensors, 1) if fusion_j == "early" else (1, sensors)
            recurrent = min(kernel_size, -(-unstrided // depth))
            self.kernels.append(nn.Parameter(torch.empty(4 * out, channels, width, kernel_size)))
            self.biases.append(nn.Parameter(torch.empty(4 * out)))
            self.recurrent_kernels.append(nn.Parameter(torch.empty(4 * hidden, hidden, self.output_size[1], recurrent)))
            channels = out
        last = self.recurrent_kernels[-1]
        self.cell_kernel = nn.Parameter(torch.empty_like(last[:hidden])) if cell_convolution else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Authors' initialisation: Glorot-uniform, orthogonal over all gates at once, forget bias 1 at every depth."""
        for kernel, bias, filters in zip(self.kernels, self.biases, self.filters, strict=True):
            nn.init.xavier_uniform_(kernel)
            nn.init.zeros_(bias)
            nn.init.ones_(bias.data[filters : 2 * filters])
        for kernel in self.recurrent_kernels[:-1]:
            nn.init.orthogonal_(kernel)
        last = self.recurrent_kernels[-1]
        blocks = last.new_empty(len(last) + (0 if self.cell_kernel is None else self.filters[-1]), *last.shape[1:])
        nn.init.orthogonal_(blocks)
        last.data.copy_(blocks[: len(last)])
        if self.cell_kernel is not None:
            self.cell_kernel.data.copy_(blocks[len(last) :])

    @property
    def linear_recurrence(self) -> bool:
        """Whether the recurrent stack is linear up to the gates, hence one matrix."""
        return all(name == "linear" for name in self.recurrent_activation[:-1])

    @property
    def zero_preserving(self) -> bool:
        """Whether a zero state stays zero through the recurrent stack, hence needs no convolution."""
        return all(name in ("linear", "tanh", "relu") for name in self.recurrent_activation[:-1])

    def forward(self, x: Float[Tensor, "batch length sensors channels"], state: State | None = None) -> State:
        if tuple(x.shape[1:]) != self.input_size:
            raise ValueError(f"expected (length, sensors, channels) {self.input_size}, got {tuple(x.shape[1:])}")
        if state is None:
            state = (x.new_zeros(x.shape[0], *self.output_size),) * 2
        h, c = (s.permute(0, 3, 2, 1) for s in state)
        h, c = self.step(self.input_gates(x.permute(0, 3, 2, 1)), h, c)
        return h.permute(0, 3, 2, 1), c.permute(0, 3, 2, 1)

    # Below here tensors are (batch, channels, sensors, cycles), as torch's convolutions like them.

    def input_gates(self, x: Tensor, groups: int = 1) -> Float[Tensor, "items gates sensors cycles"]:
        """u of all gates; with ``groups=4`` each gate has an input of its own."""
        for j, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            if j:
                x, groups = ACTIVATIONS[self.conv_activation[j - 1]](x), 4
            x = _dense.conv(x, kernel, bias, self.stride, groups, same=False)
        return x

    def recurrent_gates(self, h: Tensor, groups: int = 1) -> Float[Tensor, "items gates sensors cycles"]:
        """v of all gates."""
        for j, kernel in enumerate(self.recurrent_kernels):
            if j:
                h, groups = ACTIVATIONS[self.recurrent_activation[j - 1]](h), 4
            h = _dense.conv(h, kernel, None, 1, groups, same=True)
        return h

    def step(self, u: Tensor, h: Tensor | None, c: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(h, c) after one step, from u and the last state (None: zero, skipped); ``mask`` drops parts of h for each gate."""
        if h is None and not self.zero_preserving:
            h = u.new_zeros(u.shape[0], self.filters[-1], *u.shape[2:])
        if h is not None:
            masked, groups = (h, 1) if mask is None else ((h.unsqueeze(1) * mask).flatten(1, 2), 4)
            u = u + self.recurrent_gates(masked, groups)
        if c is not None and self.cell_kernel is not None:
            c = _dense.conv(c, self.cell_kernel, None, 1, 1, same=True)
        return update(u, c, self.recurrent_activation[-1])


class ECLSTM(nn.Module):
    """A layer of :class:`ECLSTMCell` over a sequence of sub-windows, along the cheapest exact route.

    The input convolutions hold no recurrence: they run once for all steps, and the first of them only once for each
    cycle where sub-windows overlap (:meth:`forward_segment`). A linear recurrent stack on a small state becomes one
    dense matrix, built once a call. A zero state is not convolved. Results equal stepping the cell to about 1e-6.

    Args:
        input_size, filters, kernel_sizes, fusion, recurrent_activation, conv_activation, stride, cell_convolution: of the cell.
        dropout: share of the inputs dropped in training, with a mask for each gate that all steps share, in [0, 1).
        recurrent_dropout: the same for h_{t-1}; a convolved recurrence, hence slower.
        return_sequences: return every h_t instead of the last.
        batch_first: as in :class:`torch.nn.LSTM`; False: the first two axes of x and of the output change places.

    Shape:
        x: (batch, steps, length, sensors, channels).
        output: (batch, steps, length', sensors', filters), without steps if not ``return_sequences``.
        state: (h, c), each (batch, length', sensors', filters); zeros if None.

    Example:
        >>> layer = ECLSTM((16, 14, 1), filters=[10, 10])
        >>> output, (h, c) = layer(torch.randn(2, 5, 16, 14, 1))
        >>> output.shape
        torch.Size([2, 5, 12, 1, 10])
        >>> output, _ = layer.forward_segment(torch.randn(2, 20, 14, 1))
        >>> output.shape
        torch.Size([2, 5, 12, 1, 10])
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        filters: Sequence[int],
        kernel_sizes: int | Sequence[int] = 3,
        fusion: str | Sequence[str] = "early",
        recurrent_activation: str | Sequence[str] | None = None,
        conv_activation: str | Sequence[str] = "hard_sigmoid",
        stride: int = 1,
        cell_convolution: bool = True,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        return_sequences: bool = True,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.cell = cell = ECLSTMCell(
            input_size, filters, kernel_sizes, fusion, recurrent_activation, conv_activation, stride, cell_convolution
        )
        self.input_size, self.output_size = cell.input_size, cell.output_size
        self.dropout, self.recurrent_dropout = dropout, recurrent_dropout
        self.return_sequences, self.batch_first = return_sequences, batch_first

        length, sensors, _ = input_size
        sizes = [(length, sensors)]
        for kernel in cell.kernels:
            length, sensors = (length - kernel.shape[3]) // stride + 1, sensors - kernel.shape[2] + 1
            sizes.append((length, sensors))
        channels = [input_size[2], *cell.filters]
        elements = [positions[0] * positions[1] * c for positions, c in zip(sizes, channels, strict=True)]
        self.input_matrices: nn.ModuleList | None = None
        if max(elements[1:]) <= _dense.LIMIT:
            self.input_matrices = nn.ModuleList(
                _dense.ConvolutionMatrix(kernel.shape, sizes[j], sizes[j + 1], stride=stride)
                for j, kernel in enumerate(cell.kernels)
                if j
            )
        self.recurrent_matrices: nn.ModuleList | None = None
        if cell.linear_recurrence and elements[-1] <= _dense.LIMIT:
            self.recurrent_matrices = nn.ModuleList(
                _dense.ConvolutionMatrix(kernel.shape, sizes[-1], sizes[-1], same=True)
                for kernel in cell.recurrent_kernels
            )
            last = cell.recurrent_kernels[-1].shape
            self.cell_matrix = _dense.ConvolutionMatrix(last, sizes[-1], sizes[-1], gates=1, same=True)

    def forward(
        self, x: Float[Tensor, "*batch_and_steps length sensors channels"], state: State | None = None
    ) -> tuple[Tensor, State]:
        if tuple(x.shape[2:]) != self.input_size:
            raise ValueError(
                f"expected sub-windows of (length, sensors, channels) {self.input_size}, got {tuple(x.shape[2:])}"
            )
        if self.batch_first:
            x = x.transpose(0, 1)
        steps, batch = x.shape[:2]
        if self.training and self.dropout:
            mask = F.dropout(x.new_ones(batch, 4, *x.shape[2:]), self.dropout)
            each = (x.unsqueeze(2) * mask).permute(0, 1, 2, 5, 4, 3).flatten(2, 3).flatten(0, 1)
            gates = self.cell.input_gates(each, groups=4).permute(0, 3, 2, 1)
        else:
            gates = self._deeper_input_gates(self._first_convolution(x.flatten(0, 1)))
        return self._recur(gates.unflatten(0, (steps, batch)), state)

    def forward_segment(
        self, segment: Float[Tensor, "batch rows sensors channels"], state: State | None = None
    ) -> tuple[Tensor, State]:
        """:meth:`forward` on the sub-windows that start at each of the first ``rows - length + 1`` cycles of a segment.

        Args:
            segment: (batch, rows, sensors, channels) consecutive cycles, at least ``length`` of them.
            state: as in :meth:`forward`.
        """
        length = self.input_size[0]
        if segment.shape[1] < length or tuple(segment.shape[2:]) != self.input_size[1:]:
            raise ValueError(
                f"expected at least {length} rows of (sensors, channels) {self.input_size[1:]}, "
                f"got {segment.shape[1]} of {tuple(segment.shape[2:])}"
            )
        if self.cell.stride > 1 or (self.training and self.dropout):
            windows = segment.unfold(1, length, 1).permute(0, 1, 4, 2, 3)
            return self.forward(windows if self.batch_first else windows.transpose(0, 1), state)
        gates = self._deeper_input_gates(self._first_convolution(segment), dense=False)
        return self._recur(gates.unfold(1, self.output_size[0], 1).permute(1, 0, 4, 2, 3), state)

    def _first_convolution(
        self, x: Float[Tensor, "items rows sensors channels"]
    ) -> Float[Tensor, "items rows_out sensors_out gates"]:
        """As one linear map of unfolded rows, which reads narrow channels better than a convolution does."""
        kernel, bias = self.cell.kernels[0], self.cell.biases[0]
        x = x.unfold(1, kernel.shape[3], self.cell.stride)  # items, rows', sensors, channels, cycles
        if self.cell.fusion[0] == "early":
            return F.linear(x.flatten(2), kernel.transpose(1, 2).flatten(1), bias).unsqueeze(2)
        return F.linear(x.flatten(3), kernel.flatten(1), bias)

    def _deeper_input_gates(
        self, x: Float[Tensor, "items rows sensors gates"], dense: bool = True
    ) -> Float[Tensor, "items length_out sensors_out gates_out"]:
        """The convolutions after the first, where gates no longer mix; as matrices, which know only one length, or not."""
        cell = self.cell
        if len(cell.kernels) == 1:
            return x
        if self.input_matrices is None or not dense:
            x = x.permute(0, 3, 2, 1)  # items, gates, sensors, cycles
            for j in range(1, len(cell.kernels)):
                x = ACTIVATIONS[cell.conv_activation[j - 1]](x)
                x = _dense.conv(x, cell.kernels[j], cell.biases[j], cell.stride, 4, same=False)
            return x.permute(0, 3, 2, 1)
        x = x.unflatten(3, (4, -1)).permute(3, 0, 1, 2, 4)
        for j, matrix in enumerate(self.input_matrices, 1):
            weight = matrix(cell.kernels[j])
            bias = cell.biases[j].view(4, 1, 1, -1).expand(-1, -1, weight.shape[2] // cell.filters[j], -1)
            x = ACTIVATIONS[cell.conv_activation[j - 1]](x).flatten(2)  # gate, item, flat
            x = torch.baddbmm(bias.flatten(2), x, weight)
        return x.unflatten(2, self.output_size).permute(1, 2, 3, 0, 4).flatten(3)

    def _recur(
        self, gates: Float[Tensor, "steps batch length sensors gates"], state: State | None
    ) -> tuple[Tensor, State]:
        masked = self.training and self.recurrent_dropout
        run = self._by_convolution if masked or self.recurrent_matrices is None else self._by_matrix
        sequence, c = run(gates, state)
        h = sequence[-1]
        if not self.return_sequences:
            return h, (h, c)
        return (sequence.transpose(0, 1) if self.batch_first else sequence), (h, c)

    def _by_matrix(self, gates: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        """A product of the layers' own matrices: zero padding between two convolutions is not one wider convolution."""
        cell, stack = self.cell, None
        assert self.recurrent_matrices is not None
        for matrix, kernel in zip(self.recurrent_matrices, cell.recurrent_kernels, strict=True):
            stack = matrix(kernel) if stack is None else stack @ matrix(kernel)
        assert stack is not None
        recurrent = stack.transpose(0, 1).flatten(1)  # flat state to the four gates in turn
        cell_matrix = None if cell.cell_kernel is None else self.cell_matrix(cell.cell_kernel)[0]
        u = gates.unflatten(4, (4, -1)).permute(0, 1, 4, 2, 3, 5).flatten(2)  # steps, batch, (gate, flat)
        h0, c0 = (None, None) if state is None else (s.flatten(1).to(u.dtype) for s in state)
        activation = cell.recurrent_activation[-1]
        if torch.is_grad_enabled():
            hs, c = DenseRecurrence.apply(u, recurrent, cell_matrix, h0, c0, activation)
        else:
            outputs, h, c = [], h0, c0
            for u_t in u.unbind(0):
                total = u_t if h is None else torch.addmm(u_t, h, recurrent)
                h, c = update(total, c if c is None or cell_matrix is None else c @ cell_matrix, activation)
                outputs.append(h)
            hs = torch.stack(outputs)
        return hs.unflatten(2, self.output_size), c.unflatten(1, self.output_size)

    def _by_convolution(self, gates: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
        mask = None
        if self.training and self.recurrent_dropout:
            length, sensors, filters = self.output_size
            mask = F.dropout(gates.new_ones(gates.shape[1], 4, filters, sensors, length), self.recurrent_dropout)
        h, c = (None, None) if state is None else (s.permute(0, 3, 2, 1) for s in state)
        outputs = []
        for u_t in gates.permute(0, 1, 4, 3, 2).unbind(0):
            h, c = self.cell.step(u_t, h, c, mask)
            outputs.append(h.permute(0, 3, 2, 1))
        assert c is not None
        return torch.stack(outputs), c.permute(0, 3, 2, 1)
