"""Masked quality-contrastive distillation: the student's masked features are made into the teacher's difference features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MASKS, REDUCTIONS = ("spatial", "channel", "none"), ("mean", "mgd")


class MaskedQualityDistillation(nn.Module):
    """From what a student sees in one distorted image, to the features in which a teacher compares it with a pristine one.

    For each layer i of the teacher, ``R_i = G_i(A_i(S) * m)``: A_i, a 1 x 1 convolution, aligns the student's map S to the
    width of the teacher's T_i, a random mask m hides places of it, and G_i, two 3 x 3 convolutions with a ReLU between, has to
    generate all of T_i. The loss is the mean over layers of ``mean((R_i - T_i)^2)``. "Contrastive" means that T_i are features
    of a comparison: there are no negatives. Everything here is dropped after training.

    The structure follows descriptions of the paper; its numbers were not to be found. Ours: which places are masked, the share of
    them (0.5), one mask of places for all layers of a step, and that T_i are normalised over channels, since their scale differs
    from layer to layer and teacher to teacher.

    Args:
        student_dim: D. teacher_dims: C_i, the width of each layer.
        ratio: share that is masked, on average, in [0, 1).
        mask: "spatial": places; "channel": channels of A_i(S), as Masked Generative Distillation (MGD, ECCV 2022) does in
            classification; "none".
        generate: False leaves out mask and G_i: direct feature distillation ("DRD"), the paper's ablation.
        normalize: T_i to mean 0 and deviation 1 over channels, place by place.
        reduction: "mean", or "mgd": the sum of squares divided by the batch.

    Shape:
        student: (batch, N, D) tokens of a square grid, or one such tensor for each layer. teacher: for each layer (batch, N,
        C_i); they are taken as constants. keep: the mask itself, 1 where kept: (batch, 1, side, side) or (batch, C, 1, 1).
        Returns a scalar.

    Raises:
        ValueError: for a ratio outside [0, 1), unknown kinds, tokens that are no square grid, or shapes that differ.

    Example:
        >>> mcd = MaskedQualityDistillation(12, [8, 8])
        >>> mcd(torch.zeros(2, 49, 12), [torch.zeros(2, 49, 8)] * 2).shape
        torch.Size([])
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dims: Sequence[int],
        *,
        ratio: float = 0.5,
        mask: str = "spatial",
        generate: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise ValueError(f"the mask ratio must be in [0, 1), got {ratio}")
        if mask not in MASKS or reduction not in REDUCTIONS:
            raise ValueError(f"mask is one of {', '.join(MASKS)}, reduction one of {', '.join(REDUCTIONS)}")
        if not teacher_dims:
            raise ValueError("there must be at least one teacher layer")
        self.ratio, self.mask, self.normalize, self.reduction = (
            ratio,
            mask if generate else "none",
            normalize,
            reduction,
        )
        self.align = nn.ModuleList(nn.Conv2d(student_dim, c, 1) for c in teacher_dims)
        self.generators = nn.ModuleList(_generator(c) if generate else nn.Identity() for c in teacher_dims)

    def forward(
        self,
        student: Float[Tensor, "batch tokens dim"] | Sequence[Float[Tensor, "batch tokens dim"]],
        teacher: Sequence[Float[Tensor, "batch _ _"]],
        *,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        """``generator`` draws the mask, on the CPU, if ``keep`` is not given."""
        layers = [student] * len(teacher) if isinstance(student, Tensor) else list(student)
        if not len(layers) == len(teacher) == len(self.align):
            raise ValueError(
                f"expected {len(self.align)} layers; got {len(layers)} of the student, {len(teacher)} of the teacher"
            )
        losses, given = [], keep is not None
        for own, wanted, align, generate in zip(layers, teacher, self.align, self.generators, strict=True):
            target = as_map(wanted.detach())
            if self.normalize:
                target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
            aligned = align(as_map(own))
            if aligned.shape != target.shape:
                raise ValueError(
                    f"the student's map is {tuple(aligned.shape)}, the teacher's {tuple(target.shape)}: they must be equal"
                )
            if self.mask != "none":
                if keep is None or (self.mask == "channel" and not given):
                    keep = self.draw(aligned, generator)
                aligned = aligned * keep
            losses.append(self._reduce(generate(aligned), target))
        return torch.stack(losses).mean()

    def draw(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A mask for maps (batch, C, side, side): 1 with probability 1 - ratio, and at least one 1 for each image."""
        b, c, height, width = like.shape
        shape = (b, 1, height, width) if self.mask == "spatial" else (b, c, 1, 1)
        chance = torch.rand(b, math.prod(shape[1:]), generator=generator)
        kept = (chance >= self.ratio) | (chance == chance.amax(1, keepdim=True))
        return kept.view(shape).to(like.device, like.dtype)

    def _reduce(self, made: Tensor, target: Tensor) -> Tensor:
        squares = (made.float() - target.float()).square()
        return squares.mean() if self.reduction == "mean" else squares.sum() / len(squares)


def as_map(tokens: Tensor) -> Tensor:
    """(batch, side * side, C) to (batch, C, side, side)."""
    b, n, c = tokens.shape
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"{n} tokens are no square grid")
    return tokens.transpose(1, 2).reshape(b, c, side, side)


def _generator(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)
    )
