"""Which fonts there are, and which characters each of them really draws."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

import matplotlib
from fontTools.ttLib import TTFont, TTLibError
from matplotlib.font_manager import findSystemFonts
from PIL import ImageFont

SUFFIXES = (".ttf", ".otf", ".ttc", ".woff")
LETTERS = string.ascii_letters + string.digits


def find_fonts(folder: str | Path | None = None) -> list[Path]:
    """Fonts that draw all of ``a-z``, ``A-Z`` and ``0-9``, ordered by file name.

    Fonts of symbols and broken files are left out.

    Args:
        folder: searched with its subfolders for .ttf, .otf, .ttc and .woff. None: the system's fonts and the text faces of
            matplotlib (DejaVu, STIX), so there are always some.

    Raises:
        ValueError: if ``folder`` is no folder or holds no such font.
    """
    if folder is None:
        shipped = Path(matplotlib.get_data_path(), "fonts", "ttf")
        files = [Path(name) for name in findSystemFonts()]
        files += [*shipped.glob("DejaVuS*.ttf"), *shipped.glob("STIXGeneral*.ttf")]
        files = [file for file in files if "Display" not in file.name]
    elif Path(folder).is_dir():
        files = [file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES]
    else:
        raise ValueError(f"{folder}: no such folder of fonts")
    named = {file.name: file for file in sorted(files, reverse=True)}  # of equal names the first
    fonts = [named[name] for name in sorted(named) if covers(named[name], LETTERS)]
    if not fonts:
        raise ValueError(
            f"{folder}: none of its {len(files)} font files ({' '.join(SUFFIXES)}) draws letters and digits"
        )
    return fonts


def covers(path: str | Path, text: str) -> bool:
    """Whether a font draws every character of ``text``: it is in the cmap and its glyph has ink (spaces need none).

    False for a file that is no font.
    """
    file = str(path)  # whose hash is kept, unlike a Path's
    return all(_draws(file, character) for character in set(text))


@lru_cache(maxsize=1024)
def _cmap(file: str) -> frozenset[int]:
    try:
        with TTFont(file, lazy=True, fontNumber=0) as font:
            return frozenset(font.getBestCmap() or ())
    except (TTLibError, OSError, ValueError, KeyError):
        return frozenset()


@lru_cache(maxsize=1024)
def _small(file: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(file, 24, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return None


@lru_cache(maxsize=2**16)
def _draws(file: str, character: str) -> bool:
    font = _small(file) if ord(character) in _cmap(file) else None
    return font is not None and (character.isspace() or font.getmask(character).getbbox() is not None)
