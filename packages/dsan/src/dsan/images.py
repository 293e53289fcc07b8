"""Crops of any format, mode and size to uint8 arrays of one height, and such arrays to a batch."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others could call programs, as EPS does
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


def open_image(
    source: str | Path | bytes | BinaryIO | Image.Image | np.ndarray, name: str | None = None
) -> Image.Image:
    """An upright picture of mode "L" (grey) or "RGB", whatever it was before.

    EXIF rotation is applied. Transparent pixels, of a palette too, are laid on white. Grey of 16 bits is scaled to 8. CMYK,
    palette and other colours become RGB. Of an animation it is the first frame.

    Args:
        source: a path, an encoded image (BMP, GIF, JPEG, PNG, PPM, TIFF, WebP) or an open file of one, a picture, or an array:
            (h, w), (h, w, 1), (h, w, 3) in RGB or (h, w, 4) in RGBA, of uint8, uint16, or floats from 0 to 1.
        name: what errors call it; by default its path.

    Raises:
        ValueError: for no bytes or pixels, what is damaged or no image, 32-bit pixels, whose white is unknown, and other arrays.
        OSError: for a path that cannot be read.

    >>> open_image(np.zeros((32, 100, 3), np.uint8)).size
    (100, 32)
    """
    if isinstance(source, str | Path):
        name = name or str(source)
        source = Path(source).read_bytes()
    elif not isinstance(source, bytes | Image.Image | np.ndarray):
        name = name or getattr(source, "name", None)
        source = source.read()
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, Image.Image):
        name = name or getattr(source, "filename", "")
    name = name or "image"
    if source == b"":
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    try:
        picture = _header(source) if isinstance(source, bytes) else source
        if 0 in picture.size:
            raise ValueError(f"it has no pixels ({picture.width} x {picture.height})")
        return _plain(picture)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises anything for a broken file
        raise ValueError(f"{name}: {error}") from None


def upright_size(content: bytes) -> tuple[int, int]:
    """(Width, height) of an encoded image, pixels, turned by its EXIF data; only its header is read.

    Raises:
        Exception: whatever Pillow raises for a broken file.
    """
    with _header(content) as picture:
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


def _header(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _plain(picture: Image.Image) -> Image.Image:
    deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")  # PPM: 0 to 65535
    if picture.mode in ("I", "F") and not deep:
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {picture.mode}), whose white is unknown; save it with 8 bits"
        )
    picture = ImageOps.exif_transpose(picture)
    if deep:
        return Image.fromarray((np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8))
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(f"{name}: expected (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: it has no pixels {array.shape}")
    if array.dtype == np.uint16:
        array = array / 65535
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{name}: floats must be from 0 to 1, got {array.min():g} to {array.max():g}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8, uint16 or floats from 0 to 1, got {array.dtype}")
    return _plain(Image.fromarray(array))
