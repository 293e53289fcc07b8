"""The embedded sample: rendered scenes of coloured shapes, of which the true similarity of any two is known.

It shows that the code runs, and what many-to-many pairs are. It is never the paper's data: no figure of the paper is about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import permutations, product
from math import cos, pi, sin

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw

from softclip.readers import Pairs

COLOURS = {
    "red": (205, 45, 45),
    "green": (45, 150, 60),
    "blue": (45, 80, 200),
    "yellow": (235, 205, 40),
    "purple": (135, 55, 165),
    "orange": (240, 130, 30),
}
_STAR = [((0.4, 1)[i % 2 == 0] * sin(pi * i / 5), -(0.4, 1)[i % 2 == 0] * cos(pi * i / 5)) for i in range(10)]
SHAPES = {  # corners, in -1 to 1 around the middle; a circle has none
    "circle": [],
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _STAR,
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
}
CLASSES = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
MOST = 4  # objects
AGAIN = 0.25  # chance that an object is like one before
LARGE, SMALL = 0.24, 0.12  # half an object's side, as a share of the image's
OVERSAMPLING = 3
NOISE = 12  # of 255, at most
TEMPLATES = {  # by number of phrases
    1: ("{}", "a picture of {}", "{} and maybe more", "here you see {}"),
    2: ("{} and {}", "{} beside {}", "{} with {}", "a scene with {} and {}"),
    3: ("{}, {} and {}", "{} together with {} and {}", "a picture of {}, {} and {}"),
}
NUMBERS = {2: "two", 3: "three"}


def render_scenes(count: int, seed: int = 0, size: int = 64) -> Pairs:
    """Scenes of one to four objects, drawn at random: one large, which comes first and is the label, and small ones.

    A caption names one to three of the objects, so that it may be true of many scenes; the tags name all, each as "colour shape".
    Scenes with the same objects are a group, wherever the objects are.

    Args:
        count: scenes. seed: of all that is random; the first n scenes are the same for every count of at least n.
        size: side, pixels.

    Raises:
        ValueError: for a negative count, or a size below 16.

    >>> scenes = render_scenes(3)
    >>> scenes.captions[1], scenes.tags[1]
    ('three purple stars and maybe more', ['purple star', 'purple star', 'purple star'])
    >>> scenes.open(1).size, scenes.boxes[1].shape, scenes.classes[scenes.labels[1]]
    ((64, 64), torch.Size([3, 4]), 'purple star')
    """
    if count < 0 or size < 16:
        raise ValueError(f"expected a count of at least 0 and a size of at least 16, got {count} and {size}")
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), np.uint8)
    captions, kinds, boxes = [], [], []
    for i in range(count):
        centres, halves = _places(rng)
        kinds.append(_kinds(rng, len(halves)))
        images[i], drawn = _draw(rng, kinds[i], centres, halves, size)
        boxes.append(torch.tensor(drawn))
        captions.append(_caption(rng, kinds[i]))
    groups: dict[tuple[int, ...], int] = {}
    return Pairs(
        partial(_open, images),
        [f"scene {i} of seed {seed}" for i in range(count)],
        captions,
        [[CLASSES[kind] for kind in scene] for scene in kinds],
        boxes,
        groups=[groups.setdefault(tuple(sorted(scene)), len(groups)) for scene in kinds],
        labels=[scene[0] for scene in kinds],
        classes=CLASSES,
    )


def scene_similarity(scenes: Pairs) -> Float[np.ndarray, "n n"]:
    """How alike the objects of any two scenes are, 0 to 1; the truth that softened targets should come near.

    Objects are matched one to one, so that the sum is largest of 1 for the same colour and shape, 0.5 for one of them. It is
    divided by the number of objects of the scene that has more.

    >>> similarity = scene_similarity(render_scenes(50))
    >>> similarity.shape, bool((similarity.diagonal() == 1).all())
    ((50, 50), True)
    """
    number = {name: i for i, name in enumerate(CLASSES)}
    multisets, where = np.unique(
        [sorted(number[tag] for tag in tags) + [-1] * (MOST - len(tags)) for tags in scenes.tags or ()],
        axis=0,
        return_inverse=True,
    )
    where = where.ravel()  # numpy 2.0 gives a column
    colours, shapes = np.where(multisets < 0, -1, np.divmod(multisets, len(SHAPES)))

    def halves(i: int, j: int) -> np.ndarray:
        """Twice the similarity of the i-th objects to the j-th."""
        there = (multisets[:, i, None] >= 0) & (multisets[:, j] >= 0)
        alike = [there & (kind[:, i, None] == kind[:, j]) for kind in (colours, shapes)]
        return alike[0].astype(np.int8) + alike[1]

    pairs = [[halves(i, j) for j in range(MOST)] for i in range(MOST)]
    best = np.zeros((len(multisets),) * 2, np.int8)
    for order in permutations(range(MOST)):
        np.maximum(best, sum(pairs[i][j] for i, j in enumerate(order)), out=best)
    sizes = (multisets >= 0).sum(1)
    return (best / (2 * np.maximum(sizes[:, None], sizes)))[where][:, where]


def _kinds(rng: np.random.Generator, count: int) -> list[int]:
    """Classes of objects; some come again."""
    kinds = [int(rng.integers(len(CLASSES)))]
    while len(kinds) < count:
        again = rng.random() < AGAIN
        kinds.append(kinds[rng.integers(len(kinds))] if again else int(rng.integers(len(CLASSES))))
    return kinds


def _places(rng: np.random.Generator) -> tuple[list[np.ndarray], list[float]]:
    """Centres, and half the sides, of objects that hide no more than corners of each other."""
    halves = [LARGE] + [SMALL] * int(rng.integers(MOST))
    while True:
        centres: list[np.ndarray] = []
        for half in halves:
            for _ in range(30):
                centre = half + (1 - 2 * half) * rng.random(2)
                if all(np.abs(centre - c).max() > 0.9 * (half + h) for c, h in zip(centres, halves, strict=False)):
                    centres.append(centre)
                    break
            else:
                break
        if len(centres) == len(halves):
            return centres, halves


def _draw(
    rng: np.random.Generator, kinds: Sequence[int], centres: Sequence[np.ndarray], halves: Sequence[float], size: int
) -> tuple[np.ndarray, list[list[float]]]:
    """Pixels, and the objects' boxes."""
    side = OVERSAMPLING * size
    picture = Image.new("RGB", (side, side), tuple(rng.integers(190, 250, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    boxes = []
    for kind, (x, y), half in zip(kinds, centres, halves, strict=True):
        colour, shape = CLASSES[kind].split()
        fill = tuple((np.array(COLOURS[colour]) + rng.integers(-12, 13, 3)).clip(0, 255).tolist())
        corners = np.array(SHAPES[shape] or SHAPES["square"]) * half + (x, y)
        boxes.append([*corners.min(0).tolist(), *corners.max(0).tolist()])
        points = (corners * side).round()
        if shape == "circle":
            draw.ellipse([*points.min(0), *points.max(0)], fill)
        else:
            draw.polygon(list(map(tuple, points)), fill)
    pixels = np.asarray(picture.reduce(OVERSAMPLING))
    noise = rng.integers(-NOISE, NOISE, pixels.shape, np.int16, endpoint=True)
    return (pixels + noise).clip(0, 255).astype(np.uint8), boxes


def _caption(rng: np.random.Generator, kinds: Sequence[int]) -> str:
    """Of one to three of the objects; equal ones are counted."""
    named = rng.permutation(kinds)[: rng.integers(1, min(3, len(kinds)) + 1)]
    phrases = []
    for kind, times in Counter(named.tolist()).items():
        name = CLASSES[kind]
        article = "an" if name[0] in "aeiou" else "a"
        phrases.append(f"{article} {name}" if times == 1 else f"{NUMBERS[times]} {name}s")
    templates = TEMPLATES[len(phrases)]
    return templates[rng.integers(len(templates))].format(*phrases)


def _open(images: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(images[index])
