"""Crops of any format, mode and size to uint8 arrays of one height, and such arrays to a batch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from papercore.lab.images import FORMATS as FORMATS
from papercore.lab.images import open_image as open_image
from PIL import Image
from torch import Tensor

PADDING = 128  # grey value beside a crop that is narrower than its batch
LEAST_WIDTH = 16  # of a crop whose aspect ratio is kept, pixels
TALL = 1.5  # height to width: from here on text is taken to run downwards, if that is asked for
ORIENTATION = 0x0112  # EXIF tag


@dataclass(frozen=True)
class Size:
    """What a recogniser wants its crops to be.

    Args:
        height: pixels. width: pixels; every crop is stretched to it, unless ``keep_ratio``.
        channels: 1 (grey) or 3 (RGB).
        keep_ratio: the width is ceil(height * w / h), from 16 to ``max_width`` pixels; a crop beyond them is stretched.
        rotate_tall: turn a crop that is more than 1.5 times as high as wide by 90 degrees, counter-clockwise, so that text which
            runs downwards, letters lying on their right sides, stands upright. A single letter that is so narrow is turned too.

    Raises:
        ValueError: for no pixels, channels other than 1 or 3, and a max_width below 16.
    """

    height: int = 32
    width: int = 100
    channels: int = 1
    keep_ratio: bool = False
    max_width: int = 800
    rotate_tall: bool = False

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("max_width", LEAST_WIDTH)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least} pixels, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {self.channels}")

    def turns(self, width: int, height: int) -> bool:
        """Whether a picture of so many pixels is turned."""
        return self.rotate_tall and height > TALL * width

    def fitted_width(self, width: int, height: int) -> int:
        """Width of a picture of so many pixels once it is fitted.

        >>> Size(keep_ratio=True).fitted_width(200, 50), Size().fitted_width(200, 50)
        (128, 100)
        """
        if not self.keep_ratio:
            return self.width
        if self.turns(width, height):
            width, height = height, width
        return min(max(math.ceil(self.height * width / height), LEAST_WIDTH), self.max_width)


def upright_size(content: bytes) -> tuple[int, int]:
    """(Width, height) of an encoded image, pixels, turned by its EXIF data; only its header is read.

    Raises:
        Exception: whatever Pillow raises for a broken file.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        return (height, width) if picture.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def fit(
    image: Image.Image, *, height: int = 32, width: int = 100, channels: int = 1, keep_ratio: bool = False,
    max_width: int = 800, rotate_tall: bool = False,
) -> UInt8[np.ndarray, "channels height w"]:  # fmt: skip
    """A picture of mode "L" or "RGB", resized (bicubic) as :class:`Size` says.

    >>> fit(Image.new("RGB", (200, 50))).shape, fit(Image.new("L", (50, 200)), keep_ratio=True, rotate_tall=True).shape
    ((1, 32, 100), (1, 32, 128))
    """
    size = Size(height, width, channels, keep_ratio, max_width, rotate_tall)
    fitted = (size.fitted_width(*image.size), height)
    image = image.convert("L" if channels == 1 else "RGB")
    if size.turns(*image.size):
        image = image.transpose(Image.Transpose.ROTATE_90)
    pixels = np.array(image.resize(fitted, Image.Resampling.BICUBIC))
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def collate(arrays: Sequence[UInt8[np.ndarray, "channels height _"]]) -> tuple[Tensor, Tensor]:
    """Crops side by side in a batch as wide as the widest, rounded up to a multiple of 4; the rest, on the right, is 128.

    Returns:
        (images, uint8 (b, channels, height, W); widths, int64 (b,), the columns that are a crop's own).

    >>> images, widths = collate([np.zeros((1, 32, 50), np.uint8), np.zeros((1, 32, 20), np.uint8)])
    >>> images.shape, widths, images[1, 0, 0, 19:21]
    (torch.Size([2, 1, 32, 52]), tensor([50, 20]), tensor([  0, 128], dtype=torch.uint8))
    """
    widths = [array.shape[-1] for array in arrays]
    channels, height, _ = arrays[0].shape
    batch = np.full((len(arrays), channels, height, -(-max(widths) // 4) * 4), PADDING, np.uint8)
    for row, array in zip(batch, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    return torch.from_numpy(batch), torch.tensor(widths)


def normalize(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels 0..255 to -1..1: (x / 255 - 0.5) / 0.5, in float32."""
    return images.float().div_(127.5).sub_(1)
