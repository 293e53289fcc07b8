"""The embedded sample: distorted photographs of scikit-image and scikit-learn, so that every first command works offline."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data
from sklearn.datasets import load_sample_image

from iqa_distill.distortions import distort_level
from iqa_distill.gmsd import gmsd
from iqa_distill.readers import RatedImages

SIZE = 256, 320  # height, width
KINDS = "gaussian noise", "impulse noise", "gaussian blur", "jpeg", "quantization"
LEVELS = 1, 2, 3, 4, 5


def sample_references() -> dict[str, NDArray[np.uint8]]:
    """Name: pristine photograph, uint8 (256, 320, 3), shrunk and cut from the centre."""
    photographs = {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "china": load_sample_image("china.jpg"),
        "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"),
        "motorcycle": data.stereo_motorcycle()[0],
        "retina": data.retina(),
        "rocket": data.rocket(),
        "stars": data.hubble_deep_field(),
        "tissue": data.immunohistochemistry(),
    }
    return {
        name: np.asarray(ImageOps.fit(Image.fromarray(photograph), SIZE[::-1], Image.Resampling.LANCZOS))
        for name, photograph in photographs.items()
    }


def sample_ratings() -> RatedImages:
    """250 images: ten photographs, five kinds of distortion, five levels; always the same ones.

    A toy: no human has scored them. The score is 100 (1 - GMSD / 0.4) against the photograph, so 100 is no distortion. No figure
    of the paper is about these images.
    """
    images, names, scores, origins, kinds = [], [], [], [], []
    for number, (name, photograph) in enumerate(sample_references().items()):
        for kind, level in product(KINDS, LEVELS):
            images.append(distort_level(photograph, kind, level, [number, level]))
            names.append(f"{name} {kind} {level}")
            scores.append(100 * (1 - gmsd(images[-1], photograph) / 0.4))
            origins.append(name)
            kinds.append(kind)
    return RatedImages(
        names=names,
        scores=np.array(scores),
        references=origins,
        splits=None,
        low=0.0,
        high=100.0,
        opener=images.__getitem__,
        distortions=kinds,
    )


def make_worse(name: str, folder: Path) -> Path:
    """A photograph of the sample, and the same with more and more noise, as 0.png to 5.png."""
    folder.mkdir(exist_ok=True)
    photograph = sample_references()[name]
    for level in range(6):
        image = distort_level(photograph, "gaussian noise", level) if level else photograph
        Image.fromarray(image).save(folder / f"{level}.png")
    return folder
