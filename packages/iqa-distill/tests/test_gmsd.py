import math

import numpy as np
import pytest
from iqa_distill.distortions import distort
from iqa_distill.gmsd import gmsd, psnr


@pytest.fixture
def pair():
    return np.random.default_rng(0).integers(0, 256, (2, 17, 22, 3), dtype=np.uint8)


def literal_gmsd(image, reference):
    """The definition, pixel by pixel."""

    def magnitude(picture):
        grey = [[0.299 * r + 0.587 * g + 0.114 * b for r, g, b in row] for row in picture.astype(float)]
        at = lambda rows, y, x: rows[y][x] if 0 <= y < len(rows) and 0 <= x < len(rows[0]) else 0.0  # noqa: E731
        half = [
            [
                (at(grey, y, x) + at(grey, y + 1, x) + at(grey, y, x + 1) + at(grey, y + 1, x + 1)) / 4
                for x in range(0, len(grey[0]), 2)
            ]
            for y in range(0, len(grey), 2)
        ]
        steps = (-1, 0, 1)
        return [
            [
                math.hypot(
                    sum(at(half, y + i, x + 1) - at(half, y + i, x - 1) for i in steps) / 3,
                    sum(at(half, y + 1, x + i) - at(half, y - 1, x + i) for i in steps) / 3,
                )
                for x in range(len(half[0]))
            ]
            for y in range(len(half))
        ]

    pairs = zip(np.ravel(magnitude(image)), np.ravel(magnitude(reference)), strict=True)
    return np.std([(2 * a * b + 170) / (a * a + b * b + 170) for a, b in pairs])


def test_gmsd_is_its_definition_at_odd_sides_too(pair):
    assert gmsd(*pair) == pytest.approx(literal_gmsd(*pair), rel=1e-9)


def test_gmsd_is_zero_for_equal_images_and_grows_with_the_noise(pair):
    image = np.kron(pair[0], np.ones((4, 4, 1), np.uint8))
    measured = [gmsd(distort(image, "gaussian noise", strength), image) for strength in (5, 15, 40, 100)]
    assert gmsd(image, image) == 0
    assert all(np.diff(measured) > 0)
    assert measured[0] > 0


def test_psnr_of_a_known_error():
    black = np.zeros((4, 5, 3), np.uint8)
    assert psnr(black + np.uint8(10), black) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(black, black + np.uint8(255)) == pytest.approx(0)  # differences do not wrap round
    assert psnr(black, black) == math.inf


@pytest.mark.parametrize("measure", [gmsd, psnr])
def test_two_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"one shape, got \(4, 6, 3\) and \(6, 4, 3\)"):
        measure(np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8))
