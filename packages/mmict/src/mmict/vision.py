"""The frozen vision encoder: pictures to tokens, from a network of transformers, of timm, or of one's own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Blip2VisionModel, InstructBlipVisionModel
from transformers.image_processing_base import ImageProcessingMixin

from mmict.checkpoints import PARTS, quiet_loading

Triple = tuple[float, float, float]
MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD: Triple = (0.26862954, 0.26130258, 0.27577711)
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of a random crop: its share of the area, and width / height
KINDS: dict[str, Any] = {  # by model type, where AutoModel has no vision model
    "blip-2": Blip2VisionModel,
    "blip_2_vision_model": Blip2VisionModel,
    "instructblip": InstructBlipVisionModel,
    "instructblip_vision_model": InstructBlipVisionModel,
}
SAMPLE = 64  # values of each tensor that a fingerprint reads


class VisionEncoder(nn.Module):
    """A frozen network that turns a picture into tokens, always in eval mode: its batch statistics do not move either.

    Args:
        network: gives tokens (b, P, width), a map (b, width, h, w), or a transformers output with such a ``last_hidden_state``;
            of timm's networks ``forward_features`` is called. It is changed: frozen, and cut if ``truncate`` is not 0.
        source: what :func:`load_vision` finds it by.
        image_size: side, pixels. mean, std: of each colour channel, for values from 0 to 1.
        truncate: drop so many of its last blocks (official: 1 of EVA-CLIP ViT-g). What comes after the blocks stays.

    Raises:
        ValueError: if it has no more blocks than that, or cannot take such pictures, or gives something else.

    Example:
        >>> encoder = VisionEncoder(nn.Conv2d(3, 8, 4, 4), source="mine", image_size=12)
        >>> encoder(encoder.pixels([np.zeros((30, 40, 3), np.uint8)])).shape, encoder.tokens, encoder.width
        (torch.Size([1, 9, 8]), 9, 8)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        source: str,
        image_size: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        truncate: int = 0,
    ) -> None:
        super().__init__()
        if truncate:
            _cut(network, truncate)
        self.network = network.eval().requires_grad_(False)
        self.source, self.image_size, self.truncate = source, image_size, truncate
        self.mean, self.std = tuple(mean), tuple(std)
        try:
            tokens = self(torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(f"{source}: cannot encode pictures of {image_size} x {image_size}: {error}") from None
        self.tokens, self.width = tokens.shape[1:]

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b P width"]:
        """All tokens, with the class token if there is one, of normalised pictures; in the precision of the weights."""
        pixels = pixels.to(next(self.network.parameters()).dtype)
        found = getattr(self.network, "forward_features", self.network)(pixels)
        tokens: Tensor = getattr(found, "last_hidden_state", found)
        if tokens.dim() == 4:
            last = str(getattr(self.network, "output_fmt", "NCHW")) == "NHWC"
            tokens = tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
        if tokens.dim() != 3:
            raise ValueError(f"expected tokens (b, P, width) or a map (b, width, h, w), got {tuple(tokens.shape)}")
        return tokens

    def record(self) -> dict[str, Any]:
        """Arguments of :func:`load_vision` that find this encoder again."""
        return {"name": self.source, "truncate": self.truncate}

    def pixels(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "n 3 s s"]:
        """Pictures resized, bicubic and without keeping their shape, and normalised; on the CPU."""
        return self._normalised([Image.fromarray(image) for image in images])

    def augmented(
        self, images: Sequence[UInt8[np.ndarray, "h w 3"]], generator: torch.Generator
    ) -> Float[Tensor, "n 3 s s"]:
        """:meth:`pixels` of a random half to all of each picture, flipped every second time (official).

        Each picture, so each frame of a video, is cropped on its own. Not for features that are encoded once.

        Args:
            generator: of the CPU; all randomness comes from it.
        """
        return self._normalised([_random_crop(Image.fromarray(image), generator) for image in images])

    def _normalised(self, images: Sequence[Image.Image]) -> Tensor:
        size = (self.image_size, self.image_size)
        resized = np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255 - mean) / std


