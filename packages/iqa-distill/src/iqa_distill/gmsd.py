"""Two full-reference measures: PSNR, and the gradient magnitude similarity deviation that labels synthetic images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CONSTANT = 170.0  # for grey levels of 0 to 255


def psnr(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all channels, dB; infinite for equal images.

    Args:
        image, reference: uint8, of one shape.

    Raises:
        ValueError: for two shapes.
    """
    _same_shape(image, reference)
    error = np.mean(np.square(np.subtract(image, reference, dtype=np.float32)), dtype=np.float64)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def gmsd(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """Gradient magnitude similarity deviation (Xue et al., TIP 2014): 0 for equal images, about 0.3 for ruined ones.

    It sees grey levels only: a distortion of colour alone counts as none. Means of 2 x 2 pixels are compared; outside the image
    lie zeros; of similarities the population's standard deviation is taken.

    Args:
        image, reference: uint8 (height, width, 3), of one shape.

    Raises:
        ValueError: for two shapes.
    """
    _same_shape(image, reference)
    one, two = _gradient(image), _gradient(reference)
    return float(np.std((2 * one * two + CONSTANT) / (one**2 + two**2 + CONSTANT)))


def _gradient(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    even = np.pad(image, [(0, side % 2) for side in image.shape[:2]] + [(0, 0)])
    half = sum(even[y::2, x::2].astype(np.float64) for y in (0, 1) for x in (0, 1)) @ np.array(LUMA) / 4
    x, y = (ndimage.prewitt(half, axis, mode="constant") / 3 for axis in (0, 1))
    return np.sqrt(x**2 + y**2)


def _same_shape(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> None:
    if image.shape != reference.shape:
        raise ValueError(f"expected two images of one shape, got {image.shape} and {reference.shape}")
