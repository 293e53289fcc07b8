"""The authors' published weights in our layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from eclstm.cell import ECLSTM, ECLSTMCell


def load_keras_weights(module: ECLSTM | ECLSTMCell, arrays: Mapping[str, np.ndarray]) -> None:
    """Fill a layer with the weights of the authors' Keras layer, in place.

    Args:
        module: the layer or cell to fill.
        arrays: for each convolution j ``kernel_j`` (cycles, sensors, in, 4F), ``bias_j`` (4F) and ``recurrent_kernel_j``
            (cycles, sensors, F, 4F), the last of these with a fifth block for the cell state. Other keys are ignored.

    Raises:
        ValueError: if an array is missing or has another shape than the layer; the message names it.

    Example:
        >>> layer = ECLSTM((16, 14, 1), filters=[10], kernel_sizes=[3])
        >>> shapes = {"kernel_0": (3, 14, 1, 40), "bias_0": (40,), "recurrent_kernel_0": (3, 1, 10, 50)}
        >>> load_keras_weights(layer, {name: np.full(shape, 0.5) for name, shape in shapes.items()})
        >>> layer.cell.biases[0].mean().item()
        0.5
    """
    cell = module.cell if isinstance(module, ECLSTM) else module
    last = len(cell.kernels) - 1

    def take(name: str, shape: torch.Size, blocks: int = 4) -> Tensor:
        if name not in arrays:
            raise ValueError(
                f"array {name!r} is missing: the layer has {last + 1} convolutions, the arrays are {sorted(arrays)}"
            )
        array = torch.as_tensor(np.asarray(arrays[name]))
        wanted = (shape[0] // 4 * blocks, *shape[1:])
        array = array.permute(3, 2, 1, 0) if array.ndim == 4 else array
        if tuple(array.shape) != wanted:
            raise ValueError(
                f"array {name!r} has {tuple(array.shape)} where the layer has {wanted} (out, in, sensors, cycles)"
            )
        return array

    with torch.no_grad():
        for j, (kernel, bias, recurrent) in enumerate(
            zip(cell.kernels, cell.biases, cell.recurrent_kernels, strict=True)
        ):
            kernel.copy_(take(f"kernel_{j}", kernel.shape))
            bias.copy_(take(f"bias_{j}", bias.shape))
            joined = j == last and cell.cell_kernel is not None
            array = take(f"recurrent_kernel_{j}", recurrent.shape, 5 if joined else 4)
            recurrent.copy_(array[: len(recurrent)])
            if joined and cell.cell_kernel is not None:
                cell.cell_kernel.copy_(array[len(recurrent) :])
