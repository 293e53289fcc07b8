"""How strong a distortion must be for a wanted PSNR."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import NDArray

from iqa_distill.distortions import DISTORTIONS, distort
from iqa_distill.gmsd import psnr

TOLERANCE = 0.05  # dB
COARSE = {"jpeg": 0.3, "jpeg2000": 0.3}  # codecs move in steps
WIDEST = 50  # times more or less than level 3
STEPS = 40


def at_psnr(
    image: NDArray[np.uint8], name: str, decibels: float, seed: int | list[int] = 0
) -> tuple[NDArray[np.uint8], float]:
    """The image distorted to a PSNR, within 0.05 dB (JPEG and JPEG2000: 0.3 dB), and the strength that does it.

    Secant steps on the logarithm of the strength, kept inside a bracket that shrinks; the noise is the same at each step. The
    whole image is looked at: what holds for a part of it does not hold for all.

    Args:
        image: uint8 (height, width, 3).
        name: one of ``TID2013_DISTORTIONS``' names, or any other of ``DISTORTIONS`` whose PSNR falls as the strength grows.
        decibels: the PSNR wanted.
        seed: of the noise.

    Warns:
        UserWarning: if no strength comes near enough (a flat image cannot be blurred to 21 dB); the nearest is returned.

    Raises:
        ValueError: as :func:`iqa_distill.distortions.distort`.
    """
    middle = DISTORTIONS[name][1][2] if name in DISTORTIONS else 1.0
    low, high = math.log(middle / WIDEST), math.log(middle * WIDEST)
    place, last = math.log(middle), None
    best = (math.inf, image, middle)
    tolerance = COARSE.get(name, TOLERANCE)
    for step in range(STEPS):
        distorted = distort(image, name, math.exp(place), seed)
        error = psnr(distorted, image) - decibels
        best = min(best, (abs(error), distorted, math.exp(place)), key=lambda found: found[0])
        if best[0] <= tolerance or high - low < 1e-4:
            break
        low, high = (place, high) if error > 0 else (low, place)
        slope = -20 / math.log(10) if last is None else (error - last[1]) / (place - last[0])  # noise: 20 dB a decade
        last = place, error
        place = place - error / slope if math.isfinite(error) and slope < 0 else math.nan
        if not low < place < high or step > 8:
            place = (low + high) / 2
    if best[0] > tolerance:
        nearest = f"the nearest is {psnr(best[1], image):.2f} dB"
        warnings.warn(f"{name} does not bring this image to {decibels} dB: {nearest}", stacklevel=2)
    return best[1], best[2]
