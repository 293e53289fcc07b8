"""Random changes of a batch of crops while training, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """A crop turned, sheared, zoomed, shifted and bent a little; its greys stretched or inverted, blurred, and given noise.

    Args (ours, all the most or the probability):
        turn: degrees. shear: share of the height. zoom: of each side, as a factor. shift: of each side, as a share.
        bend: of a sine along the width, as a share of the height.
        contrast: factor. brightness: of 255. invert, blur: probabilities. noise: deviation, of 255.

    Shape:
        images: (batch, channels, height, W), uint8; widths: (batch,), columns that are the crop, or None for all. Returns float32
        of the same shape, 0 to 255. What the crop's edges leave free is filled with its edges.
    """

    turn: float = 5.0
    shear: float = 0.3
    zoom: float = 1.15
    shift: float = 0.04
    bend: float = 0.05
    contrast: float = 1.5
    brightness: float = 0.15
    invert: float = 0.15
    blur: float = 0.2
    noise: float = 0.05

    @classmethod
    def of_greys(cls) -> Augmentation:
        """Without a change of place, for training that uses boxes."""
        return cls(turn=0.0, shear=0.0, zoom=1.0, shift=0.0, bend=0.0)

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], widths: Tensor | None, generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        b, _, height, full = images.shape
        device = images.device

        def uniform(most: float, *shape: int) -> Tensor:
            return torch.empty(b, *(shape or (1, 1))).uniform_(-most, most, generator=generator).to(device)

        own = torch.full((b,), full) if widths is None else widths
        width = own.to(device, torch.float32).view(b, 1, 1)
        turn, shear = uniform(math.radians(self.turn)), uniform(self.shear)
        zoom_x, zoom_y = uniform(math.log(self.zoom)).exp(), uniform(math.log(self.zoom)).exp()
        shift_x, shift_y = uniform(self.shift) * width, uniform(self.shift) * height
        bend, waves, phase = uniform(self.bend) * height, uniform(0.5) + 1.0, uniform(math.pi)
        x = torch.arange(full, device=device).view(1, 1, full) + 0.5 - width / 2
        y = torch.arange(height, device=device).view(1, height, 1) + 0.5 - height / 2
        y = y + bend * torch.sin(2 * math.pi * waves * x / width + phase)
        x = x + shear * y
        to_x = zoom_x * (torch.cos(turn) * x - torch.sin(turn) * y) + shift_x + width / 2
        to_y = zoom_y * (torch.sin(turn) * x + torch.cos(turn) * y) + shift_y + height / 2
        to_x = to_x.minimum(width - 0.5).clamp_min(0.5)
        grid = torch.stack([2 * to_x / full - 1, (2 * to_y / height - 1).expand_as(to_x)], 3)
        pixels = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)

        stretch, lift = uniform(math.log(self.contrast), 1, 1, 1).exp(), 255 * uniform(self.brightness, 1, 1, 1)
        flipped, blurred = (
            torch.rand(b, 1, 1, 1, generator=generator).to(device) < share for share in (self.invert, self.blur)
        )
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = (pixels - mean) * stretch + mean + lift
        pixels = torch.where(flipped, 255 - pixels, pixels)
        soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pixels = torch.where(blurred, soft, pixels)
        deviation = 255 * uniform(self.noise, 1, 1, 1).abs()
        noise = torch.randn(pixels.shape, generator=generator).to(device)
        return (pixels + deviation * noise).clamp_(0, 255)
