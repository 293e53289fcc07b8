"""Images of any format, mode and source as upright pictures of 8 bits, grey or RGB."""

from __future__ import annotations

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others could call programs, as EPS does

Source = str | Path | bytes | BinaryIO | Image.Image | np.ndarray


def open_image(source: Source, name: str | None = None) -> Image.Image:
    """An upright picture of mode "L" (grey) or "RGB", whatever it was before.

    EXIF rotation is applied. Transparent pixels, of a palette too, are laid on white; ``info["laid_on_white"]`` is then True.
    Grey of 16 bits is scaled to 8. CMYK, palette and other colours become RGB. Of an animation it is the first frame.

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
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, str | Path):
        name = name or str(source)
        source = Path(source).read_bytes()
    name = name or getattr(source, "filename", "") or getattr(source, "name", "") or "image"
    if not isinstance(source, bytes | Image.Image):
        source = source.read()
    if source == b"":
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(source), formats=FORMATS) if isinstance(source, bytes) else source
        if 0 in picture.size:
            raise ValueError(f"it has no pixels ({picture.width} x {picture.height})")
        return _plain(picture)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises anything for a broken file
        raise ValueError(f"{name}: {error}") from None


def find_images(names: Sequence[str]) -> list[Path]:
    """The files that names stand for: a file itself, a folder all images in it and below, a pattern with ``*`` or ``?`` what it
    matches. Each once; a folder's and a pattern's by name.

    Raises:
        FileNotFoundError: for a name without any.
    """
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    found: dict[Path, None] = {}
    for name in names:
        if Path(name).is_dir():
            files = [file for file in Path(name).rglob("*") if file.suffix.lower() in suffixes]
        else:
            files = [Path(name)] if Path(name).is_file() else [Path(match) for match in glob.glob(name, recursive=True)]
        if not (files := sorted(file for file in files if file.is_file())):
            raise FileNotFoundError(f"{name}: no image there; give files, folders or patterns such as 'photos/*.png'")
        found |= dict.fromkeys(files)
    return list(found)


def _plain(picture: Image.Image) -> Image.Image:
    deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")  # PPM: 0 to 65535
    if picture.mode in ("I", "F") and not deep:
        raise ValueError(f"its pixels have 32 bits (mode {picture.mode}), whose white is unknown; save it with 8 bits")
    picture = ImageOps.exif_transpose(picture)
    if deep:
        return Image.fromarray((np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8))
    mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
    if picture.has_transparency_data and np.asarray(rgba := picture.convert("RGBA"))[..., 3].min() < 255:
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        picture.info["laid_on_white"] = True
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
