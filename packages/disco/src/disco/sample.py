"""The embedded sample: handwritten digits of scikit-learn, so that every first command works offline."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as F

SIDE, TEST_IMAGES = 16, 360  # a fifth of the images


def sample() -> tuple[
    UInt8[np.ndarray, "train 3 16 16"],
    Int64[np.ndarray, " train"],
    UInt8[np.ndarray, "test 3 16 16"],
    Int64[np.ndarray, " test"],
]:
    """Training images, their digits, test images, their digits; always the same ones.

    1797 grey images of ten classes (Alpaydin and Kaynak, 1998), enlarged from 8 x 8 pixels, black 0 to white 255, in three equal
    channels. A toy: no figure of the paper is about them.

    >>> images, digits, test_images, test_digits = sample()
    >>> images.shape, test_images.shape
    ((1437, 3, 16, 16), (360, 3, 16, 16))
    """
    grey, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(grey.reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)  # from 0 to 16
    images = F.resize(grey, [SIDE, SIDE]).repeat(1, 3, 1, 1).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    test, train = np.sort(order[:TEST_IMAGES]), np.sort(order[TEST_IMAGES:])
    labels = labels.astype(np.int64)
    return images[train], labels[train], images[test], labels[test]
