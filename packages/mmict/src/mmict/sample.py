"""A sample without data of one's own: rendered pictures of one or two coloured shapes, with captions or with questions.

It shows that the code runs. It is never the paper's data.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from mmict.samples import Samples

COLOURS = {
    "red": (205, 45, 45),
    "green": (45, 150, 60),
    "blue": (45, 80, 200),
    "yellow": (230, 200, 40),
    "purple": (135, 55, 165),
}
SHAPES = {  # corners, in -1 to 1 around the middle; a circle has none
    "circle": (),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "triangle": ((0, -1), (1, 1), (-1, 1)),
    "cross": (
        *((-1, -0.4), (-0.4, -0.4), (-0.4, -1), (0.4, -1), (0.4, -0.4), (1, -0.4)),
        *((1, 0.4), (0.4, 0.4), (0.4, 1), (-0.4, 1), (-0.4, 0.4), (-1, 0.4)),
    ),
}
SIZES = {"small": 0.11, "large": 0.21}  # half a shape's side, as a share of the picture's
LAYOUTS = {  # where the middles are
    "{}": ((0.5, 0.5),),
    "{} above {}": ((0.5, 0.26), (0.5, 0.74)),
    "{} left of {}": ((0.26, 0.5), (0.74, 0.5)),
}
JITTER = 0.04  # of the middles, at most
OVERSAMPLING = 3
Thing = tuple[str, str, str]  # size, colour, shape


def render_shapes(count: int, seed: int = 0, size: int = 48, questions: bool = False) -> Samples:
    """Pictures of one or two shapes, drawn at random; two differ in colour and in shape.

    A caption says all that is in a picture, so that samples with the same shapes in the same layout are a group.

    Args:
        count: samples, each with a picture of its own. seed: of all that is random; the first n samples are the same for every
            count of at least n.
        size: side, pixels.
        questions: of colour, shape, number, or yes and no, instead of captions.

    Raises:
        ValueError: for a negative count, or a size below 16.

    >>> render_shapes(2).texts
    ['a large purple cross', 'a large blue circle']
    """
    if count < 0 or size < 16:
        raise ValueError(f"expected a count of at least 0 and a size of at least 16, got {count} and {size}")
    rng = np.random.RandomState(seed)  # numpy keeps its numbers; a Generator's may change
    images, captions, asked = [], [], []
    for _ in range(count):
        layout = list(LAYOUTS)[rng.randint(len(LAYOUTS))]
        middles = LAYOUTS[layout]
        parts = (rng.permutation(list(COLOURS)), rng.permutation(list(SHAPES)))
        things = [
            (list(SIZES)[rng.randint(len(SIZES))], str(colour), str(shape))
            for _, colour, shape in zip(middles, *parts, strict=False)
        ]
        images.append(_draw(rng, things, middles, size))
        captions.append(layout.format(*("a " + " ".join(thing) for thing in things)))
        asked.append(_ask(rng, things))
    texts = [answer for _, answer in asked] if questions else captions
    return Samples(
        images,
        [(i,) for i in range(count)],
        texts,
        [question if questions else "" for question, _ in asked],
        captions,
        [f"shapes-{seed}-{i}" for i in range(count)],
        [[text] for text in texts],
    )


def _draw(
    rng: np.random.RandomState, things: list[Thing], middles: tuple[tuple[float, float], ...], size: int
) -> np.ndarray:
    side = OVERSAMPLING * size
    picture = Image.new("RGB", (side, side), tuple(rng.randint(200, 250, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for (extent, colour, shape), middle in zip(things, middles, strict=True):
        place = np.array(middle) + rng.uniform(-JITTER, JITTER, 2)
        corners = (np.array(SHAPES[shape] or SHAPES["square"]) * SIZES[extent] + place) * side
        if SHAPES[shape]:
            draw.polygon([tuple(corner) for corner in corners], COLOURS[colour])
        else:
            draw.ellipse([*corners.min(0), *corners.max(0)], COLOURS[colour])
    return np.asarray(picture.reduce(OVERSAMPLING))


def _ask(rng: np.random.RandomState, things: list[Thing]) -> tuple[str, str]:
    """A question that has one answer, and that answer."""
    _, colour, shape = things[rng.randint(len(things))]
    other_colour, other_shape = rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
    if rng.random_sample() < 0.5:
        other_colour, other_shape = colour, shape
    there = any((other_colour, other_shape) == thing[1:] for thing in things)
    kinds = [
        (f"what colour is the {shape}?", colour),
        (f"what shape is {colour}?", shape),
        ("how many shapes are there?", ("one", "two")[len(things) - 1]),
        (f"is there a {other_colour} {other_shape}?", "yes" if there else "no"),
    ]
    return kinds[rng.randint(len(kinds))]
