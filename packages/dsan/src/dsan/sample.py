"""A sample without data of one's own: rendered words, the same everywhere up to the fonts' and libraries' versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import get_data_path

from dsan.images import Size
from dsan.synthetic import RenderedWords, SyntheticWords, render_words
from dsan.words import Words

TRAIN, TEST = 8000, 500
FONTS = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralBol",
]


def sample_words(size: Size) -> tuple[Words, Words]:
    """Words to train on and other drawings of such words to judge on, in fonts that matplotlib ships."""
    fonts = [Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf" for name in FONTS]
    engine = SyntheticWords(fonts=fonts, height=size.height, width=None if size.keep_ratio else size.width)
    drawn = render_words(TRAIN + TEST, engine)
    return _words(drawn, slice(TRAIN), size), _words(drawn, slice(TRAIN, None), size)


def _words(drawn: RenderedWords, part: slice, size: Size) -> Words:
    images = [np.broadcast_to(image, (size.channels, *image.shape)) for image in drawn.images[part]]
    return Words.from_arrays(images, drawn.labels[part], drawn.boxes[part])
