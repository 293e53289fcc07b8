"""Small convolutional stems: patches of a ViT without pretrained weights, and the start of the student's special tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iqa_distill.involution import Involution


class ConvStem(nn.Module):
    """Patch tokens by 3 x 3 convolutions of stride 2, instead of one large convolution: it learns more from little data.

    Takes the arguments with which timm makes a patch embedding; ``patch_size`` is a power of two.

    Shape:
        (batch, 3, side, side) -> (batch, (side / patch_size)^2, embed_dim).
    """

    def __init__(
        self, img_size: int = 96, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 64, **_: object
    ) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size != 2**halvings or img_size % patch_size:
            raise ValueError(
                f"a side of {img_size} pixels must be a multiple of the patch, {patch_size}, a power of two"
            )
        self.grid_size = (img_size // patch_size,) * 2
        self.num_patches = self.grid_size[0] ** 2
        layers: list[nn.Module] = []
        channels = in_chans
        for left in reversed(range(halvings)):  # halvings after this one
            width = max(16, embed_dim >> max(0, left - 1)) if left else embed_dim
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=not left)]
            layers += [nn.BatchNorm2d(width), nn.GELU()] if left else []
            channels = width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class TokenStem(nn.Module):
    """A special token that begins with a bias of its teacher's kind: what a light stem of convolutions, or of involutions, sees.

    The mean over positions of the stem's map is projected to the token's width. The projection starts at zero, so that pretrained
    tokens are undisturbed at first. Co-advise (Ren et al., CVPR 2022) begins its tokens likewise; this form is ours.

    Args:
        kind: "conv" or "inv". dim: D.

    Shape:
        (batch, 3, height, width) -> (batch, dim).
    """

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        width = max(16, dim // 12)  # 32 for a ViT-S
        second = nn.Conv2d(width, width, 3, padding=1, bias=False) if kind == "conv" else Involution(width, 3)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 4, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            second, nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.project = nn.Linear(width, dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(torch.flatten(self.stem(images).mean((2, 3)), 1))
