"""Two random views of each image, drawn and computed for a whole batch at once, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_GREY = (0.2989, 0.587, 0.114)


class Draws(NamedTuple):
    """What is random in the views of n images, each a tensor whose first side is n; index it to choose images."""

    box: Tensor  # (n, 4): height and width of the crop, and its place, each as a share of what is possible
    flip: Tensor  # (n,), bool
    jitter: Tensor  # (n,), bool
    factors: Tensor  # (n, 4): brightness, contrast, saturation, hue
    order: Tensor  # (n, 4): in which order these come
    grey: Tensor  # (n,), bool
    sigma: Tensor  # (n,): of the blur, pixels; 0: none

    def select(self, index: Tensor) -> Draws:
        """The draws of some images."""
        return Draws(*(value[index] for value in self))


@dataclass(frozen=True)
class Augmentation:
    """MoCo-v2's augmentation (Chen et al. 2020), in its order: crop, colour jitter, grey, blur, flip.

    Drawing and computing are apart: the same draws give the same views. Crops are antialiased as PIL's are, and colours are as
    torchvision's, jittered in an order drawn for each image; the blur is a true Gaussian, where PIL approximates one.

    Args:
        size: side of the views, pixels. area: of the crop, from and to, as shares of the image; its aspect is 3/4 to 4/3.
        jitter: by how much brightness, contrast and saturation change at most (0.4: factors of 0.6 to 1.4) and the hue (0.1 of
            the circle); None: not at all. grey, blur, flip: probabilities; the jitter's is 0.8, the blur's sigma 0.1 to 2 pixels.

    Shape:
        images: (n, 3, side, side), uint8. Returns (n, 3, size, size), float32 in [0, 1].

    Example:
        >>> augmentation = Augmentation.moco(8)
        >>> images = torch.randint(256, (4, 3, 10, 10), dtype=torch.uint8)
        >>> draws = augmentation.draw(4, torch.Generator().manual_seed(0))
        >>> augmentation(images, draws).shape
        torch.Size([4, 3, 8, 8])
    """

    size: int
    area: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] | None = (0.4, 0.4, 0.4, 0.1)
    grey: float = 0.2
    blur: float = 0.5
    flip: float = 0.5

    @classmethod
    def moco(cls, size: int) -> Augmentation:
        """The paper's; below 64 pixels without blur, as is usual for CIFAR (ours)."""
        return cls(size, blur=0.5 if size >= 64 else 0.0)

    @classmethod
    def swav(cls, size: int, area: tuple[float, float]) -> Augmentation:
        """SwAV's (Caron et al. 2020): twice MoCo-v2's changes of colour; below 64 pixels without blur, too."""
        return dataclasses.replace(cls.moco(size), area=area, jitter=(0.8, 0.8, 0.8, 0.2))

    @classmethod
    def crop_flip(cls, size: int) -> Augmentation:
        """Of a linear evaluation: crops of 0.08 to 1 of the area, and flips."""
        return cls(size, area=(0.08, 1.0), jitter=None, grey=0.0, blur=0.0)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Draws:
        """What is random in the views of n images, on the CPU."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.empty(*(shape or (n,))).uniform_(low, high, generator=generator)

        tries = 10  # as torchvision's RandomResizedCrop; the whole image if none fits
        area = uniform(*self.area, n, tries)
        ratio = uniform(-1.0, 1.0, n, tries).mul_(torch.tensor(4 / 3).log()).exp_()
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2)
        fits = (sides <= 1).all(2)
        first = fits.float().argmax(1)
        chosen = sides[torch.arange(n), first]
        chosen[~fits.any(1)] = 1.0
        factors = torch.zeros(n, 4)
        if self.jitter is not None:
            *scaled, hue = self.jitter
            for column, change in enumerate(scaled):
                factors[:, column] = uniform(max(0.0, 1 - change), 1 + change)
            factors[:, 3] = uniform(-hue, hue)
        sigma = uniform(0.1, 2.0)
        return Draws(
            box=torch.cat([chosen, uniform(0.0, 1.0, n, 2)], 1),
            flip=uniform(0.0, 1.0) < self.flip,
            jitter=uniform(0.0, 1.0) < (0.8 if self.jitter is not None else 0.0),
            factors=factors,
            order=uniform(0.0, 1.0, n, 4).argsort(1),
            grey=uniform(0.0, 1.0) < self.grey,
            sigma=torch.where(uniform(0.0, 1.0) < self.blur, sigma, 0.0),
        )

    def __call__(self, images: UInt8[Tensor, "n 3 side side"], draws: Draws) -> Float[Tensor, "n 3 size size"]:
        device = images.device
        draws = Draws(*(value.to(device) for value in draws))
        with torch.autocast(device.type, enabled=False):
            views = self._crop(images, draws)
            for place in range(4):
                for index, operation in enumerate(_JITTER):
                    rows = (draws.jitter & (draws.order[:, place] == index)).nonzero().squeeze(1)
                    if len(rows):
                        views[rows] = operation(views[rows], draws.factors[rows, index].view(-1, 1, 1, 1))
            rows = draws.grey.nonzero().squeeze(1)
            if len(rows):
                views[rows] = _grey(views[rows]).expand(-1, 3, -1, -1)
            rows = (draws.sigma > 0).nonzero().squeeze(1)
            if len(rows):
                views[rows] = _blur(views[rows], draws.sigma[rows])
        return views

    def _crop(self, images: Tensor, draws: Draws) -> Tensor:
        """Crop, resize and flip as two matrix products for each image: rows, then columns."""
        side = images.shape[-1]
        extent = (draws.box[:, :2] * side).round().clamp_(1, side)
        start = (draws.box[:, 2:] * (side - extent + 1)).floor().minimum(side - extent)
        rows = _resize_matrix(start[:, 0], extent[:, 0], side, self.size)
        columns = _resize_matrix(start[:, 1], extent[:, 1], side, self.size)
        columns = torch.where(draws.flip.view(-1, 1, 1), columns.flip(1), columns)
        pixels = images.to(torch.float32).div_(255)
        n, c = pixels.shape[:2]
        across = torch.bmm(pixels.view(n, c * side, side), columns.mT).view(n, c, side, self.size)
        return torch.matmul(rows.unsqueeze(1), across)


def _resize_matrix(start: Tensor, extent: Tensor, side: int, size: int) -> Tensor:
    """(n, size, side): weights that take a line of ``side`` pixels to ``size`` pixels of the part from ``start`` on, which is
    ``extent`` long: linear interpolation, antialiased where it shrinks."""
    scale = (extent / size).view(-1, 1, 1)
    pixel = torch.arange(side, device=start.device) + 0.5 - start.view(-1, 1, 1)
    centre = (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    weights = (1 - (pixel - centre).abs() / scale.clamp_min(1)).clamp_(min=0)
    weights *= (pixel > 0) & (pixel < extent.view(-1, 1, 1))
    return weights / weights.sum(2, keepdim=True)


def _grey(images: Tensor) -> Tensor:
    """(n, 1, height, width), luma of ITU-R 601."""
    r, g, b = images.unbind(1)
    return (_GREY[0] * r + _GREY[1] * g + _GREY[2] * b).unsqueeze(1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, factor).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_grey(images).expand_as(images), images, factor).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of the HSV cone by a share of the circle."""
    r, g, b = images.unbind(1)
    value, least = images.amax(1), images.amin(1)
    chroma = value - least
    divisor = chroma.clamp_min(1e-12)
    sixth = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    sixth = sixth.add_(6 * shift.squeeze(1)).unsqueeze(1)
    offset = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = (sixth + offset).remainder_(6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp_(0, 1)


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of each image's own width, by a matrix product along rows and one along columns; renormalised at the edges."""
    place = torch.arange(images.shape[-1], device=images.device, dtype=torch.float32)
    weights = (-0.5 * ((place - place.unsqueeze(1)) / sigma.view(-1, 1, 1)).square()).exp_()
    weights = (weights / weights.sum(2, keepdim=True)).unsqueeze(1)
    return weights @ images @ weights.mT