def load_vision(name: str, truncate: int = 0) -> VisionEncoder:
    """A pretrained encoder, in float32.

    Args:
        name: ``timm/NAME``; or a folder or Hub name of a transformers vision model (CLIP, SigLIP, ViT, ...), of a CLIP-like pair,
            or of BLIP-2 or InstructBLIP. Of the last three the vision part is taken; of the last two, the final LayerNorm is
            left out, because it belongs to the hub.
        truncate: see :class:`VisionEncoder`.

    Size, mean and standard deviation are the network's, or of its preprocessor_config.json; otherwise 224 and CLIP's.

    Raises:
        ValueError: if it is no vision model or lacks weights. OSError: if it is not found.
    """
    if name.startswith("timm/"):
        try:
            network = timm.create_model(name.removeprefix("timm/"), pretrained=True, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from None
        how: dict[str, Any] = resolve_model_data_config(network)
        size, mean, std = how["input_size"][-1], how["mean"], how["std"]
        return VisionEncoder(network, source=name, image_size=size, mean=mean, std=std, truncate=truncate)
    network, lacking = _transformers(name)
    if network.main_input_name != "pixel_values":
        raise ValueError(f"{name}: {type(network).__name__} is no vision model")
    if lacking:
        raise ValueError(f"{name} lacks weights of its encoder, such as {lacking[0]}")
    try:
        how, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        how = {}
    return VisionEncoder(
        network,
        source=name,
        image_size=_side(network.config, how),
        mean=how.get("image_mean") or MEAN,
        std=how.get("image_std") or STD,
        truncate=truncate,
    )


def fingerprint(module: nn.Module) -> str:
    """16 hexadecimal digits by which the weights of a frozen part are recognised.

    They come from the names, the shapes and some values of all tensors, rounded to bfloat16: a copy in that precision, or one
    with LoRA adapters on it, has the same.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if ".lora_" in name or "pooler" in name:  # a pooler is not used, and new in each load where a file has none
            continue
        values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLE)]
        found.update(f"{name.replace('.base_layer.', '.')} {tuple(tensor.shape)}".encode())
        found.update(values.to("cpu", torch.bfloat16).float().numpy().tobytes())
    return found.hexdigest()[:16]


def _transformers(name: str) -> tuple[nn.Module, list[str]]:
    """A vision model, and the weights that its checkpoint lacks; the pooler's are never needed."""
    config = AutoConfig.from_pretrained(name)
    kind = KINDS.get(config.model_type, AutoModel)
    how: dict[str, Any] = {}
    if config.model_type in PARTS:
        how = {"config": config.vision_config, "key_mapping": {r"^vision_model\.": ""}}
    with quiet_loading():
        model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **how)
    if config.model_type in PARTS:
        model.post_layernorm = nn.Identity()
    network: nn.Module = getattr(model, "vision_model", model)
    lacking = [key for key in sorted(info["missing_keys"]) if "pooler" not in key]
    return network, lacking


def _side(config: Any, processor: dict[str, Any]) -> int:
    """Pixels, of the network or of what prepares its pictures."""
    size = getattr(config, "image_size", None) or processor.get("crop_size") or processor.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    return int(size[0] if isinstance(size, list | tuple) else size)


def _cut(network: nn.Module, truncate: int) -> None:
    """Drop the last of a network's blocks: its longest list of modules of one kind."""
    lists = [
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(block) for block in module}) == 1
    ]
    blocks = max(lists, key=len, default=nn.ModuleList())
    if not 0 < truncate < len(blocks):
        raise ValueError(
            f"truncate {truncate}: {type(network).__name__} has {len(blocks)} blocks, of which 1 must stay"
        )
    del blocks[-truncate:]


def _random_crop(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """A part of random area and shape, flipped every second time; the whole if ten tries do not fit."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    left, top, width, height = 0, 0, image.width, image.height
    for _ in range(10):
        area = uniform(*SCALE) * image.width * image.height
        ratio = math.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= image.width and 0 < h <= image.height:
            left, top = (int(uniform(0.0, spare + 1.0)) for spare in (image.width - w, image.height - h))
            width, height = w, h
            break
    image = image.crop((left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if uniform(0.0, 1.0) < 0.5 else image
