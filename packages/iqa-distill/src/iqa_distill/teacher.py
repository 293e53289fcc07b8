"""The NAR-teacher: it compares a distorted image with a pristine one that shows something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from iqa_distill.images import Preprocessing, ScoreScale

BACKBONES = ("tiny", "inception_resnet_v2", "resnet50")
PATCH = 16  # pixels of the student's patch


class TeacherOutput(NamedTuple):
    """``score``: (batch,), normalised. ``layers``: tokens of the difference after each encoder layer, (batch, N, dim).
    ``kinds``: logits of the distortion, (batch, kinds), or None.

    >>> distorted, pristine = torch.rand(2, 2, 3, 96, 96)
    >>> output = NARTeacher("tiny", kinds=5).eval()(distorted, pristine)
    >>> output.score.shape, len(output.layers), output.kinds.shape
    (torch.Size([2]), 2, torch.Size([2, 5]))
    """

    score: Tensor
    layers: list[Tensor]
    kinds: Tensor | None


class NARTeacher(nn.Module, PyTorchModelHubMixin, library_name="iqa-distill", license="apache-2.0"):
    """A teacher with a non-aligned reference (section 3 of RKIQT; its details were not to be found, so this form is ours).

    A trunk's maps of an image are averaged over the cells of the student's grid and projected: f. The difference f(HQ) - f(LQ),
    in the sign of CVRKD-IQA, passes through transformer layers, whose tokens are what a student learns. The score is read from
    the mean of these tokens and the mean of f(LQ), because a difference from a picture of something else is ambiguous alone.

    Args:
        backbone: "inception_resnet_v2" (CVRKD-IQA: the outputs of mixed_5b and of every second block35, 1920 channels) or
            "resnet50", which are frozen, or "tiny", trained from scratch.
        crop_size: side of the crops, pixels, a multiple of 16: tokens are on the grid of the student's patches. 96 for tiny,
            else 224, if not given.
        dim: C, width of f. depth: transformer layers. heads: of attention.
        kinds: distortions that it also learns to tell, 0 for none.
        crops, crop_seed, mean, std, scale: as of :class:`iqa_distill.RKIQT`.

    Shape:
        lq, hq: (batch, 3, crop_size, crop_size), normalised. Returns a :class:`TeacherOutput`.

    Raises:
        ValueError: for an unknown backbone or a crop size that is no multiple of 16.

    Example:
        >>> teacher = NARTeacher("tiny").eval()
        >>> output = teacher(torch.zeros(2, 3, 96, 96), torch.ones(2, 3, 96, 96))
        >>> output.score.shape, output.layers[-1].shape
        (torch.Size([2]), torch.Size([2, 36, 64]))
    """

    def __init__(
        self,
        backbone: str = "tiny",
        *,
        crop_size: int | None = None,
        dim: int | None = None,
        depth: int = 2,
        heads: int = 4,
        kinds: int = 0,
        crops: int = 10,
        crop_seed: int = 0,
        mean: Sequence[float] = Preprocessing.mean,
        std: Sequence[float] = Preprocessing.std,
        scale: Sequence[float] = (0.0, 1.0, 0.0, 1.0),
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}; got {backbone!r}")
        crop_size = crop_size or default_crop(backbone)
        if crop_size % PATCH:
            raise ValueError(f"crop_size must be a multiple of {PATCH}, got {crop_size}")
        self.preprocessing = Preprocessing(crop_size, crops, None, crop_seed, tuple(mean), tuple(std))
        self.scale = ScoreScale(*scale)
        self.grid, self.depth = crop_size // PATCH, depth
        self.dim = dim or (64 if backbone == "tiny" else 256)
        self.frozen = backbone != "tiny"
        self.trunk, channels = _TRUNKS[backbone]()
        self.trunk.requires_grad_(not self.frozen).to(memory_format=torch.channels_last)
        self.project = nn.Conv2d(channels, self.dim, 1)
        self.positions = nn.Parameter(torch.zeros(1, self.grid**2, self.dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.dim, heads, 4 * self.dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.Linear(2 * self.dim, 512), nn.ReLU(), nn.Linear(512, 1))
        self.kinds = nn.Linear(2 * self.dim, kinds) if kinds else None

    def train(self, mode: bool = True) -> NARTeacher:
        """A frozen trunk stays in eval mode, or its batch statistics would drift."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def features(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch dim grid grid"]:
        """f of an image: of pristine crops they may be kept, since they do not depend on the distorted ones."""
        self._check(images)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = [F.adaptive_avg_pool2d(m, self.grid) for m in self.trunk(images)]
        return self.project(torch.cat(maps, 1))

    def forward(
        self, lq: Float[Tensor, "batch 3 side side"], hq: Tensor | None = None, hq_features: Tensor | None = None
    ) -> TeacherOutput:
        """Give the pristine crops, or their features."""
        if (hq is None) == (hq_features is None):
            raise ValueError("give either hq, pristine crops, or hq_features of them")
        if hq_features is not None:
            own, pristine = self.features(lq), hq_features
        else:  # in one pass: batch statistics of each alone would hide by what they differ
            assert hq is not None
            self._check(lq)
            self._check(hq)
            own, pristine = self.features(torch.cat([lq, hq])).chunk(2)
        tokens = (pristine - own).flatten(2).transpose(1, 2) + self.positions
        layers = []
        for layer in self.layers:
            tokens = layer(tokens)
            layers.append(tokens)
        summary = torch.cat([tokens.mean(1), own.mean((2, 3))], 1)
        kinds = self.kinds(summary) if self.kinds is not None else None
        return TeacherOutput(self.head(summary).squeeze(1), layers, kinds)

    def _check(self, images: Tensor) -> None:
        size = self.preprocessing.crop_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}: expected (batch, 3, {size}, {size})")

    @torch.inference_mode()
    def compare(self, lq: Any, hq: Any) -> float:
        """The score of an image, in the units of the labels it was trained on, beside an unrelated pristine image.

        Args:
            lq, hq: of any size; paths, arrays, PIL images, see :func:`iqa_distill.images.open_rgb`.
        """
        from iqa_distill.images import open_rgb

        device = next(self.parameters()).device
        crops = []
        for source in (lq, hq):
            image = torch.from_numpy(open_rgb(source)).movedim(2, 0)
            crops.append(self.preprocessing.normalize(self.preprocessing.crops_of(image).to(device)))
        return float(self.scale.restore(self.eval()(*crops).score.mean()))


