from __future__ import annotations

import re
from pathlib import Path
from pickle import dumps, loads
from typing import Any

import matplotlib
import numpy as np
import pytest
from dsan.synthetic import LEAST_CONTRAST, SyntheticWord, SyntheticWords, backgrounds_from, render_words
from PIL import Image

TTF = Path(matplotlib.get_data_path(), "fonts", "ttf")
FONTS = [TTF / "DejaVuSans.ttf", TTF / "STIXGeneralBol.ttf"]
ENGINE = SyntheticWords(fonts=FONTS)
WORDS = [ENGINE[i] for i in range(250)]


def same(a: SyntheticWord, b: SyntheticWord) -> bool:
    arrays = (np.array_equal(a.image, b.image), np.array_equal(a.mask, b.mask), np.array_equal(a.boxes, b.boxes))
    return all(arrays) and (a.label, a.text) == (b.label, b.text)


def test_a_word_depends_on_seed_and_index_alone() -> None:
    copy = loads(dumps(SyntheticWords(fonts=FONTS)))
    assert all(same(copy[i], WORDS[i]) for i in (200, 3, 7, 3))
    other = SyntheticWords(fonts=FONTS, seed=1)
    assert not any(same(other[i], WORDS[i]) for i in range(5))


def test_shapes_and_labels() -> None:
    for word in WORDS:
        assert word.image.shape == word.mask.shape == (32, 100)
        assert word.image.dtype == word.mask.dtype == np.uint8
        assert word.label == re.sub("[^0-9a-z]", "", word.text.lower()) != ""
        assert word.boxes.shape == (len(word.label), 4)
        assert word.boxes.dtype == np.float32
        assert (word.boxes >= 0).all()
        assert (word.boxes[:, :2] + word.boxes[:, 2:] <= [100.01, 32.01]).all()


def test_text_stands_out() -> None:
    for word in WORDS:
        weight = word.mask / 255
        text, rest = (np.average(word.image, weights=w) for w in (weight, 1 - weight))
        assert abs(text - rest) >= LEAST_CONTRAST - 1e-3, word.text


def test_boxes_hold_their_characters() -> None:
    """The mask's ink lies in the boxes, and each box holds some."""
    for word in WORDS:
        inside = np.zeros((32, 100), bool)
        for x, y, w, h in word.boxes:
            part = slice(int(y), int(np.ceil(y + h))), slice(int(x), int(np.ceil(x + w)))
            assert word.mask[part].max() > 40, word.text
            inside[part] = True
        if word.text.isalnum():
            inside |= np.roll(inside, 2, 1) | np.roll(inside, -2, 1) | np.roll(inside, 1, 0) | np.roll(inside, -1, 0)
            assert word.mask[inside].sum() > 0.97 * word.mask.sum(), word.text


def test_the_ratio_is_kept_on_request() -> None:
    engine = SyntheticWords(["i", "mmm"], FONTS, width=None, height=24)
    widths = {word.label: word.image.shape[1] for word in (engine[i] for i in range(200)) if word.text.isalpha()}
    assert widths["mmm"] > 2 * widths["i"] >= 2 * 16
    assert engine[0].image.shape[0] == engine[0].mask.shape[0] == 24


def test_marks_are_labelled_where_the_charset_has_them() -> None:
    engine = SyntheticWords(["a"], FONTS, characters="aA.,!?:;'\"()%$#@-&/0123456789")
    words = [engine[i] for i in range(60)]
    assert any(not word.label.isalnum() for word in words)
    assert all(word.label == word.text for word in words if set(word.text) <= set(engine.charset.characters))


def test_no_word_is_drawn_in_a_font_without_its_glyphs() -> None:
    with pytest.raises(ValueError, match="no font drew a word"):
        SyntheticWords(["漢"], FONTS, characters="漢")[0]
    engine = SyntheticWords(["ж"], [TTF / "STIXGeneral.ttf", *FONTS], characters="ж")
    assert engine[0].mask.max() > 100


def test_backgrounds_lie_under_some_words() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8).repeat(4), (32, 12))
    engine = SyntheticWords(fonts=FONTS, backgrounds=[stripes])
    changed = sum(not same(engine[i], WORDS[i]) for i in range(60))
    assert changed >= 5  # a quarter at the least: the draws after that differ as well


def test_any_number_of_processes_renders_the_same(tmp_path: Path) -> None:
    one = render_words(300, ENGINE, workers=1, cache=tmp_path / "words.npz", masks=True)
    two = render_words(300, ENGINE, workers=2)
    read = render_words(300, ENGINE, cache=tmp_path / "words.npz", masks=True)
    assert one.images.shape == one.masks.shape == (300, 32, 100)
    assert two.masks is None
    for other in (two, read):
        np.testing.assert_array_equal(one.images, other.images)
        assert one.labels == other.labels
        assert all(np.array_equal(a, b) for a, b in zip(one.boxes, other.boxes, strict=True))
    np.testing.assert_array_equal(one.masks, read.masks)
    np.testing.assert_array_equal(one.images[:250], [word.image for word in WORDS])


def test_a_cache_of_other_words_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "words.npz"
    engine = SyntheticWords(fonts=FONTS, width=None)
    drawn = render_words(3, engine, 1, cache)
    kept = render_words(3, engine, 1, cache)
    assert [image.shape for image in drawn.images] == [image.shape for image in kept.images]
    with pytest.raises(ValueError, match="drawn with seed 0, now 5"):
        render_words(3, SyntheticWords(fonts=FONTS, width=None, seed=5), 1, cache)
    with pytest.raises(ValueError, match="drawn with count 3, now 4"):
        render_words(4, engine, 1, cache)
    cache.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no file of synthetic words"):
        render_words(3, engine, 1, cache)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"height": 2}, {"fonts": []}, {"words": []}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|empty"):
        SyntheticWords(**{"fonts": FONTS, **wrong})


def test_text_is_taken_out_of_backgrounds() -> None:
    picture = np.full((32, 90), 100, np.uint8)
    picture[8:24, 20:40] = 255
    image = Image.fromarray(picture)
    full = np.array([[0, 0, 90, 32]])
    boxes = [full, np.array([[20, 8, 20, 16]])]
    crops: Any = type("Crops", (), {"boxes": boxes, "open": lambda self, i: image, "__len__": lambda self: 2})()
    (background,) = backgrounds_from(crops, 5)  # the first is all text
    np.testing.assert_allclose(background, 100, atol=1)
    crops.boxes = None
    with pytest.raises(ValueError, match="no character boxes"):
        backgrounds_from(crops, 5)
