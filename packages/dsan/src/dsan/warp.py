"""The geometry of a word on a sign: an arc, then a perspective view; for pixels and for boxes alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Points = NDArray[np.float64]  # (n, 2) x, y; pixel k covers k to k + 1
Mesh = list[tuple[tuple[int, int, int, int], tuple[float, ...]]]


@dataclass(frozen=True)
class Warp:
    """A map of the plane and its inverse: the baseline is bent to an arc about ``centre``, then ``matrix`` is applied.

    Args:
        centre: x, y of the point that stays where it is when bending.
        curvature: 1 / radius of the arc in 1 / pixel, 0 for none; above 0 the ends hang down.
        matrix: (3, 3) homography of points relative to ``centre``.
    """

    centre: tuple[float, float]
    curvature: float
    matrix: NDArray[np.float64]

    def forward(self, points: Points) -> Points:
        """(n, 2) -> (n, 2): from the flat word to the view."""
        x, y = points[:, 0] - self.centre[0], points[:, 1] - self.centre[1]
        if self.curvature:
            radius = 1 / self.curvature
            x, y = (radius - y) * np.sin(x / radius), radius - (radius - y) * np.cos(x / radius)
        return _homography(self.matrix, x, y)

    def inverse(self, points: Points) -> Points:
        """(n, 2) -> (n, 2): from the view to the flat word."""
        flat = _homography(np.linalg.inv(self.matrix), points[:, 0], points[:, 1])
        if self.curvature:
            radius, sign = 1 / self.curvature, math.copysign(1, self.curvature)
            x, down = flat[:, 0] * sign, (radius - flat[:, 1]) * sign
            flat = np.stack([radius * np.arctan2(x, down), radius - sign * np.hypot(x, down)], axis=1)
        return flat + self.centre

    def cropped(self, left: float, top: float, scale_x: float, scale_y: float) -> Warp:
        """The same view, seen in a frame that starts at ``left``, ``top`` and is scaled."""
        frame = np.array([[scale_x, 0, -left * scale_x], [0, scale_y, -top * scale_y], [0, 0, 1]])
        return replace(self, matrix=frame @ self.matrix)

    def apply(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The view of a flat image, ``size`` = (width, height); zeros where the image ends.

        Bilinear, of an image reduced by averages where the view is smaller by half or more, or pixels would be skipped.
        """
        scale = math.sqrt(abs(np.linalg.det(self.matrix) / self.matrix[2, 2] ** 3))  # at the centre
        shrink = max(1, round(1 / scale - 0.25))
        image = image.reduce(shrink) if shrink > 1 else image
        if self.curvature:
            mesh = self._mesh(size, shrink)
            return image.transform(size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
        shift = np.array([[1, 0, self.centre[0]], [0, 1, self.centre[1]], [0, 0, shrink]])
        matrix = shift @ np.linalg.inv(self.matrix)
        coefficients = (matrix / matrix[2, 2]).ravel()[:8].tolist()
        return image.transform(size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)

    def _mesh(self, size: tuple[int, int], shrink: int) -> Mesh:
        """Cells, at least 8 by 3 of them and about 10 pixels wide and high, within which the map is taken to be bilinear."""
        columns = np.linspace(0, size[0], max(9, size[0] // 10)).round().astype(int).tolist()
        rows = np.linspace(0, size[1], max(4, size[1] // 10)).round().astype(int).tolist()
        knots = np.array([(x, y) for x in columns for y in rows], dtype=float)
        source = (self.inverse(knots) / shrink).reshape(len(columns), len(rows), 2).tolist()
        return [
            (
                (columns[i], rows[j], columns[i + 1], rows[j + 1]),
                (*source[i][j], *source[i][j + 1], *source[i + 1][j + 1], *source[i + 1][j]),
            )
            for i in range(len(columns) - 1)
            for j in range(len(rows) - 1)
        ]


def _homography(matrix: NDArray[Any], x: NDArray[np.float64], y: NDArray[np.float64]) -> Points:
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    depth = g * x + h * y + i
    return np.stack([(a * x + b * y + c) / depth, (d * x + e * y + f) / depth], axis=1)
