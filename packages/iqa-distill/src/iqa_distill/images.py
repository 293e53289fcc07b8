"""From an image to what a network sees of it, and from what a network says to a score."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from papercore.lab.images import Source, open_image
from PIL import Image
from torch import Tensor

LEAST_SIDE = 32  # of an image, pixels

Values = TypeVar("Values", float, np.ndarray, Tensor)


def open_rgb(source: Source, name: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image in RGB, upright; see :func:`papercore.lab.images.open_image` for what it may be.

    Grey is repeated. Transparent pixels are laid on white, with one warning for each suffix.

    Raises:
        ValueError: for what is no image or damaged, and for a side below 32 pixels. OSError: for a path that cannot be read.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "image")
    picture = open_image(source, name)
    if min(picture.size) < LEAST_SIDE:
        raise ValueError(f"{name}: {picture.width} x {picture.height} pixels; a side needs at least {LEAST_SIDE}")
    if picture.info.get("laid_on_white"):
        warnings.warn(f"transparent pixels of {Path(name).suffix or 'some'} images are laid on white", stacklevel=1)
    return np.array(picture.convert("RGB"))


def check_tensor(
    images: Shaped[Tensor, "batch channels height width"] | Shaped[Tensor, "channels height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Images in float32, RGB, from 0 to 1.

    Args:
        images: uint8, which is divided by 255, or floats from 0 to 1; (batch, 3, height, width), (3, height, width), or with one
            channel, grey, which is repeated. A gradient flows back.

    Raises:
        ValueError: for another shape or type, NaN, floats outside 0 to 1, and a side below 32 pixels.

    >>> check_tensor(torch.full((1, 32, 48), 51, dtype=torch.uint8))[0, :, 0, 0]
    tensor([0.2000, 0.2000, 0.2000])
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (batch, 3, height, width) or (3, height, width), got {tuple(images.shape)}")
    if min(images.shape[2:]) < LEAST_SIDE:
        raise ValueError(f"images of {images.shape[3]} x {images.shape[2]} pixels; a side needs at least {LEAST_SIDE}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise ValueError(f"images must be uint8, or floats from 0 to 1, got {images.dtype}")
    elif images.numel():
        if images.isnan().any():
            raise ValueError("images hold NaN")
        low, high = (float(bound) for bound in images.detach().aminmax())
        if low < 0 or high > 1:
            what = "divide them by 255, or give uint8" if high > 2 else "clamp them"
            raise ValueError(f"floats must be from 0 to 1, got {low:g} to {high:g}: {what}")
    return images.float().expand(-1, 3, -1, -1)


def reflect_to(images: Shaped[Tensor, "*batch h w"], height: int, width: int) -> Shaped[Tensor, "*batch height width"]:
    """Images that are smaller than this, padded on all sides by reflection, several times over if need be; with a warning.

    >>> reflect_to(torch.tensor([[[1, 2, 3]]]), 2, 7)
    tensor([[[3, 2, 1, 2, 3, 2, 1],
             [3, 2, 1, 2, 3, 2, 1]]])
    """
    if images.shape[-2] >= height and images.shape[-1] >= width:
        return images
    warnings.warn("images smaller than the crop are padded by reflection", stacklevel=1)
    rows, columns = _reflected(images.shape[-2], height), _reflected(images.shape[-1], width)
    return images[..., rows.to(images.device)[:, None], columns.to(images.device)]


def _reflected(size: int, wanted: int) -> Tensor:
    """Positions in 0..size - 1 that follow each other to and fro."""
    wanted = max(size, wanted)
    period = max(2 * (size - 1), 1)
    positions = (torch.arange(wanted) - (wanted - size) // 2) % period
    return torch.minimum(positions, (period - positions) % period) if size > 1 else positions


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes crops, saved with a network. ``Preprocessing(**dataclasses.asdict(p)) == p``, through JSON too.

    Args:
        crop_size: side of the square crops, pixels. DEIQT: 224.
        crops: of each image, when it is scored; the score is their mean. DEIQT: 10, drawn anew each time; ours are fixed.
        resize: (height, width) that every image is first resized to, pixels; None: it stays as it is.
        seed: of the places of the crops.
        mean, std: of the three channels, for values from 0 to 1; ImageNet's, as DEIQT.

    Raises:
        ValueError: for a crop below 32 pixels, no crops, a resize below 32 pixels, and a std that is not positive.
    """

    crop_size: int = 224
    crops: int = 10
    resize: tuple[int, int] | None = None
    seed: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("resize", "mean", "std"):  # JSON has lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.crop_size < LEAST_SIDE or self.crops < 1:
            raise ValueError(
                f"crop_size must be at least {LEAST_SIDE} pixels and crops at least 1, got {self.crop_size} and {self.crops}"
            )
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < LEAST_SIDE):
            raise ValueError(f"resize is (height, width), each at least {LEAST_SIDE} pixels, got {self.resize}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std are three numbers each, std positive; got {self.mean} and {self.std}")

    def resized(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "height width 3"]:
        """Bicubic with antialiasing, by Pillow: the same wherever the network goes."""
        if self.resize is None or image.shape[:2] == self.resize:
            return image
        height, width = self.resize
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))

    def positions(self, height: int, width: int) -> Int[Tensor, "crops 2"]:
        """(y, x) of the upper left corners, the same for all images of a size, whatever is scored with them or before them.

        Args:
            height, width: of the image, pixels; less than a crop count as a crop, see :func:`reflect_to`.
        """
        room = np.maximum([height - self.crop_size, width - self.crop_size], 0) + 1
        random = np.random.RandomState([self.seed, height, width])  # numpy keeps its numbers; a Generator's may change
        return torch.from_numpy((random.random_sample((self.crops, 2)) * room).astype(np.int64))

    def crops_of(self, image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "crops 3 side side"]:
        """The crops at :meth:`positions`, of an image that is resized already.

        Raises:
            ValueError: for a side below 32 pixels.
        """
        height, width = image.shape[1:]
        if min(height, width) < LEAST_SIDE:
            raise ValueError(f"an image of {width} x {height} pixels; a side needs at least {LEAST_SIDE}")
        side = self.crop_size
        padded = reflect_to(image, side, side)
        return torch.stack([padded[:, y : y + side, x : x + side] for y, x in self.positions(height, width).tolist()])

    def normalize(self, crops: Shaped[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch 3 h w"]:
        """(x / 255 - mean) / std of pixels from 0 to 255, uint8 or floats."""
        crops = crops if crops.is_floating_point() else crops.float()
        mean, std = (crops.new_tensor(values).view(3, 1, 1) * 255 for values in (self.mean, self.std))
        return (crops - mean) / std


@dataclass(frozen=True)
class ScoreScale:
    """The units of a data set's scores, higher is better, and of a network's: mean 0 and standard deviation 1 in training.

    Args:
        mean, std: of the training scores. low, high: ends of the data set's scale.

    Raises:
        ValueError: for a std that is not positive, and a scale without extent.

    >>> scale = ScoreScale.of([1, 3, 5], low=0, high=10)
    >>> scale.normalize(3.0), scale.restore(0.0), scale.unit(0.0)
    (0.0, 3.0, 0.3)
    """

    mean: float
    std: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.high > self.low):
            raise ValueError(f"scores need a positive deviation and low below high, got {self}")

    @classmethod
    def of(
        cls, scores: Sequence[float] | np.ndarray, low: float | None = None, high: float | None = None
    ) -> ScoreScale:
        """The scale of some scores.

        Args:
            scores: (n,), at least 3. low, high: ends of their scale; by default the least and the greatest.

        Raises:
            ValueError: for fewer than 3, equal ones, and NaN or infinity, naming their rows (from 0).
        """
        values = np.asarray(scores, np.float64)
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        if bad:
            raise ValueError(f"scores must be finite numbers; see rows {listed(bad)} (from 0)")
        if len(values) < 3:
            raise ValueError(f"{len(values)} scored images are too few: a scale needs at least 3")
        if values.min() == values.max():
            raise ValueError(f"all {len(values)} scores are equal ({values[0]:g}): there is nothing to learn")
        return cls(
            float(values.mean()),
            float(values.std()),
            float(values.min() if low is None else low),
            float(values.max() if high is None else high),
        )

    def normalize(self, scores: Values) -> Values:
        """(score - mean) / std."""
        return (scores - self.mean) / self.std

    def restore(self, normalized: Values) -> Values:
        """Scores in the data set's units."""
        return normalized * self.std + self.mean

    def unit(self, normalized: Values) -> Values:
        """Scores from 0 (low) to 1 (high). Not clipped: what a network puts beyond the scale keeps its order and its gradient."""
        return (self.restore(normalized) - self.low) / (self.high - self.low)


def listed(values: Sequence[object], most: int = 8) -> str:
    """The first few, for a message.

    >>> listed([1, 2, 3, 4], 2)
    '1, 2, ... (4 in all)'
    """
    rest = f", ... ({len(values)} in all)" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + rest
