"""Pictures of any format, mode and size to uint8 squares of one side.

Pillow decodes: ``torchvision.io`` has been deprecated since torchvision 0.29.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others could call programs, as EPS does
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def open_picture(content: bytes | str | Path) -> Image.Image:
    """A picture of which the header alone has been read, from a file or its bytes.

    Raises:
        OSError: for what is none of :data:`FORMATS`.
        PIL.Image.DecompressionBombError: for a header that says more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` (179 million).
    """
    try:
        return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(f"not an image ({', '.join(FORMATS)})") from None


def square(picture: Image.Image, side: int) -> UInt8[Tensor, "3 side side"]:
    """The centre square of a picture, upright by its EXIF data, in RGB, resized with antialiasing to ``side`` pixels.

    It is what resizing the shorter side and cropping the centre gives, but a picture of extreme shape costs no memory. Grey,
    palette, CMYK and 16-bit pictures become RGB; transparency is dropped. A JPEG of four times the side or more is decoded at a
    half, a quarter or an eighth, but at no less than twice the side, as Pillow's thumbnails are.

    Raises:
        ValueError: for 32-bit integers or floats, whose white is unknown.
        Exception: whatever Pillow raises for a broken file.

    >>> square(Image.new("L", (40, 30), 7), 16).shape
    torch.Size([3, 16, 16])
    """
    picture.draft(None, (2 * side, 2 * side))
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {picture.mode}), whose white is unknown")
    elif "transparency" in picture.info:
        picture = picture.convert("RGBA")
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    top, left = (height - shorter) // 2, (width - shorter) // 2
    pixels = pixels[:, top : top + shorter, left : left + shorter]
    return pixels.contiguous() if shorter == side else F.resize(pixels, [side, side], antialias=True).contiguous()
