"""An image encoder: a backbone, which is kept, and a projection head, which pre-training alone needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from disco.backbones import build_backbone, feature_width

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def projection_head(width: int, hidden: int, dim: int, batch_norm: bool = False) -> nn.Sequential:
    """Linear, ReLU, Linear with biases, as in MoCo-v2 and DisCo; with batch normalisation before the ReLU as in SwAV.

    Args:
        width: of the features. hidden: width between; 0: a single Linear; -1: as wide as the features. dim: of the embedding.

    Raises:
        ValueError: if hidden is below -1 or dim below 1.
    """
    if hidden < -1 or dim < 1:
        raise ValueError(f"a projection head needs hidden >= -1 and dim >= 1, got {hidden} and {dim}")
    if hidden == 0:
        return nn.Sequential(nn.Linear(width, dim))
    hidden = width if hidden == -1 else hidden
    norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(nn.Linear(width, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, dim))


class Encoder(nn.Module, PyTorchModelHubMixin, library_name="disco", license="apache-2.0"):
    """g(f(x)): a backbone f with pooled features and a projection head g, before the division by the L2 norm.

    ``save_pretrained`` writes weights and arguments; ``from_pretrained`` reads them, strictly. A backbone that is a module is not
    written down: ``from_pretrained(folder, backbone=module)`` then needs one of the same form.

    The head of the paper's students has a hidden width of 2048 whatever the backbone: narrower ones are its "distilling
    bottleneck".

    Args:
        backbone: a name that :func:`disco.backbones.build_backbone` knows, or any module (batch, 3, height, width) -> (batch,
            width).
        dim: embedding width; a student's and its teacher's must be equal (authors: 128).
        hidden: of the head: see :func:`projection_head` (authors' students: 2048; MoCo-v2's own: -1).
        batch_norm: whether the head normalises (heads of SwAV, DeepCluster-v2, SeLa).
        image_size: side of the views, pixels. mean, std: of the three channels, for values in [0, 1].

    Shape:
        images: (batch, 3, height, width), normalised. Returns (batch, dim).

    Raises:
        ValueError: for a module whose output is not (batch, width), or a mean or std that is not three numbers, std above 0.

    Example:
        >>> encoder = Encoder("cnn:8-16", dim=32, hidden=64, image_size=16)
        >>> encoder(torch.zeros(2, 3, 16, 16)).shape, encoder.backbone(torch.zeros(2, 3, 16, 16)).shape
        (torch.Size([2, 32]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        dim: int = 128,
        hidden: int = 2048,
        batch_norm: bool = False,
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, image_size) if isinstance(backbone, str) else backbone
        self.width = feature_width(self.backbone, image_size)
        self.head = projection_head(self.width, hidden, dim, batch_norm)
        self.backbone_name = backbone if isinstance(backbone, str) else None
        self.dim, self.image_size = int(dim), int(image_size)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean and std need three numbers each, std above 0; got {self.mean} and {self.std}")
        self.origin = ""  # the file it came from, in words: see disco.checkpoints.describe
        # The mixin's own would leave out what is no plain number or list, such as a mean that is an array.
        config = {"dim": self.dim, "hidden": int(hidden), "batch_norm": bool(batch_norm), "image_size": self.image_size}
        self._hub_mixin_config = config | {"mean": self.mean, "std": self.std}
        if self.backbone_name is not None:
            self._hub_mixin_config["backbone"] = self.backbone_name

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Encoder:
        if "backbone" not in kwargs:
            raise ValueError(
                f"{kwargs['model_id']}: its config.json names no backbone, as where that is a module: give it, "
                "Encoder.from_pretrained(folder, backbone=module)"
            )
        encoder: Encoder = super()._from_pretrained(strict=strict, **kwargs)
        return encoder.eval()  # older releases of the Hub leave it in training mode

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.head(self.backbone(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] (float) or 0 to 255 (uint8), less the mean, by the deviation."""
        shape = (1, 3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        if images.dtype == torch.uint8:
            return (images - 255 * mean) / (255 * std)
        return (images - mean) / std
