"""Words on signs, drawn by code: a deterministic endless sequence of grey crops with labels, text masks and character boxes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage
from tqdm.auto import tqdm

from dsan.charset import ALPHANUMERIC, CTCCharset
from dsan.fonts import covers, find_fonts
from dsan.vocabulary import Vocabulary
from dsan.warp import Warp

if TYPE_CHECKING:
    from dsan.readers import Crops

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

VERSION = 1  # of the pictures: a cache of another one is refused
EM = 44  # pixels of a font's em where glyphs are drawn; later it gets smaller
PAD = 14  # pixels around the text for outlines and shadows
NEIGHBOUR = "abcdefghinoprstuwABDEHILMNORSTUW0123456789"
LEAST_CONTRAST = 30  # grey levels
Bicubic = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class SyntheticWord:
    """A drawn crop.

    ``image`` uint8 (height, width), grey; ``label`` in the charset; ``text`` as drawn, with its case and marks; ``mask`` uint8
    (height, width), 255 where the word's ink is; ``boxes`` float32 (len(label), 4): x, y, width, height in pixels.
    """

    image: Bytes
    label: str
    text: str
    mask: Bytes
    boxes: Floats


class SyntheticWords:
    """``engine[i]`` for any i >= 0 is a :class:`SyntheticWord`, the same in any order and process for the same arguments.

    What is drawn: fonts stretched, thickened, slanted and spaced; capitals of two sizes; a perspective view, one word in seven
    on an arc; outlines, shadows and hollow letters; plain, shaded, cloudy or photographed backgrounds; parts of neighbouring
    letters, lines and edges at the rim; then noise, blur, low resolution and JPEG. The mean grey of the text and that of the rest
    differ by 30 levels of 255 at least. All shares are ours, chosen beside real training crops.

    Args:
        words: what to say, besides numbers and random strings. None: :func:`dsan.vocabulary.builtin_words`.
        fonts: font files. None: :func:`dsan.fonts.find_fonts`. A font without one of a text's glyphs is not used for it.
        seed: 0 or more.
        height: of the crops, pixels.
        width: of the crops, pixels, to which they are stretched. None: the ratio of the drawn word is kept, at least 16 pixels.
        characters: the charset of the labels.
        backgrounds: grey uint8 arrays, one of which lies under every fourth word; see :func:`backgrounds_from`.

    Raises:
        ValueError: for no words, no fonts, a negative seed, or characters that none of the fonts draws.

    Example:
        >>> engine = SyntheticWords(["harbour", "kitchen"], seed=1)
        >>> word = engine[1_000_000]
        >>> word.image.shape, word.boxes.shape == (len(word.label), 4)
        ((32, 100), True)
    """

    def __init__(
        self,
        words: Sequence[str] | None = None,
        fonts: Sequence[Path] | None = None,
        *,
        seed: int = 0,
        height: int = 32,
        width: int | None = 100,
        characters: str = ALPHANUMERIC,
        backgrounds: Sequence[Bytes] | None = None,
    ) -> None:
        if seed < 0 or height < 8 or (width is not None and width < 8):
            raise ValueError(f"expected seed >= 0 and sides >= 8, got seed {seed}, height {height}, width {width}")
        self.vocabulary = Vocabulary(words)
        self.fonts = find_fonts() if fonts is None else [Path(font) for font in fonts]
        if not self.fonts:
            raise ValueError("the list of fonts is empty: leave it out, or name some")
        self._files = [str(font) for font in self.fonts]  # quicker keys than Paths
        self.seed, self.height, self.width = seed, height, width
        self.charset = CTCCharset(characters)
        self.backgrounds = list(backgrounds or ())
        self._pieces: dict[str, str] = {}

    def options(self) -> dict[str, str]:
        """All that decides the pictures, as text: words, fonts and backgrounds by their hash."""
        parts = {
            "words": "\n".join(self.vocabulary.words).encode(),
            "fonts": b"".join(font.read_bytes() for font in self.fonts),
            "backgrounds": b"".join(repr(b.shape).encode() + b.tobytes() for b in self.backgrounds),
        }
        hashes = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}
        size = f"{self.height} x {self.width or 'any'}"
        plain = {"version": VERSION, "seed": self.seed, "size": size, "characters": self.charset.characters}
        return {**{name: str(value) for name, value in plain.items()}, **hashes}

    def __getitem__(self, index: int) -> SyntheticWord:
        if index < 0:
            raise IndexError(f"the sequence has no end to count from, got index {index}")
        random = Random(self.seed << 44 | index)
        text, pieces, font = self._choose(random)
        flat = _lay_out(random, text, font)
        view, size = _view(random, flat)
        image, mask = _paint(random, flat, view, size, self._background(random))
        degraded = _degrade(random, image)
        width = self.width or max(16, math.ceil(self.height * size[0] / size[1]))
        final = np.asarray(Image.fromarray(degraded).resize((width, self.height), Bicubic))
        final_mask = np.asarray(mask.resize((width, self.height), Image.Resampling.BILINEAR))
        kept = [k for k, piece in enumerate(pieces) for _ in piece]
        scale = np.tile([width / size[0], self.height / size[1]], 2)
        boxes = (_boxes(view, flat.boxes[kept], size) * scale).astype(np.float32)
        return SyntheticWord(_separate(final, final_mask), "".join(pieces), text, final_mask, boxes)

    def _choose(self, random: Random) -> tuple[str, list[str], str]:
        """A text with something to read, what each of its characters is in the label, and a font that draws them all."""
        for _ in range(100):
            text = self.vocabulary.draw(random)
            pieces = [self._piece(character) for character in text]
            if any(pieces):
                for font in random.sample(self._files, min(3, len(self._files))):
                    if covers(font, text):
                        return text, pieces, font
        raise ValueError(
            f"after 100 tries no font drew a word of the charset; the last was {text!r}: add fonts or words"
        )

    def _piece(self, character: str) -> str:
        if character not in self._pieces:
            self._pieces[character] = self.charset.normalize(character)
        return self._pieces[character]

    def _background(self, random: Random) -> Bytes | None:
        return random.choice(self.backgrounds) if self.backgrounds and random.random() < 0.25 else None


# Glyphs, each drawn once.


@lru_cache(maxsize=1024)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=2**14)
def _glyph(file: str, size: int, character: str) -> tuple[Bytes, int, int]:
    """Its ink, and where its left and top are seen from the pen on the baseline."""
    font = _font(file, size)
    left, top, right, bottom = (round(side) for side in font.getbbox(character, anchor="ls"))
    image = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), character, 255, font, anchor="ls")
    return np.asarray(image), left, top


@lru_cache(maxsize=2**16)
def _advance(file: str, size: int, character: str, following: str) -> float:
    font = _font(file, size)
    return font.getlength(character + following) - font.getlength(following)


# The word, flat.


@dataclass(frozen=True)
class _Flat:
    """A word before the view of it: ``word`` and ``others`` (neighbours, underline) in ink, 0 to 255; ``boxes`` (n, 4) left, top,
    right, bottom of each character; ``margins`` left, top, right, bottom to be seen around the text, pixels; ``decor`` behind."""

    word: Bytes
    others: Bytes | None
    decor: Bytes | None
    boxes: NDArray[np.float64]
    margins: list[float]


def _lay_out(random: Random, text: str, font: str) -> _Flat:
    sizes = [EM] * len(text)
    if len(text) > 1 and text.isupper() and random.random() < 0.2:  # capitals of two sizes
        sizes = [EM] + [round(EM * random.choice((0.72, 0.8, 0.86)))] * (len(text) - 1)
    kind = random.random()
    tracking = 0.0 if kind < 0.65 else EM * (random.uniform(-0.06, 0.12) if kind < 0.93 else random.uniform(0.12, 0.6))
    dance = random.randint(1, 5) if random.random() < 0.05 else 0
    pen, placed, boxes = 0.0, [], []
    for k, (character, size) in enumerate(zip(text, sizes, strict=True)):
        ink, left, top = _glyph(font, size, character)
        x, y = round(pen) + left, top + (random.randint(-dance, dance) if dance else 0)
        placed.append((ink, x, y))
        boxes.append((x, y, x + ink.shape[1], y + ink.shape[0]))
        pen += _advance(font, size, character, text[k + 1 : k + 2]) + tracking
    left, top = (min(box[side] for box in boxes) for side in (0, 1))
    right, bottom = (max(box[side] for box in boxes) for side in (2, 3))
    tall = bottom - top
    margins = [random.uniform(-0.02, 0.28) * tall, random.uniform(-0.01, 0.3) * tall]
    margins += [random.uniform(-0.02, 0.28) * tall, random.uniform(-0.01, 0.3) * tall]
    neighbours = _neighbours(random, font, (left, top, right, bottom), margins) if random.random() < 0.12 else []
    pad = EM + PAD if neighbours else PAD
    shape = (tall + 2 * pad, right - left + 2 * pad)
    word = _ink(shape, placed, pad - left, pad - top)
    others = _ink(shape, neighbours, pad - left, pad - top) if neighbours else None
    if random.random() < 0.05:
        others = np.zeros(shape, np.uint8) if others is None else others
        line, thick = pad - top + random.randint(3, 8), random.randint(1, 4)
        others[line : line + thick, random.choice((0, pad)) :] = 255
    word, decor = _decorate(random, word)
    return _Flat(word, others, decor, np.array(boxes, dtype=float) + [pad - left, pad - top] * 2, margins)


def _ink(shape: tuple[int, int], placed: list[tuple[Bytes, int, int]], left: int, top: int) -> Bytes:
    canvas = np.zeros(shape, np.uint8)
    for ink, x, y in placed:
        x, y = x + left, y + top
        part = canvas[max(y, 0) : max(0, y + ink.shape[0]), max(x, 0) : max(0, x + ink.shape[1])]
        cut = ink[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]]
        np.maximum(part, cut, out=part)
    return canvas


def _neighbours(
    random: Random, font: str, text: tuple[int, int, int, int], margins: list[float]
) -> list[tuple[Bytes, int, int]]:
    """Glyphs of the next word or line, and the margin on their side widened so that a part of them is seen."""
    left, top, right, bottom = text
    side = random.randrange(4)
    gap, seen = random.uniform(0.12, 0.35) * EM, random.uniform(0.03, 0.22) * EM
    margins[side] = gap + seen
    if side in (0, 2):
        ink, _, y = _glyph(font, EM, random.choice(NEIGHBOUR))
        return [(ink, round(right + gap) if side == 2 else round(left - gap) - ink.shape[1], y)]
    placed, pen = [], float(left - random.randint(0, EM))
    base = round(top - gap) if side == 1 else round(bottom + gap)
    while pen < right + EM:
        character = random.choice(NEIGHBOUR)
        ink, x, _ = _glyph(font, EM, character)
        placed.append((ink, round(pen) + x, base - ink.shape[0] if side == 1 else base))
        pen += _advance(font, EM, character, "")
    return placed


def _spread(ink: Bytes, x: int, y: int) -> Bytes:
    """The largest of the values within x and y pixels."""
    for axis, reach in ((1, x), (0, y)):
        for _ in range(reach):
            wide = ink.copy()
            a, b = (wide.T, ink.T) if axis else (wide, ink)
            np.maximum(a[1:], b[:-1], out=a[1:])
            np.maximum(a[:-1], b[1:], out=a[:-1])
            ink = wide
    return ink


def _shifted(ink: Bytes, x: int, y: int) -> Bytes:
    moved = np.zeros_like(ink)
    height, width = ink.shape
    moved[max(y, 0) : height + min(y, 0), max(x, 0) : width + min(x, 0)] = ink[
        max(-y, 0) : height - max(y, 0), max(-x, 0) : width - max(x, 0)
    ]
    return moved


def _decorate(random: Random, word: Bytes) -> tuple[Bytes, Bytes | None]:
    """The word's own ink, thickened, worn or hollow; and what lies behind it: an outline, a shadow, a glow."""
    if random.random() < 0.22:
        word = _spread(word, random.randint(0, 2), random.randint(0, 1))
    if random.random() < 0.04:  # worn paint
        holes = _noise(random, (word.shape[0] // 3 + 1, word.shape[1] // 3 + 1)) > random.uniform(1.0, 2.0)
        word = np.where(holes.repeat(3, 0).repeat(3, 1)[: word.shape[0], : word.shape[1]], 0, word).astype(np.uint8)
    kind = random.random()
    if kind < 0.035:  # hollow
        return np.minimum(_spread(word, 2, 2), 255 - word), None
    if kind < 0.135:
        reach = random.randint(1, 4)
        return word, _spread(word, reach, reach)
    if kind < 0.26:
        x, y = random.choice((-1, 1)) * random.randint(0, 5), random.choice((-1, 1, 1)) * random.randint(1, 5)
        shadow = _shifted(word, x, y)
        if random.random() < 0.4:  # a solid one
            shadow = np.maximum(
                shadow, np.maximum(_shifted(word, x // 2, y // 2), _shifted(word, x * 3 // 4, y * 3 // 4))
            )
        elif random.random() < 0.5:
            shadow = np.asarray(Image.fromarray(shadow).filter(ImageFilter.BoxBlur(random.uniform(1, 3))))
        return word, shadow
    if kind < 0.29:
        return word, np.asarray(Image.fromarray(_spread(word, 3, 3)).filter(ImageFilter.BoxBlur(4)))
    return word, None


# The view of it.


def _corners(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4) left, top, right, bottom -> (4 n, 2)"""
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)


def _view(random: Random, flat: _Flat) -> tuple[Warp, tuple[int, int]]:
    """From the flat word to a crop around it, and the crop's width and height."""
    left, top = flat.boxes[:, :2].min(0).tolist()
    right, bottom = flat.boxes[:, 2:].max(0).tolist()
    wide, tall = right - left, bottom - top
    angle = math.radians(random.gauss(0, 2.2) if random.random() < 0.88 else random.gauss(0, 9))
    shear = random.gauss(0, 0.05) if random.random() < 0.85 else random.uniform(-0.15, 0.4)
    stretch = min(1.6, max(0.5, math.exp(random.gauss(-0.1, 0.2))))
    curvature = 0.0
    if wide > 2 * tall and random.random() < 0.14:
        curvature = random.choice((-1, 1, 1)) * random.uniform(0.2, 1.2) / wide
    matrix = np.array([[stretch, -shear, 0], [0, 1, 0], [0, 0, 1]])
    matrix = (
        np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]) @ matrix
    )
    if random.random() < 0.5:
        matrix[2, :2] = random.gauss(0, 0.07) * 2 / max(wide, tall), random.gauss(0, 0.05) / tall
    warp = Warp(((left + right) / 2, (top + bottom) / 2), curvature, matrix)
    seen = warp.forward(_corners(flat.boxes))
    margins = flat.margins
    (x0, y0), (x1, y1) = seen.min(0) - margins[:2], seen.max(0) + margins[2:]
    narrow = random.uniform(0.5, 0.8) * (y1 - y0) - (x1 - x0)
    if narrow > 0:  # a lone I
        x0, x1 = x0 - narrow / 2, x1 + narrow / 2
    height = round(min(48, max(13, 30 * math.exp(random.gauss(0, 0.42)))))
    scale = height / (y1 - y0)
    width = max(8, round(scale * (x1 - x0)))
    return warp.cropped(x0, y0, width / (x1 - x0), scale), (width, height)


def _boxes(view: Warp, boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """(n, 4) x, y, width, height in the crop, of boxes in the flat word, cut at the crop's sides."""
    corners = np.clip(view.forward(_corners(boxes)), 0, size).reshape(-1, 4, 2)
    first = corners.min(1)
    return np.concatenate([first, corners.max(1) - first], axis=1)


# The picture.


@lru_cache(maxsize=1)
def _bank() -> Floats:
    """Standard normal numbers, from which noise is cut: ten times as fast as drawing it."""
    return np.random.default_rng(0).standard_normal(2**20, dtype=np.float32)


def _noise(random: Random, shape: tuple[int, int]) -> Floats:
    count = shape[0] * shape[1]
    start = random.randrange(2**20 - count)
    return _bank()[start : start + count].reshape(shape)


def _smooth(random: Random, size: tuple[int, int], cells: int) -> Floats:
    """Noise of a grid of ``cells`` by cells times the ratio, bicubic between them; about standard normal."""
    grid = _noise(random, (cells, max(2, min(40, cells * size[0] // size[1]))))
    return np.asarray(Image.fromarray(grid).resize(size, Bicubic))


def _tones(random: Random) -> tuple[float, float]:
    """Grey of the background and of the text: many dark and many light backgrounds, contrast 35 to 255."""
    kind = random.random()
    ground = (
        random.uniform(0, 40) if kind < 0.2 else random.uniform(215, 265) if kind < 0.42 else random.uniform(0, 255)
    )
    ground = min(ground, 255)
    lighter = random.random() < (0.7 if ground < 128 else 0.3) if 60 < ground < 195 else ground < 128
    room = 255 - ground if lighter else ground
    contrast = min(room, max(40, room * random.uniform(0.35, 1.4)))
    return ground, ground + contrast if lighter else ground - contrast


def _paint(
    random: Random, flat: _Flat, view: Warp, size: tuple[int, int], photo: Bytes | None
) -> tuple[Floats, Image.Image]:
    """The crop in grey, 0 to 255 and maybe beyond, and the word's mask."""
    ground, tone = _tones(random)
    clean = random.random() < 0.35  # print, not a photograph
    picture = np.full((size[1], size[0]), ground, np.float32)
    if not clean:
        _texture(random, picture, abs(tone - ground), photo)

    def warped(ink: Bytes) -> Image.Image:
        return view.apply(Image.fromarray(ink), size)

    if flat.decor is not None:
        behind = tone
        while abs(behind - tone) < 40:
            behind = random.uniform(0, 255)
        picture += (behind - picture) * (np.asarray(warped(flat.decor), np.float32) / 255)
    mask = warped(flat.word)
    ink = np.asarray(mask if flat.others is None else warped(np.maximum(flat.word, flat.others)), np.float32) / 255
    colour: float | Floats = tone
    if random.random() < 0.1:  # paint that runs from one tone to another
        colour = tone + (tone - ground) * np.linspace(0, random.uniform(-0.6, 0.4), size[1], dtype=np.float32)[:, None]
    picture += (colour - picture) * ink
    if not clean and random.random() < 0.45:  # light from one side
        x, y = (random.uniform(-0.25, 0.25) for _ in range(2))
        light = np.linspace(-x, x, size[0], dtype=np.float32) + np.linspace(-y, y, size[1], dtype=np.float32)[:, None]
        picture *= 1 + light
    if not clean:
        picture += _noise(random, (size[1], size[0])) * random.uniform(0, min(9.0, abs(tone - ground) / 10))
    return picture, mask


def _texture(random: Random, picture: Floats, contrast: float, photo: Bytes | None) -> None:
    """Add what is on a background: a photograph, clouds of two sizes, the edge of a sign."""
    height, width = picture.shape
    limit = contrast / 4  # of the texture's standard deviation, or the word would drown
    if photo is not None:
        rows, columns = photo.shape
        part = (random.uniform(0, columns / 3), random.uniform(0, rows / 3))
        box = (*part, random.uniform(columns / 2, columns), random.uniform(rows / 2, rows))
        texture = np.asarray(Image.fromarray(photo).resize((width, height), Bicubic, box), np.float32)
        texture = texture - texture.mean()
        picture += texture * min(1, limit / max(1, float(texture.std())))
    elif random.random() < 0.5:
        amplitude = min(random.uniform(0, 18) if random.random() < 0.8 else random.uniform(20, 60), limit)
        picture += amplitude * _smooth(random, (width, height), random.randint(2, 4))
        if random.random() < 0.5:
            picture += 0.6 * amplitude * _smooth(random, (width, height), random.randint(6, 14))
    if random.random() < 0.12:  # the edge of a sign
        across = random.random() < 0.7
        length = height if across else width
        cut = random.uniform(0.02, 0.1) * length + random.uniform(-0.05, 0.05) * np.arange(width if across else height)
        away = np.arange(length, dtype=np.float32)
        away = away[::-1] if random.random() < 0.5 else away
        outside = np.clip((cut[None, :] if across else cut[:, None]) - (away[:, None] if across else away), 0, 1)
        picture += (random.uniform(0, 255) - picture) * outside.astype(np.float32)


def _degrade(random: Random, picture: Floats) -> Bytes:
    """What lens, sensor and file do."""
    image = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    width, height = image.size
    kind = random.random()
    if kind < 0.24:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.0) * height / 32))
    elif kind < 0.29:  # motion
        reach = random.uniform(0.4, 1.3) * height / 32
        image = image.filter(ImageFilter.BoxBlur((reach, 0) if random.random() < 0.6 else (0, reach)))
    if height > 18 and random.random() < 0.1:  # enlarged from fewer pixels
        share = random.uniform(13 / height, 0.8)
        few = image.resize((max(4, round(width * share)), round(height * share)), Bicubic)
        image = few.resize((width, height), Bicubic)
    if random.random() < 0.4:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=random.randint(25, 90))
        image = Image.open(file)
    return np.asarray(image)


def _separate(image: Bytes, mask: Bytes) -> Bytes:
    """The crop, its text moved away from the background where their means differ by less than LEAST_CONTRAST."""
    weight = mask.astype(np.float32) / 255
    inside, outside = weight / max(float(weight.sum()), 1e-6), (1 - weight) / float((1 - weight).sum())
    for _ in range(10):  # mostly none or one, more where pixels clip
        difference = float((image * (inside - outside)).sum())
        if abs(difference) >= LEAST_CONTRAST:
            break
        missing = (LEAST_CONTRAST + 2 - abs(difference)) / max(float((weight * (inside - outside)).sum()), 0.1)
        step = math.copysign(min(missing, 60), difference)
        room = 0 <= float((image * inside).sum()) + step <= 255
        moved = image + step * (weight if room else weight - 1)
        image = np.clip(moved, 0, 255).round().astype(np.uint8)
    return image


# Many of them.


class RenderedWords(NamedTuple):
    """``images`` uint8 (n, height, width), or a list of (height, w) if the engine keeps ratios; ``masks`` alike, if asked for."""

    images: Any
    labels: list[str]
    masks: Any
    boxes: list[Floats]


def render_words(
    count: int,
    engine: SyntheticWords,
    workers: int | None = None,
    cache: str | Path | None = None,
    masks: bool = False,
) -> RenderedWords:
    """The first ``count`` words of ``engine``, drawn by ``workers`` processes (None: one for each core); the same for any number.

    ``cache`` names an .npz file to read them from, or to keep them in if there is none yet. 10,000 crops of 32 x 100 take 32 MB.

    Raises:
        ValueError: for a count below 1, or if ``cache`` was written for other options or is no such file.
    """
    if count < 1:
        raise ValueError(f"expected at least one word to draw, got {count}")
    about = {**engine.options(), "count": str(count), "masks": str(masks)}
    if cache is not None and Path(cache).exists():
        return _load(Path(cache), about)
    drawn = list(
        tqdm(_draw(count, engine, workers), "synthesis", count, unit="word", dynamic_ncols=True, mininterval=1)
    )
    pack: Any = list if engine.width is None else np.stack
    kept = pack([word[2] for word in drawn]) if masks else None
    words = RenderedWords(pack([word[0] for word in drawn]), [word[1] for word in drawn], kept, [w[3] for w in drawn])
    if cache is not None:
        _save(Path(cache), about, words)
    return words


Drawn = tuple[Bytes, str, Bytes, Floats]
_engine: SyntheticWords


def _start(engine: SyntheticWords) -> None:
    global _engine
    _engine = engine


def _chunk(numbers: range) -> list[Drawn]:
    return [(word.image, word.label, word.mask, word.boxes) for word in map(_engine.__getitem__, numbers)]


def _draw(count: int, engine: SyntheticWords, workers: int | None) -> Iterator[Drawn]:
    chunks = [range(first, min(first + 256, count)) for first in range(0, count, 256)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    if workers == 1:
        _start(engine)
        for chunk in chunks:
            yield from _chunk(chunk)
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(engine,)) as pool:
        for drawn in pool.map(_chunk, chunks):
            yield from drawn


def _save(path: Path, about: dict[str, str], words: RenderedWords) -> None:
    """Crops side by side, so that those of different widths need no pickle."""
    arrays: dict[str, Any] = {
        "about": np.array(json.dumps(about)),
        "widths": np.array([image.shape[1] for image in words.images]),
        "images": np.concatenate(list(words.images), axis=1),
        "labels": np.array(words.labels),
        "boxes": np.concatenate(words.boxes),
    }
    if words.masks is not None:
        arrays["masks"] = np.concatenate(list(words.masks), axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)


def _load(path: Path, about: dict[str, str]) -> RenderedWords:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        known = json.loads(str(arrays["about"]))
    except (OSError, ValueError, KeyError, TypeError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no file of synthetic words ({error}): delete it, or name another") from None
    for key, value in about.items():
        if known.get(key) != value:
            raise ValueError(f"{path} was drawn with {key} {known.get(key)}, now {value}: delete it, or name another")
    labels = arrays["labels"].tolist()
    widths, lengths = np.cumsum(arrays["widths"])[:-1], np.cumsum([len(label) for label in labels])[:-1]

    def crops(pixels: Bytes) -> Any:
        split = np.split(pixels, widths, axis=1)
        return split if about["size"].endswith("any") else np.stack(split)

    masks = crops(arrays["masks"]) if "masks" in arrays else None
    return RenderedWords(crops(arrays["images"]), labels, masks, np.split(arrays["boxes"], lengths))


def backgrounds_from(crops: Crops, count: int) -> list[Bytes]:
    """Up to ``count`` grey crops without their text: the character boxes, a little widened, are filled from around them.

    Give training crops only: a network that has seen the background of a test word is judged too kindly.

    Args:
        crops: with boxes. count: the first so many, of those that keep a tenth of their pixels.

    Raises:
        ValueError: if the crops have no boxes.
    """
    if crops.boxes is None:
        raise ValueError(
            "the crops have no character boxes to take the text out by: expected X_chars.jsonl.gz beside X.zip"
        )
    backgrounds: list[Bytes] = []
    for position in range(len(crops)):
        if len(backgrounds) == count:
            break
        grey = np.asarray(crops.open(position).convert("L"), np.float32)
        known = np.ones_like(grey)
        more = 2 + grey.shape[0] // 12
        for x, y, width, height in crops.boxes[position].astype(int):
            known[max(0, y - more) : y + height + more, max(0, x - more) : x + width + more] = 0
        if known.mean() >= 0.1:
            backgrounds.append(_filled(grey, known))
    return backgrounds


def _filled(grey: Floats, known: Floats) -> Bytes:
    """Unknown pixels become means of known ones, from wider and wider around."""
    reach = 3
    while not known.all():
        weight = ndimage.uniform_filter(known, reach, mode="constant")
        mean = ndimage.uniform_filter(grey * known, reach, mode="constant") / np.maximum(weight, 1e-6)
        found = (known == 0) & (weight > 1e-4)
        grey, known = np.where(found, mean, grey), np.where(found, np.float32(1), known)
        reach = reach * 2 - 1
    return grey.astype(np.uint8)
