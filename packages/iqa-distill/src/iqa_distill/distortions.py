"""Distortions of known kind and strength: nine of TID2013 and the 25 kinds of KADID-10k, with parameters of our own.

Each function takes a uint8 image (height, width, 3), a strength that makes it worse as it grows, and a random generator.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
TO_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).T  # of JFIF
TO_RGB = np.linalg.inv(TO_YCBCR)
Distortion = Callable[[Bytes, float, np.random.Generator], Bytes]


def to_bytes(values: Floats) -> Bytes:
    """Rounded, not cut off, and clipped to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# Noise. The field depends on the generator alone: a greater strength is the same noise, stronger.


def gaussian_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """White in each channel; ``strength`` is the standard deviation in grey levels."""
    return to_bytes(image + strength * rng.standard_normal(image.shape))


def correlated_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """White noise blurred by sigma 1, then scaled to a standard deviation of ``strength``."""
    noise = _blurred(rng.standard_normal(image.shape), 1)
    return to_bytes(image + strength / noise.std() * noise)


def high_frequency_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """White noise less its blur by sigma 1, then scaled to a standard deviation of ``strength``."""
    white = rng.standard_normal(image.shape)
    noise = white - _blurred(white, 1)
    return to_bytes(image + strength / noise.std() * noise)


def ycbcr_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """White noise of standard deviation ``strength`` on luma and both colour differences."""
    return to_bytes(image + strength * rng.standard_normal(image.shape) @ TO_RGB)


def impulse_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """A share ``strength`` of the values of all channels becomes 0 or 255."""
    hit, extreme = rng.random(image.shape) < strength, 255 * rng.integers(2, size=image.shape, dtype=np.uint8)
    return np.where(hit, extreme, image)


def multiplicative_noise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Each value times 1 plus white noise of standard deviation ``strength``."""
    return to_bytes(image * (1 + strength * rng.standard_normal(image.shape)))


def denoise(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """White noise of standard deviation ``strength``, taken out again by a local Wiener filter of 5 x 5 pixels."""
    noisy = image + strength * rng.standard_normal(image.shape)
    mean = ndimage.uniform_filter(noisy, (5, 5, 0))
    variance = ndimage.uniform_filter(noisy**2, (5, 5, 0)) - mean**2
    share = np.maximum(variance - strength**2, 0) / np.maximum(variance, 1e-9)
    return to_bytes(mean + share * (noisy - mean))


# Blur and sharpness.


def gaussian_blur(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """``strength`` is sigma in pixels."""
    return to_bytes(_blurred(image.astype(np.float64), strength))


def lens_blur(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """The mean over a disc of radius ``strength`` pixels."""
    reach = math.ceil(strength)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return _convolved(image, np.clip(strength + 0.5 - np.hypot(y, x), 0, 1))


def motion_blur(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """The mean along a line of ``strength`` pixels in a random direction."""
    reach, angle = math.ceil(strength / 2), rng.uniform(0, math.pi)
    along = np.linspace(-strength / 2, strength / 2, 8 * reach + 1)
    edges = np.arange(-reach, reach + 2) - 0.5
    return _convolved(image, np.histogram2d(along * math.sin(angle), along * math.cos(angle), [edges, edges])[0])


def sharpen(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """``strength`` times the difference to a blur of sigma 1 is added."""
    values = image.astype(np.float64)
    return to_bytes(values + strength * (values - _blurred(values, 1)))


# Codecs.


def jpeg(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """4:2:0; the standard's example tables times ``strength``, which is 1 at quality 50. No entry exceeds 255."""
    tables = [[max(1, min(255, round(strength * entry))) for entry in table] for table in JPEG_TABLES]
    return _coded(image, "JPEG", qtables=tables, subsampling="4:2:0")


