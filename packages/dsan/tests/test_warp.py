from __future__ import annotations

import numpy as np
import pytest
from dsan.warp import Warp
from PIL import Image

MATRIX = np.array([[0.9, -0.2, 3.0], [0.15, 1.1, -2.0], [4e-4, -3e-4, 1.0]])
CURVATURES = [0.0, 0.006, -0.006]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_inverse_undoes_forward(curvature: float) -> None:
    warp = Warp((60, 30), curvature, MATRIX).cropped(-70, -40, 1.2, 0.8)
    points = np.random.default_rng(0).uniform(0, 60, (50, 2)) * [2, 1]
    np.testing.assert_allclose(warp.inverse(warp.forward(points)), points, atol=1e-8)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_pixels_go_where_points_go(curvature: float, scale: float) -> None:
    """Dots' centres of mass, also where the image is reduced first."""
    warp = Warp((60, 30), curvature, MATRIX).cropped(-80, -60, scale, scale)
    for x, y in [(20, 15), (60, 30), (100, 42)]:
        flat = np.zeros((60, 120), np.uint8)
        flat[y - 3 : y + 3, x - 3 : x + 3] = 255
        seen = np.asarray(warp.apply(Image.fromarray(flat), (round(160 * scale), round(120 * scale))), float)
        rows, columns = np.indices(seen.shape) + 0.5
        centre = np.array([(columns * seen).sum(), (rows * seen).sum()]) / seen.sum()
        np.testing.assert_allclose(centre, warp.forward(np.array([[x, y]], float))[0], atol=0.5)


def test_an_arc_lowers_both_ends() -> None:
    seen = Warp((50, 10), 0.01, np.eye(3)).forward(np.array([[0, 10], [50, 10], [100, 10]], float))
    assert seen[0, 1] == pytest.approx(seen[2, 1])
    assert seen[0, 1] > seen[1, 1] == 0
