"""The two teachers of inductive biases: a convolutional network and an involution network that score distorted images.

Convolution is local and has a kernel for each channel; involution has a kernel for each position and shares it among channels.
The paper fine-tunes EfficientNet-B0 and RedNet-101 (second-hand; see the README).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from iqa_distill.involution import Involution, conv_norm
from iqa_distill.rednet import DEPTHS, RedNet
from iqa_distill.weights import load_weights, read_weights

KINDS = ("conv", "inv")
TINY_WIDTHS = (16, 32, 64, 128)


class BiasOutput(NamedTuple):
    """``score``: (batch,), normalised. ``maps``: ends of stages 2, 3 and 4, each (batch, channels, height, width)."""

    score: Tensor
    maps: tuple[Tensor, ...]


class BiasTeacher(nn.Module, PyTorchModelHubMixin, library_name="iqa-distill", license="apache-2.0"):
    """A network of one inductive bias, whose last map's mean gives a score by one linear layer.

    Args:
        kind: "conv" or "inv".
        backbone: "tiny", four layers of the kind (ours, for CPUs); "rednet26" and so on for "inv" (:class:`RedNet`); for "conv"
            any network of timm's with maps, such as "efficientnet_b0". Weights are random: see :meth:`load_trunk`.

    Shape:
        images: (batch, 3, height, width), normalised; 32 pixels a side at least. Returns a :class:`BiasOutput`.

    Raises:
        ValueError: for another kind, or a backbone that is not of the kind.

    Example:
        >>> import torch
        >>> teacher = BiasTeacher("inv").eval()
        >>> output = teacher(torch.zeros(2, 3, 96, 96))
        >>> output.score.shape, [tuple(features.shape[1:]) for features in output.maps]
        (torch.Size([2]), [(32, 24, 24), (64, 12, 12), (128, 6, 6)])
    """

    def __init__(self, kind: str = "conv", backbone: str = "tiny") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        super().__init__()
        self.kind = kind
        self.trunk, self.channels = _trunk(kind, backbone)
        self.head = nn.Linear(self.channels[-1], 1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> BiasOutput:
        maps = tuple(self.trunk(images)[-3:])
        return BiasOutput(self.head(maps[-1].mean((2, 3))).squeeze(1), maps)

    def load_trunk(self, path: str | Path) -> list[str]:
        """ImageNet weights from a file: of the published RedNet, or with timm's names of the backbone.

        Returns:
            Names in the file that were not used, such as the classifier's.

        Raises:
            ValueError, OSError: as :func:`iqa_distill.weights.read_weights` and ``load_weights``.
        """
        return load_weights(getattr(self.trunk, "model", self.trunk), read_weights(path), path)


class _Tiny(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        make = _conv_layer if kind == "conv" else _inv_layer
        self.layers = nn.ModuleList(make(*pair) for pair in zip((3, *TINY_WIDTHS), TINY_WIDTHS, strict=False))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        return maps


def _conv_layer(channels: int, out: int) -> nn.Module:
    return conv_norm(channels, out, 3, stride=2)


def _inv_layer(channels: int, out: int) -> nn.Module:
    """Channels are mixed in blocks of 2 x 2 pixels, without overlap, as involution mixes none; neighbours by involution alone."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 2, 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        Involution(out, 3), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
    )  # fmt: skip


def _trunk(kind: str, backbone: str) -> tuple[nn.Module, list[int]]:
    """A module that returns maps, and the channels of the last three."""
    if backbone == "tiny":
        return _Tiny(kind), list(TINY_WIDTHS[-3:])
    if backbone in (names := [f"rednet{depth}" for depth in DEPTHS]):
        if kind == "conv":
            raise ValueError(f"{backbone} is an involution network: it needs the kind inv")
        rednet = RedNet(int(backbone.removeprefix("rednet")))
        return rednet, rednet.channels[-3:]
    if kind == "inv":
        raise ValueError(f"an involution backbone must be one of tiny, {', '.join(names)}; got {backbone!r}")
    try:
        network: Any = timm.create_model(backbone, features_only=True, feature_cls="getter", out_indices=(-3, -2, -1))
    except (RuntimeError, AttributeError, TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"{backbone}: no network of timm's with maps, such as efficientnet_b0: {error}") from None
    return network, network.feature_info.channels()
