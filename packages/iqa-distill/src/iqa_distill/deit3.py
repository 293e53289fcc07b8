"""Weights of DeiT III (Touvron et al., ECCV 2022), whose names DEIQT keeps, for timm's twin of the network."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from iqa_distill.weights import load_weights, read_weights


def from_deit3(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of DeiT III and DEIQT to timm's: LayerScale is ``blocks.0.gamma_1`` there, ``blocks.0.ls1.gamma`` here.

    >>> import torch
    >>> list(from_deit3({"blocks.0.gamma_1": torch.ones(2), "norm.bias": torch.ones(2)}))
    ['blocks.0.ls1.gamma', 'norm.bias']
    """
    return {re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name): value for name, value in weights.items()}


def to_deit3(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of :func:`from_deit3`."""
    return {re.sub(r"^(blocks\.\d+)\.ls([12])\.gamma$", r"\1.gamma_\2", name): value for name, value in weights.items()}


def resample_positions(positions: Float[Tensor, "1 n dim"], grid: tuple[int, int]) -> Float[Tensor, "1 m dim"]:
    """Position embeddings of a square grid of patches, for another grid (height, width): bicubic, with antialiasing.

    Raises:
        ValueError: if the positions are no square grid, as those that count a class token.

    >>> import torch
    >>> resample_positions(torch.zeros(1, 196, 8), (6, 6)).shape
    torch.Size([1, 36, 8])
    """
    if math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        raise ValueError(
            f"{positions.shape[1]} position embeddings are no square grid: expected those of patches alone, as in DeiT III"
        )
    return resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=0)


def load_deit3(vit: VisionTransformer, path: str | Path) -> list[str]:
    """Pretrained weights of DeiT III, DEIQT or timm into a ViT of the same shape, such as a student's ``vit``.

    Position embeddings are resampled if the file's grid is another: 14 x 14 for crops of 224 pixels.

    Returns:
        Names in the file that were not used, such as the classifier's.

    Raises:
        ValueError, OSError: as :func:`iqa_distill.weights.read_weights` and ``load_weights``.
    """
    weights = from_deit3(read_weights(path))
    if "pos_embed" in weights:
        try:
            weights["pos_embed"] = resample_positions(weights["pos_embed"], vit.patch_embed.grid_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return load_weights(vit, weights, path)
