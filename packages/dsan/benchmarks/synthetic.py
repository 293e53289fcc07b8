"""Synthetic words for each second of one core, beside the generator people use today (trdg).

Both draw the same texts in the same fonts, 32 pixels high, in one process, in turns; CPU seconds. trdg draws dark text on a
noisy background, tilted by up to 5 degrees and blurred by up to 1 pixel; in the second row it is bent at random as well. That is
less for an image: no masks, boxes, outlines, shadows, perspective, light, JPEG or low resolution.

    uv run --group peers python packages/dsan/benchmarks/synthetic.py [--count 1000] [--rounds 3] [--fonts FOLDER] [--words FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from dsan import SyntheticWords
from dsan.fonts import find_fonts
from dsan.vocabulary import read_words
from papercore.lab.report import markdown_table
from papercore.lab.study import machine, versions
from PIL import Image, ImageDraw, ImageFont
from trdg.generators import GeneratorFromStrings


def getsize(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """What Pillow 10 took away and trdg still calls."""
    box = font.getbbox(text)
    return int(box[2]), int(box[3])


def rate(draw: Callable[[], object], count: int) -> float:
    """Images in a CPU second."""
    started = time.process_time()
    for _ in range(count):
        draw()
    return count / (time.process_time() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fonts")
    parser.add_argument("--words")
    arguments = parser.parse_args()
    ImageFont.FreeTypeFont.getsize = getsize  # type: ignore[attr-defined]
    ImageDraw.ImageDraw.textsize = lambda self, text, font: getsize(font, text)  # type: ignore[attr-defined]
    Image.ANTIALIAS = Image.Resampling.LANCZOS  # type: ignore[attr-defined]
    engine = SyntheticWords(read_words(arguments.words) if arguments.words else None, find_fonts(arguments.fonts))
    numbers = iter(range(10**9))
    texts = [engine[next(numbers)].text for _ in range(500)]
    fonts = [str(font) for font in engine.fonts]
    tilted = GeneratorFromStrings(texts, fonts, skewing_angle=5, random_skew=True, blur=1, random_blur=True)
    wavy = GeneratorFromStrings(
        texts,
        fonts,
        skewing_angle=5,
        random_skew=True,
        blur=1,
        random_blur=True,
        distorsion_type=3,
        distorsion_orientation=2,
    )
    contestants = {
        "ours": lambda: engine[next(numbers)],
        "trdg, tilted and blurred": lambda: next(tilted),
        "trdg, also bent": lambda: next(wavy),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(arguments.rounds + 1):
        for name, draw in contestants.items():
            measured = rate(draw, arguments.count)
            if turn:  # the first warms up
                rates[name].append(measured)
    print(machine(), versions("dsan"), f"{len(fonts)} fonts")
    ours = median(rates["ours"])
    rows = [[name, f"{median(seen):.0f}", f"{ours / median(seen):.1f}"] for name, seen in rates.items()]
    print(f"\n### words drawn in a CPU second\n\n{markdown_table(['', 'images / s', 'ours / it'], rows)}")
