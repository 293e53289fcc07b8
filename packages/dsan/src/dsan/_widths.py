"""Columns of a batch that belong to each crop, so that what stands beside a crop in a batch never changes its result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def keep(features: Tensor, widths: Tensor | None) -> Tensor:
    """``features`` (b, c, h, w) with zeros beyond each crop's ``widths`` (b,)."""
    if widths is None:
        return features
    beyond = torch.arange(features.shape[-1], device=features.device) >= widths.to(features.device).unsqueeze(1)
    return features.masked_fill(beyond[:, None, None], 0.0)


def after(layer: nn.Conv2d | nn.MaxPool2d, widths: Tensor) -> Tensor:
    """How wide crops are behind a layer. A pool of two columns also keeps one that has no partner."""
    kernel, stride, padding = (_width(getattr(layer, name)) for name in ("kernel_size", "stride", "padding"))
    if isinstance(layer, nn.MaxPool2d) and stride == 2:
        return (widths + 1) // 2
    return (widths + 2 * padding - kernel) // stride + 1


def _width(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[1]


class Columns(nn.Sequential):
    """A Sequential that also carries widths through its layers: ``(features, widths) -> (features, widths)``.

    Convolutions and pools see zeros where there is no crop; with widths None it is a plain Sequential.
    """

    def forward(self, features: Tensor, widths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for layer in self:
            if isinstance(layer, Columns | Residual):
                features, widths = layer(features, widths)
            elif isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                features = layer(keep(features, widths))
                widths = None if widths is None else after(layer, widths)
            else:
                features = layer(features)
        return features, widths

    def after(self, widths: Tensor) -> Tensor:
        """How wide crops are behind all layers."""
        for layer in self:
            if isinstance(layer, Columns):
                widths = layer.after(widths)
            elif isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                widths = after(layer, widths)
        return widths


class Residual(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, and a shortcut that is 1x1-BN where the number of channels changes."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = Columns(
            *conv_bn_relu(channels, out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, features: Tensor, widths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        body, widths = self.body(features, widths)
        return F.relu(body + self.shortcut(features), inplace=True), widths


def conv_bn_relu(
    channels: int, out_channels: int, kernel: int | tuple[int, int] = 3, stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
) -> list[nn.Module]:  # fmt: skip
    """Convolution without bias, batch normalisation, ReLU."""
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def upsample(features: Tensor, size: tuple[int, int], source: Tensor | None, target: Tensor | None) -> Tensor:
    """Bilinear to ``size``, half-pixel centres; each crop from its ``source`` to its ``target`` columns, if these are given."""
    if source is None or target is None:
        return F.interpolate(features, size, mode="bilinear", align_corners=False)
    features = F.interpolate(features, (size[0], features.shape[-1]), mode="bilinear", align_corners=False)
    source, target = (x.to(features.device).unsqueeze(1) for x in (source, target))
    places = (torch.arange(size[1], device=features.device) + 0.5) * (source.double() / target) - 0.5
    places = places.clamp_min(0)
    left = places.floor().long().minimum(source - 1)
    share = (places - left).clamp_max(1).to(features.dtype)[:, None, None]

    def columns(at: Tensor) -> Tensor:
        return features.gather(3, at[:, None, None].expand(*features.shape[:3], -1))

    return torch.lerp(columns(left), columns((left + 1).minimum(source - 1)), share)
