"""The whole estimator: raw sensor segments in, remaining useful life out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from eclstm.baselines import ChannelNorm, ConvLSTM, ConvolutionalFlatLSTM, FlatLSTM, sub_windows
from eclstm.cell import ECLSTM, state_length

NAIVE_LAYERS: list[dict[str, Any]] = [
    {"filters": [10, 10], "kernel_sizes": [3, 3], "fusion": ["early", "early"]},
    {"filters": [20, 20], "kernel_sizes": [3, 3], "fusion": ["early", "early"]},
]
BASELINES = {"lstm": FlatLSTM, "cnn-lstm": ConvolutionalFlatLSTM, "convlstm": ConvLSTM}
NETWORKS = ("eclstm", *BASELINES)


class Standardize(nn.Module):
    """z-scores of the features, with one mean and deviation for each operating condition.

    The condition of a row is the nearest of ``conditions`` centres in its first ``condition_columns`` columns, which are
    not passed on. One condition and no such columns is the authors' single scaler.

    Shape:
        rows: (..., condition_columns + features). Returns (..., features).
    """

    centres: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, condition_columns: int = 0, conditions: int = 1) -> None:
        super().__init__()
        self.condition_columns = condition_columns
        self.register_buffer("centres", torch.zeros(conditions, condition_columns))
        self.register_buffer("mean", torch.zeros(conditions, features))
        self.register_buffer("deviation", torch.ones(conditions, features))

    def condition(self, rows: Tensor) -> Tensor:
        """(...) index of the nearest centre."""
        columns = rows[..., None, : self.condition_columns]
        return (columns - self.centres).square().sum(-1).argmin(-1)

    def forward(self, rows: Tensor) -> Tensor:
        features = rows[..., self.condition_columns :]
        if len(self.mean) == 1:
            return (features - self.mean[0]) / self.deviation[0]
        at = self.condition(rows)
        return (features - self.mean[at]) / self.deviation[at]

    @torch.no_grad()
    def fit(self, rows: Float[Tensor, "n columns"], centres: Tensor | None = None) -> None:
        """Means and sample deviations of the training rows (a deviation of 0 counts as 1); ``centres`` of the conditions."""
        if centres is not None:
            self.centres.copy_(centres)
        at = self.condition(rows) if len(self.mean) > 1 else torch.zeros(len(rows), dtype=torch.long)
        features = rows[:, self.condition_columns :].double()
        for k in range(len(self.mean)):
            mine = features[at == k]
            deviation = mine.std(0) if len(mine) > 1 else torch.ones_like(features[0])
            self.mean[k] = mine.mean(0)
            self.deviation[k] = torch.where(deviation > 1e-9 * mine.mean(0).abs(), deviation, 1.0)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Turn what a constructor says of a user's arguments into an error that names the part of the network."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part}: {error}") from None


def _convolution(channels: int, filters: int = 10, kernel_size: int = 3, stride: int = 2) -> nn.Conv2d:
    """Over the cycles alone of (batch, channels, sensors, cycles)."""
    if min(filters, kernel_size, stride) < 1:
        raise ValueError(f"filters, kernel_size and stride must be positive, got {filters}, {kernel_size} and {stride}")
    return nn.Conv2d(channels, filters, (1, kernel_size), (1, stride))


class ECLSTMNetwork(nn.Module):
    """Convolutions on each sub-window (none by default), then ECLSTM layers with batch normalisation after each.

    Shape:
        segments: (batch, length + steps - 1, sensors), standardised. Returns (batch, features) of the last step.
    """

    def __init__(
        self,
        sensors: int,
        length: int,
        layers: Sequence[Mapping[str, Any]] = tuple(NAIVE_LAYERS),
        momentum: float = 0.1,
        preprocessing: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.length = length
        channels = 1
        blocks: list[nn.Module] = []
        for index, spec in enumerate(preprocessing):
            with _named(f"preprocessing[{index}]"):
                convolution = _convolution(channels, **spec)
                length = state_length(length, convolution.kernel_size[1:], convolution.stride[1])
            blocks += [convolution, nn.ReLU()]
            channels = convolution.out_channels
        self.preprocessing = nn.Sequential(*blocks)
        size = (length, sensors, channels)
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for index, spec in enumerate(layers):
            with _named(f"layers[{index}]"):
                # Steps come first between the layers: that is how they compute, so nothing is copied.
                layer = ECLSTM(size, return_sequences=index < len(layers) - 1, batch_first=False, **spec)
            self.layers.append(layer)
            size = layer.output_size
            self.norms.append(ChannelNorm(size[2], momentum))
        self.output_size = size[0] * size[1] * size[2]

    def forward(self, segments: Float[Tensor, "batch rows sensors"]) -> Float[Tensor, "batch features"]:
        pairs = list(zip(self.layers, self.norms, strict=True))
        if len(self.preprocessing):
            windows = sub_windows(segments, self.length).transpose(0, 1)
            maps = self.preprocessing(windows.flatten(0, 1).unsqueeze(1))
            x = maps.permute(0, 3, 2, 1).unflatten(0, windows.shape[:2])
        else:
            first, first_norm = cast(tuple[ECLSTM, ChannelNorm], pairs.pop(0))
            x = first_norm(first.forward_segment(segments.unsqueeze(3))[0])
        for layer, norm in pairs:
            x = norm(layer(x)[0])
        return x.flatten(1)


class ECLSTMRegressor(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="eclstm",
    tags=["remaining-useful-life", "time-series"],
    license="apache-2.0",
):
    """Remaining useful life from the last rows of a sensor history; the authors' naive network unless told otherwise.

    Everything inference needs is saved with it: which columns to read, their scaling, and the protocol of its labels.

    Args:
        features: columns it reads, in order.
        sequence_length: sub-windows (recurrent steps) T. Authors' naive setting: 5.
        window_size: rows L of a sub-window. Authors' naive setting: 16. A segment has T + L - 1 rows.
        network: ``"eclstm"``, or a network to compare with: ``"lstm"``, ``"convlstm"``, ``"cnn-lstm"``.
        layers: one entry for each recurrent layer: arguments of :class:`eclstm.ECLSTM` by name; a width for the others.
            None: two layers as in the authors' naive network, and the like.
        preprocessing: convolutions on each sub-window before them (ECLSTM only): filters, kernel_size, stride by name.
        dense: widths of the hidden dense layers. Authors' naive setting: 150.
        dropout: share dropped before each dense layer in training. Authors: 0.
        condition_columns: columns that tell the operating condition; read before the features.
        conditions: number of operating conditions, each with a scaler of its own; 1: one scaler (authors).
        norm_momentum: of batch normalisation, in torch's sense. Authors: 0.01 (Keras 0.99), which needs thousands of steps.
        cap: largest label it was trained on; kept for the record.

    Shape:
        segments: (batch, T + L - 1, condition_columns + features), raw. Returns (batch,) in the labels' unit.

    Raises:
        ValueError: for an unknown network, an empty feature list, or sizes that do not fit (:class:`eclstm.ECLSTM`).

    Example:
        >>> regressor = ECLSTMRegressor([f"sensor_{i}" for i in range(16)])
        >>> regressor(torch.randn(2, 20, 16)).shape
        torch.Size([2])
        >>> sum(p.numel() for p in regressor.parameters())
        48421
    """

    def __init__(
        self,
        features: Sequence[str],
        sequence_length: int = 5,
        window_size: int = 16,
        network: str = "eclstm",
        layers: Sequence[Any] | None = None,
        preprocessing: Sequence[Mapping[str, Any]] = (),
        dense: Sequence[int] = (150,),
        dropout: float = 0.0,
        condition_columns: Sequence[str] = (),
        conditions: int = 1,
        norm_momentum: float = 0.1,
        cap: float | None = 120.0,
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network {network!r} is unknown: choose from {', '.join(NETWORKS)}")
        if not features:
            raise ValueError("features is empty: name at least one sensor column")
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
        if layers is not None and (not isinstance(layers, list | tuple) or not layers):
            raise ValueError(f"layers must be a list with an entry for each layer, got {layers!r}")
        if (
            layers is not None
            and network != "eclstm"
            and not all(isinstance(width, int) and width > 0 for width in layers)
        ):
            raise ValueError(f"layers of {network} are widths, positive whole numbers, got {layers}")
        if any(width < 1 for width in dense):
            raise ValueError(f"dense widths must be positive, got {list(dense)}")
        if conditions < 1:
            raise ValueError(f"conditions must be at least 1, got {conditions}")
        if (conditions > 1) != bool(condition_columns):
            raise ValueError(f"conditions {conditions} and condition_columns {list(condition_columns)} need each other")
        self.columns = [*condition_columns, *features]
        self.rows = sequence_length + window_size - 1
        self.cap = cap
        self.standardize = Standardize(len(features), len(condition_columns), conditions)
        options: dict[str, Any] = {"momentum": norm_momentum}
        if layers is not None:
            options[{"eclstm": "layers", "convlstm": "filters"}.get(network, "hidden")] = layers
        if network == "eclstm":
            self.network: Any = ECLSTMNetwork(len(features), window_size, preprocessing=preprocessing, **options)
        else:
            self.network = BASELINES[network](len(features), window_size, **options)
        blocks: list[nn.Module] = []
        size = self.network.output_size
        for width in dense:
            blocks += [nn.Dropout(dropout), nn.Linear(size, width), nn.ReLU()]
            size = width
        self.dense = nn.Sequential(*blocks)
        self.output = nn.Linear(size, 1)

    def forward(self, segments: Float[Tensor, "batch rows columns"]) -> Float[Tensor, " batch"]:
        if tuple(segments.shape[1:]) != (self.rows, len(self.columns)):
            raise ValueError(
                f"expected segments of {self.rows} rows and {len(self.columns)} columns, got {tuple(segments.shape[1:])}"
            )
        return self.output(self.dense(self.network(self.standardize(segments)))).squeeze(1)
