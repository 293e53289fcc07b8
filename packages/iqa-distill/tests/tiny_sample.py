"""A stand-in for the sample, made at once: 7 small pictures, 2 kinds of distortion, 3 levels."""

import numpy as np
import pytest
from iqa_distill import cli, sample, study, train_teacher
from iqa_distill.data import Rated, ReferencePool, hashes
from iqa_distill.images import Preprocessing, ScoreScale
from iqa_distill.pixels import Pixels
from iqa_distill.pool import SyntheticPool
from iqa_distill.readers import RatedImages


def references():
    """Random blocks of 8 x 8 pixels."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (7, 8, 9, 3), dtype=np.uint8)
    return {f"picture {i}": b.repeat(8, 0).repeat(8, 1) for i, b in enumerate(blocks)}


def ratings():
    random = np.random.default_rng(1)
    rows = [(name, kind, level) for name in references() for kind in ("noise", "dark") for level in (0.1, 0.4, 0.7)]
    images = []
    for name, kind, level in rows:
        worse = random.uniform(0, 255, (64, 72, 3)) if kind == "noise" else 0
        images.append(((1 - level) * references()[name] + level * worse).astype(np.uint8))
    names, kinds, levels = zip(*rows, strict=True)
    return RatedImages(
        names=[f"{name} {kind} {level}" for name, kind, level in rows], scores=100 - 100 * np.array(levels),
        references=list(names), splits=None, low=0.0, high=100.0, opener=images.__getitem__, distortions=list(kinds),
    )  # fmt: skip


def pieces(references, per_reference, *, crop, seed, cache):
    """Of a teacher's pool, without the real one's processes."""
    random = np.random.default_rng(seed)
    rows = np.repeat(np.arange(len(references)), per_reference)
    levels = random.uniform(0, 0.9, len(rows))
    images = [
        ((1 - level) * references[row][:crop, :crop]).astype(np.uint8) for row, level in zip(rows, levels, strict=True)
    ]
    labels = (levels.mean() - levels) / levels.std()
    return SyntheticPool(np.stack(images), labels, np.arange(len(rows)) % 2, rows)


def stand_in(patch):
    """Replace the sample by monkeypatching."""
    patch.setattr(sample, "sample_ratings", ratings)
    for module in (sample, study):
        patch.setattr(module, "sample_references", references)
    patch.setattr(train_teacher, "make_pool", pieces)


def app(words):
    """The command line on the stand-in, for a process of its own."""
    stand_in(pytest.MonkeyPatch())
    return cli.app(words)


def rated(chosen=slice(None)):
    """All of the stand-in, or some, decoded."""
    whole = ratings()
    part = whole.select(np.arange(len(whole))[chosen])
    pixels = Pixels.of([part.open(i) for i in range(len(part))], part.names)
    return Rated(pixels, part.scores, part.references, hashes(pixels), part.names, part.distortions)


def pool():
    return ReferencePool(Pixels.of(list(references().values()), list(references())), list(references()))


CROPS = Preprocessing(32, 2)
SCALE = ScoreScale.of(ratings().scores, 0.0, 100.0)
