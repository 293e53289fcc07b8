"""RKIQT's student: a vision transformer that scores the quality of an image from that image alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from iqa_distill.decoder import AttentionPanel
from iqa_distill.images import Preprocessing, ScoreScale
from iqa_distill.stems import ConvStem, TokenStem
from iqa_distill.teacher import default_crop

TOKEN_INITS, INFER = ("aligned", "learned"), ("cls", "mean")
TINY: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "embed_layer": ConvStem,
}  # ours, for CPUs


class RKIQTOutput(NamedTuple):
    """Scores are normalised; see :attr:`RKIQT.scale`. ``blocks``: patch tokens after the blocks that were asked for.

    >>> model = RKIQT("tiny").eval()
    >>> output = model(torch.zeros(2, 3, 96, 96), blocks=[0, 2])
    >>> model.scale.restore(output.score).shape, len(output.blocks)
    (torch.Size([2]), 2)
    """

    score: Tensor
    conv: Tensor
    inv: Tensor
    cls: Tensor
    patches: Tensor
    blocks: list[Tensor]


class RKIQT(nn.Module, PyTorchModelHubMixin, library_name="iqa-distill", license="apache-2.0"):
    """No-reference image quality: a ViT with three special tokens and an attention panel.

    Beside the class token there are a Conv and an Inv token, each with a head that learns the score of a teacher of that
    inductive bias. The panel (:class:`iqa_distill.decoder.AttentionPanel`) reads the score from class and patch tokens.
    Teachers, and all that ties the student to them, exist in training only.

    Args:
        backbone: "tiny" (ours, 3 blocks of width 64 over a convolutional stem), or a timm VisionTransformer: the paper's is
            "deit3_small_patch16_224". Weights are random: see :func:`iqa_distill.deit3.load_deit3` for pretrained ones.
        crop_size: side of the square crops it sees, pixels: a multiple of the patch; 96 for tiny, else 224, if not given.
        crops, resize, crop_seed, mean, std: how an image becomes crops, see :class:`iqa_distill.images.Preprocessing`; they are
            saved with the weights, because another resizing gives other scores.
        scale: (mean, deviation, low, high) of the scores it was trained on, see :class:`iqa_distill.images.ScoreScale`.
        queries: J, members of the panel (DEIQT: 6).
        token_init: "aligned": the Conv and Inv tokens begin with what a light stem of that kind sees; "learned": they are
            parameters alone. The paper's form is not known.
        infer: "cls": the panel's score; "mean": the mean with the Conv and Inv heads, as Co-advise does. The paper's choice is
            not known.
        options: overrides for the ViT, such as depth=6.

    Shape:
        images: (batch, 3, crop_size, crop_size), normalised. Returns an :class:`RKIQTOutput`: score, conv and inv (batch,); cls
        (batch, D); patches (batch, N, D).

    Raises:
        ValueError: for an unknown backbone, one that is no VisionTransformer with a class token, or a crop size that is no
            multiple of its patch.

    Example:
        >>> model = RKIQT("tiny").eval()
        >>> model(torch.zeros(2, 3, 96, 96)).patches.shape
        torch.Size([2, 36, 64])
    """

    def __init__(
        self,
        backbone: str = "tiny",
        *,
        crop_size: int | None = None,
        crops: int = 10,
        resize: Sequence[int] | None = None,
        crop_seed: int = 0,
        mean: Sequence[float] = Preprocessing.mean,
        std: Sequence[float] = Preprocessing.std,
        scale: Sequence[float] = (0.0, 1.0, 0.0, 1.0),
        queries: int = 6,
        token_init: str = "aligned",
        infer: str = "cls",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if token_init not in TOKEN_INITS or infer not in INFER:
            raise ValueError(f"token_init is one of {', '.join(TOKEN_INITS)}, infer one of {', '.join(INFER)}")
        crop_size = crop_size or default_crop(backbone)
        self.infer = infer
        self.preprocessing = Preprocessing(
            crop_size, crops, (resize[0], resize[1]) if resize else None, crop_seed, tuple(mean), tuple(std)
        )
        self.scale = ScoreScale(*scale)
        self.vit = build_vit(backbone, crop_size, options or {})
        dim = self.vit.embed_dim
        self.tokens = nn.Parameter(torch.empty(1, 2, dim))  # Conv, Inv
        nn.init.trunc_normal_(self.tokens, std=0.02)
        self.stems = (
            nn.ModuleList(TokenStem(kind, dim) for kind in ("conv", "inv")) if token_init == "aligned" else None
        )
        block: Any = self.vit.blocks[0]
        self.panel = AttentionPanel(dim, queries, block.attn.num_heads)
        self.conv_head, self.inv_head = nn.Linear(dim, 1), nn.Linear(dim, 1)

    def forward(self, images: Float[Tensor, "batch 3 side side"], blocks: Sequence[int] = ()) -> RKIQTOutput:
        """``blocks``: numbers from 0 of the blocks whose patch tokens are wanted."""
        size = self.preprocessing.crop_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape)}: expected (batch, 3, {size}, {size})")
        if not set(blocks) <= set(range(len(self.vit.blocks))):
            raise ValueError(f"no blocks {list(blocks)}: they are numbered 0 to {len(self.vit.blocks) - 1}")
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        tokens = self.tokens.expand(images.shape[0], -1, -1)
        if self.stems is not None:
            tokens = tokens + torch.stack([stem(images) for stem in self.stems], 1)
        x = vit.norm_pre(torch.cat([x[:, :1], tokens, x[:, 1:]], 1))
        first, seen = vit.num_prefix_tokens + 2, {}
        for number, block in enumerate(vit.blocks):
            x = block(x)
            if number in blocks:
                seen[number] = x[:, first:]
        x = vit.norm(x)
        cls, patches = x[:, 0], x[:, first:]
        return RKIQTOutput(
            self.panel(cls, patches), self.conv_head(x[:, 1]).squeeze(1), self.inv_head(x[:, 2]).squeeze(1), cls, patches,
            [seen[number] for number in blocks],
        )  # fmt: skip

    def predict(self, images: Tensor) -> Tensor:
        """Normalised scores (batch,) of normalised crops, by ``infer``."""
        output = self(images)
        return output.score if self.infer == "cls" else (output.score + output.conv + output.inv) / 3

    def score(self, images: Any, **how: Any) -> Any:
        """Scores of whole images, higher is better, in the units of its training: :func:`iqa_distill.scoring.score_images`."""
        from iqa_distill.scoring import score_images

        return score_images(self, images, **how)


def build_vit(backbone: str, crop_size: int, options: dict[str, Any]) -> VisionTransformer:
    """A timm VisionTransformer with random weights, without a classifier."""
    if backbone != "tiny" and not timm.is_model(backbone):
        raise ValueError(
            f"backbone {backbone!r} is neither tiny nor a name that timm knows, such as deit3_small_patch16_224"
        )
    try:
        if backbone == "tiny":
            tiny = {"img_size": crop_size, "num_classes": 0, "no_embed_class": True}
            return VisionTransformer(**{**tiny, **TINY, **options})
        vit = timm.create_model(
            backbone, pretrained=False, num_classes=0, global_pool="token", img_size=crop_size, **options
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"backbone {backbone!r} cannot be built for crops of {crop_size} pixels: {error}") from None
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None or crop_size % vit.patch_embed.patch_size[0]:
        raise ValueError(
            f"backbone {backbone!r} must be a VisionTransformer with a class token, and {crop_size} a multiple of its patch"
        )
    return vit
