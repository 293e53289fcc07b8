"""Feature extraction: an image 32 high to a stride of 4, where text attention comes, and on to columns of height 1.

Which network the paper used is not known. ``base`` is the residual network of its time (FAN, Cheng et al. 2017), ``vgg`` is
CRNN's (Shi et al. 2015), ``tiny`` is ours, for CPUs. All widths are carried along, so that batches may be padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timm
import torch
from timm.models._features import FeatureListNet
from torch import Tensor, nn

from dsan._widths import Columns, Residual, conv_bn_relu

DEFAULT_CHANNELS = {"tiny": (16, 32, 64, 96), "base": (512,), "vgg": (512,)}


class Backbone(nn.Module):
    """Two parts: ``stem``, to (b, middle, h / 4, w / 4), and ``rest``, to (b, dim, 1, about w / 4).

    Args:
        masks: whether widths can be carried through; if not, crops of different widths must not share a batch.
    """

    def __init__(self, stem: nn.Module, rest: nn.Module, middle: int, dim: int, masks: bool = True) -> None:
        super().__init__()
        self.stem, self.rest, self.middle, self.dim, self.masks = stem, rest, middle, dim, masks


def build_backbone(name: str, channels: int = 1, widths: Sequence[int] | None = None) -> Backbone:
    """A feature extractor.

    Args:
        name: "tiny", "base", "vgg", or "timm/NAME": a convolutional network of timm's, whose strides across are cut to 4.
        channels: of the image, 1 or 3.
        widths: channels of the layers: four for tiny; one, the output's, for base and vgg; none for timm.

    Raises:
        ValueError: for another name or number of widths, or a timm network that cannot be had so.
    """
    if name.startswith("timm/"):
        if widths is not None:
            raise ValueError(f"{name} has its own widths: leave them out")
        return _timm(name.removeprefix("timm/"), channels)
    builders: dict[str, Callable[..., Backbone]] = {"tiny": _tiny, "base": _base, "vgg": _vgg}
    if name not in builders:
        raise ValueError(f"backbone must be one of {', '.join(builders)} or timm/NAME; got {name!r}")
    chosen = tuple(DEFAULT_CHANNELS[name] if widths is None else widths)
    if len(chosen) != len(DEFAULT_CHANNELS[name]):
        raise ValueError(
            f"backbone {name} takes {len(DEFAULT_CHANNELS[name])} width(s), got {len(chosen)}: {list(chosen)}"
        )
    if any(w < 16 or w % 16 for w in chosen) and name == "base":
        raise ValueError(f"the width of base is divided by 16: got {chosen[0]}")
    backbone = builders[name](channels, *chosen)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _tiny(channels: int, c0: int, c1: int, c2: int, c3: int) -> Backbone:
    stem = Columns(
        *conv_bn_relu(channels, c0), nn.MaxPool2d(2), Residual(c0, c1), nn.MaxPool2d(2), Residual(c1, c2)
    )  # fmt: skip
    rest = Columns(
        nn.MaxPool2d((2, 1)), Residual(c2, c3), nn.MaxPool2d((2, 1)),
        *conv_bn_relu(c3, c3, (2, 3), padding=(0, 1)),
    )  # fmt: skip
    return Backbone(stem, rest, c2, c3)


def _base(channels: int, out: int) -> Backbone:
    stem = Columns(
        *conv_bn_relu(channels, out // 16), *conv_bn_relu(out // 16, out // 8), nn.MaxPool2d(2),
        Residual(out // 8, out // 4), *conv_bn_relu(out // 4, out // 4), nn.MaxPool2d(2),
        Residual(out // 4, out // 2), Residual(out // 2, out // 2), *conv_bn_relu(out // 2, out // 2),
    )  # fmt: skip
    rest = Columns(
        nn.MaxPool2d(2, (2, 1), (0, 1)),
        Residual(out // 2, out), *(Residual(out, out) for _ in range(4)), *conv_bn_relu(out, out),
        *(Residual(out, out) for _ in range(3)),
        *conv_bn_relu(out, out, 2, (2, 1), (0, 1)), *conv_bn_relu(out, out, 2, padding=0),
    )  # fmt: skip
    return Backbone(stem, rest, out // 2, out)


def _vgg(channels: int, out: int) -> Backbone:
    def plain(a: int, b: int, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(a, b, kernel, padding=padding), nn.ReLU(inplace=True)]

    stem = Columns(
        *plain(channels, out // 8), nn.MaxPool2d(2), *plain(out // 8, out // 4), nn.MaxPool2d(2),
        *plain(out // 4, out // 2), *plain(out // 2, out // 2),
    )  # fmt: skip
    rest = Columns(
        nn.MaxPool2d((2, 1)), *conv_bn_relu(out // 2, out), *conv_bn_relu(out, out), nn.MaxPool2d((2, 1)),
        *plain(out, out, 2, 0),
    )  # fmt: skip
    return Backbone(stem, rest, out // 2, out)


class _Plain(nn.Sequential):
    """A Sequential in Columns' place, for networks that widths cannot be carried through."""

    def forward(self, features: Tensor, widths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for layer in self:
            features = layer(features)
        return features, None


class _MeanHeight(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.mean(2, keepdim=True)


def _timm(name: str, channels: int) -> Backbone:
    try:
        network = timm.create_model(name, features_only=True, in_chans=channels, pretrained=False)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm/{name}: no feature extractor of timm: {error}") from None
    if not isinstance(network, FeatureListNet) or 4 not in network.feature_info.reduction():
        raise ValueError(f"timm/{name}: not a convolutional network with features of stride 4, such as timm/resnet18")
    at = network.feature_info.reduction().index(4)
    last = network.feature_info.module_name()[at].replace(".", "_")
    names = list(network)
    if last not in names:
        raise ValueError(f"timm/{name}: its features of stride 4 are inside a layer, so attention finds no place")
    cut = names.index(last) + 1
    stem, rest = [network[n] for n in names[:cut]], [network[n] for n in names[cut:]]
    for layer in (module for part in rest for module in part.modules()):
        stride = getattr(layer, "stride", None)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) and stride in (2, (2, 2)):
            layer.stride = (2, 1)
            if isinstance(layer, nn.AvgPool2d):
                layer.kernel_size = (2, 1)
    middle, dim = (network.feature_info.channels()[i] for i in (at, -1))
    backbone = Backbone(_Plain(*stem), _Plain(*rest, _MeanHeight()), middle, dim, masks=False)
    with torch.no_grad():
        was, _ = backbone.eval(), None
        try:
            shape = was.rest(was.stem(torch.zeros(1, channels, 32, 128))[0])[0].shape
        except RuntimeError as error:
            raise ValueError(f"timm/{name}: its strides across cannot be cut to 4: {error}") from None
    if shape[1] != dim or shape[3] < 24:
        raise ValueError(f"timm/{name}: makes {shape[3]} columns of 128 pixels; at least 24 are needed, a stride of 4")
    return backbone.train()