def default_crop(backbone: str) -> int:
    """Side of the crops that a network sees, pixels: 224 as in DEIQT, or, for tiny ones, 96."""
    return 96 if backbone == "tiny" else 224


class _Tiny(nn.Module):
    """Convolutions with batch normalisation, from scratch; strides of 2, 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
                for a, b, stride in widths
            )
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layers(images)]


class _InceptionResNetV2(nn.Module):
    """Up to the tenth block35: six maps of 320 channels."""

    STEM = ("conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a", "maxpool_5a", "mixed_5b")

    def __init__(self) -> None:
        super().__init__()
        whole = timm.create_model("inception_resnet_v2", pretrained=False)
        for name in (*self.STEM, "repeat"):  # timm's names, so that its weights fit
            setattr(self, name, getattr(whole, name))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = images
        for name in self.STEM:
            x = getattr(self, name)(x)
        maps = [x]
        for number, block in enumerate(self.repeat):  # type: ignore[arg-type]
            x = block(x)
            if number % 2:
                maps.append(x)
        return maps


def _resnet50() -> nn.Module:
    return timm.create_model("resnet50", pretrained=False, features_only=True, out_indices=(1, 2, 3))


_TRUNKS: dict[str, Any] = {
    "tiny": lambda: (_Tiny(), 96),
    "inception_resnet_v2": lambda: (_InceptionResNetV2(), 1920),
    "resnet50": lambda: (_resnet50(), 256 + 512 + 1024),
}
