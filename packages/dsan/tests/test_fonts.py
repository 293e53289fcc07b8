from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import pytest
from dsan.fonts import LETTERS, covers, find_fonts
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

SHIPPED = Path(matplotlib.get_data_path(), "fonts", "ttf")


@pytest.fixture
def gappy(tmp_path: Path) -> Path:
    """A font with an A, an empty B, a space and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((500, 0)), pen.lineTo((500, 700)), pen.closePath()  # type: ignore[func-returns-value]
    empty, names = TTGlyphPen(None).glyph(), [".notdef", "A", "B", "space"]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({65: "A", 66: "B", 32: "space"})
    font.setupGlyf({".notdef": empty, "A": pen.glyph(), "B": empty, "space": empty})
    font.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupPost()
    font.save(tmp_path / "gappy.ttf")
    return tmp_path / "gappy.ttf"


def test_a_character_needs_ink_and_a_place_in_the_cmap(gappy: Path) -> None:
    assert covers(gappy, "A A")
    assert not covers(gappy, "AB")
    assert not covers(gappy, "C")
    assert covers(SHIPPED / "DejaVuSans.ttf", "Ж9é")
    assert not covers(SHIPPED / "STIXGeneral.ttf", "漢")


def test_shipped_fonts_are_text_faces_in_one_order() -> None:
    fonts = find_fonts()
    names = [font.name for font in fonts]
    assert {"DejaVuSans.ttf", "STIXGeneral.ttf"} <= set(names)
    assert not {"STIXSizOneSymReg.ttf", "LastResortHE-Regular.ttf", "DejaVuSansDisplay.ttf"} & set(names)
    assert names == sorted(set(names))
    assert all(covers(font, LETTERS) for font in fonts)


def test_a_folder_is_searched_and_bad_files_are_left_out(tmp_path: Path, gappy: Path) -> None:
    (tmp_path / "deep").mkdir()
    shutil.copy(SHIPPED / "DejaVuSans.ttf", tmp_path / "deep" / "b.ttf")
    shutil.copy(SHIPPED / "STIXGeneral.ttf", tmp_path / "a.TTF")
    (tmp_path / "broken.otf").write_bytes(b"no font")
    assert find_fonts(tmp_path) == [tmp_path / "a.TTF", tmp_path / "deep" / "b.ttf"]


def test_a_folder_without_fonts_is_told(tmp_path: Path, gappy: Path) -> None:
    with pytest.raises(ValueError, match=r"none of its 1 font files .* draws letters"):
        find_fonts(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_fonts(tmp_path / "missing")