def jpeg2000(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Irreversible wavelets at a compression rate of ``strength``."""
    return _coded(image, "JPEG2000", quality_layers=[strength], irreversible=True, mct=1)


# Colour and tone.


def color_diffusion(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Both colour differences are blurred by sigma ``strength`` pixels. (KADID-10k blurs those of CIELAB.)"""
    luma, colors = np.split(image @ TO_YCBCR, [1], axis=2)
    return to_bytes(np.concatenate([luma, _blurred(colors, strength)], axis=2) @ TO_RGB)


def color_shift(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Green moves by ``strength`` pixels in a random direction, the more the steeper the image is."""
    angle = rng.uniform(0, 2 * math.pi)
    way = strength * math.sin(angle), strength * math.cos(angle)
    green = image[..., 1].astype(np.float64)
    steep = ndimage.gaussian_gradient_magnitude(image @ TO_YCBCR[:, 0], 2)
    moved = image.astype(np.float64)
    moved[..., 1] += steep / max(steep.max(), 1e-9) * (ndimage.shift(green, way, order=1, mode="nearest") - green)
    return to_bytes(moved)


def color_quantization(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """256 / ``strength`` colours, chosen by an octree, without dither."""
    colors = max(2, round(256 / strength))
    few = Image.fromarray(image).quantize(colors, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    return np.asarray(few.convert("RGB"))


def desaturate(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """The saturation of HSV times 1 - ``strength``."""
    value = image.max(axis=2, keepdims=True).astype(np.float64)
    return to_bytes(image + min(1, strength) * (value - image))


def oversaturate(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Both colour differences times 1 + ``strength``. (KADID-10k stretches those of CIELAB.)"""
    return to_bytes(image @ TO_YCBCR * (1, 1 + strength, 1 + strength) @ TO_RGB)


def brighten(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """A tone curve of gamma 1 / (1 + ``strength``)."""
    return to_bytes(255 * (image / 255) ** (1 / (1 + strength)))


def darken(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """A tone curve of gamma 1 + ``strength``."""
    return to_bytes(255 * (image / 255) ** (1 + strength))


def mean_shift(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """``strength`` grey levels up or down, by chance."""
    return to_bytes(image + rng.choice([-1, 1]) * strength)


def quantization(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Each channel becomes a multiple of ``strength`` grey levels."""
    return to_bytes(np.rint(image / strength) * strength)


def low_contrast(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """A share ``strength`` of the contrast to the mean grey is lost."""
    return to_bytes(image + min(1, strength) * (image.mean() - image))


# Places.


def jitter(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Each pixel comes from a random place, ``strength`` pixels away by standard deviation in x and in y."""
    where = np.indices(image.shape[:2]) + strength * rng.standard_normal((2, *image.shape[:2]))
    moved = [ndimage.map_coordinates(channel, where, np.float64, 1, "nearest") for channel in np.moveaxis(image, 2, 0)]
    return to_bytes(np.stack(moved, axis=2))


def displaced_patches(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Squares of 16 pixels are copied to up to 16 pixels away; together as large as a share ``strength`` of the image."""
    moved = image.copy()
    for y, x in _corners(image, 16, strength, rng):
        to_y, to_x = np.clip(np.array((y, x)) + rng.integers(-16, 17, 2), 0, np.array(image.shape[:2]) - 16)
        moved[to_y : to_y + 16, to_x : to_x + 16] = image[y : y + 16, x : x + 16]
    return moved


def color_blocks(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Squares of 32 pixels in random colours; together as large as a share ``strength`` of the image."""
    painted = image.copy()
    for y, x in _corners(image, 32, strength, rng):
        painted[y : y + 32, x : x + 32] = rng.integers(256, size=3)
    return painted


def pixelate(image: Bytes, strength: float, rng: np.random.Generator) -> Bytes:
    """Squares of about ``strength`` pixels become one colour."""
    height, width = image.shape[:2]
    size = max(1, round(width / strength)), max(1, round(height / strength))
    few = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    return np.asarray(few.resize((width, height), Image.Resampling.NEAREST))


def _blurred(values: Floats, sigma: float) -> Floats:
    return np.asarray(ndimage.gaussian_filter(values, (sigma, sigma, 0)))


def _convolved(image: Bytes, kernel: Floats) -> Bytes:
    reach = kernel.shape[0] // 2
    around = np.pad(image.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    return to_bytes(signal.oaconvolve(around, kernel[..., None] / kernel.sum(), mode="valid", axes=(0, 1)))


def _coded(image: Bytes, kind: str, **options: object) -> Bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return np.asarray(Image.open(file))


def _corners(image: Bytes, side: int, share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """(n, 2) places of squares inside the image, at least one."""
    height, width = image.shape[:2]
    return rng.integers(0, (height - side + 1, width - side + 1), (max(1, round(share * height * width / side**2)), 2))


JPEG_TABLES = (  # the examples of ITU-T T.81, annex K, row by row: luma, colour
    [
        *(16, 11, 10, 16, 24, 40, 51, 61),
        *(12, 12, 14, 19, 26, 58, 60, 55),
        *(14, 13, 16, 24, 40, 57, 69, 56),
        *(14, 17, 22, 29, 51, 87, 80, 62),
        *(18, 22, 37, 56, 68, 109, 103, 77),
        *(24, 35, 55, 64, 81, 104, 113, 92),
        *(49, 64, 78, 87, 103, 121, 120, 101),
        *(72, 92, 95, 98, 112, 100, 103, 99),
    ],
    [
        *(17, 18, 24, 47, 99, 99, 99, 99),
        *(18, 21, 26, 66, 99, 99, 99, 99),
        *(24, 26, 56, 99, 99, 99, 99, 99),
        *(47, 66, 99, 99, 99, 99, 99, 99),
        *([99] * 32),
    ],
)

# Name: the function, and the strengths of levels 1 to 5 (ours).
DISTORTIONS: dict[str, tuple[Distortion, tuple[float, float, float, float, float]]] = {
    "gaussian noise": (gaussian_noise, (6, 10, 15, 22, 35)),
    "correlated noise": (correlated_noise, (6, 9, 12, 17, 25)),
    "high-frequency noise": (high_frequency_noise, (6, 10, 15, 22, 35)),
    "impulse noise": (impulse_noise, (0.002, 0.006, 0.015, 0.04, 0.1)),
    "quantization": (quantization, (18, 28, 40, 58, 85)),
    "gaussian blur": (gaussian_blur, (0.7, 1.2, 2, 3.2, 5)),
    "jpeg": (jpeg, (1, 2.5, 4.5, 8, 14)),
    "jpeg2000": (jpeg2000, (20, 40, 75, 140, 250)),
    "multiplicative noise": (multiplicative_noise, (0.05, 0.09, 0.14, 0.22, 0.35)),
    "lens blur": (lens_blur, (1, 1.8, 3, 5, 8)),
    "motion blur": (motion_blur, (3, 5, 8, 13, 21)),
    "color diffusion": (color_diffusion, (2, 4, 7, 12, 20)),
    "color shift": (color_shift, (2, 4, 8, 14, 24)),
    "color quantization": (color_quantization, (3, 6, 10, 16, 26)),
    "desaturation": (desaturate, (0.3, 0.5, 0.7, 0.85, 1)),
    "oversaturation": (oversaturate, (0.4, 0.8, 1.5, 2.5, 4)),
    "ycbcr noise": (ycbcr_noise, (5, 8, 12, 18, 28)),
    "denoising": (denoise, (6, 10, 16, 26, 42)),
    "brightening": (brighten, (0.15, 0.35, 0.65, 1.1, 1.8)),
    "darkening": (darken, (0.15, 0.35, 0.65, 1.1, 1.8)),
    "mean shift": (mean_shift, (12, 24, 38, 55, 75)),
    "jitter": (jitter, (0.3, 0.6, 1, 1.7, 3)),
    "displaced patches": (displaced_patches, (0.02, 0.05, 0.1, 0.18, 0.3)),
    "pixelation": (pixelate, (1.5, 2.3, 3.4, 5, 7.5)),
    "color blocks": (color_blocks, (0.01, 0.02, 0.04, 0.07, 0.12)),
    "sharpening": (sharpen, (0.7, 1.5, 3, 5.5, 10)),
    "low contrast": (low_contrast, (0.15, 0.3, 0.45, 0.6, 0.75)),
}

# The number in a file's name: what it is called here.
TID2013_DISTORTIONS = {
    1: "gaussian noise",
    3: "correlated noise",
    5: "high-frequency noise",
    6: "impulse noise",
    7: "quantization",
    8: "gaussian blur",
    10: "jpeg",
    11: "jpeg2000",
    19: "multiplicative noise",
}
KADID_DISTORTIONS = {
    1: "gaussian blur",
    2: "lens blur",
    3: "motion blur",
    4: "color diffusion",
    5: "color shift",
    6: "color quantization",
    7: "desaturation",
    8: "oversaturation",
    9: "jpeg2000",
    10: "jpeg",
    11: "gaussian noise",
    12: "ycbcr noise",
    13: "impulse noise",
    14: "multiplicative noise",
    15: "denoising",
    16: "brightening",
    17: "darkening",
    18: "mean shift",
    19: "jitter",
    20: "displaced patches",
    21: "pixelation",
    22: "quantization",
    23: "color blocks",
    24: "sharpening",
    25: "low contrast",
}


def distort(image: Bytes, name: str, strength: float, seed: int | list[int] = 0) -> Bytes:
    """The image with one distortion, the same for the same seed.

    >>> import numpy as np
    >>> distort(np.full((32, 32, 3), 100, np.uint8), "quantization", 40.0)[0, 0]
    array([80, 80, 80], dtype=uint8)

    Args:
        image: uint8 (height, width, 3), at least 32 pixels a side.
        name: a key of ``DISTORTIONS``.
        strength: above 0, in the unit that the distortion's function tells. Greater is worse.
        seed: of numpy's default generator.

    Returns:
        uint8 of the image's shape.

    Raises:
        ValueError: for an unknown name, a strength that is not above 0, or another kind of image.
    """
    function, _ = _known(name)
    if not 0 < strength < math.inf:
        raise ValueError(f"{name}: expected a finite strength above 0, got {strength}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise ValueError(
            f"{name}: expected a uint8 image (height, width, 3) of 32 pixels a side or more, "
            f"got {image.dtype} {image.shape}"
        )
    return function(image, strength, np.random.default_rng(seed))


def distort_level(image: Bytes, name: str, level: float, seed: int | list[int] = 0) -> Bytes:
    """:func:`distort` at a level from 1 (hardly seen) to 5 (ruined); between two levels the strength is interpolated.

    Raises:
        ValueError: as there, and for a level outside 1..5.
    """
    _, strengths = _known(name)
    if not 1 <= level <= 5:
        raise ValueError(f"{name}: expected a level from 1 to 5, got {level}")
    return distort(image, name, float(np.interp(level, range(1, 6), strengths)), seed)


def distort_kadid(image: Bytes, kind: int, level: float, seed: int | list[int] = 0) -> Bytes:
    """:func:`distort_level` by KADID-10k's number of the kind, 1 to 25. Kinds and levels are like its own, not the same.

    Raises:
        ValueError: as there, and for another number.
    """
    if kind not in KADID_DISTORTIONS:
        raise ValueError(f"KADID-10k numbers its distortions from 1 to 25, got {kind}")
    return distort_level(image, KADID_DISTORTIONS[kind], level, seed)


def _known(name: str) -> tuple[Distortion, tuple[float, float, float, float, float]]:
    if name not in DISTORTIONS:
        raise ValueError(f"no distortion {name!r}: expected one of {', '.join(DISTORTIONS)}")
    return DISTORTIONS[name]
