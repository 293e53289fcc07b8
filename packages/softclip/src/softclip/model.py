"""An open_clip model that also looks at regions and tags: what SoftCLIP trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softclip.batch import ImageRoiBatch, TextTagBatch

SHARED_BLOCKS = 3  # of a ViT, as in the same authors' PyramidCLIP
NORM_EPS = 1e-6  # for rows of zeros
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class RoiEncoder(nn.Module):
    """Regions to one embedding, by the rear of the image tower: its attention pooling, or its last blocks.

    As in PyramidCLIP's code: a CLIP ResNet's regions are projected, preceded by their mean, normalised, and pooled by the image
    branch's attention; a ViT's are projected, preceded by the class token, and pass the last 3 blocks. There are no position
    embeddings: boxes are part of the regions' vectors. Only projection and norm are this module's own.

    Args:
        visual: the tower, open_clip's ModifiedResNet or VisionTransformer. It is given to each call, not held.
        roi_width: f, of a region's vector.

    Raises:
        ValueError: for another tower, whose rear it does not know.

    Example:
        >>> from softclip.checkpoints import new_clip
        >>> clip, _ = new_clip("tiny-vit", seed=0)  # or any CLIP ViT or ResNet of open_clip.create_model
        >>> encoder = RoiEncoder(clip.visual, roi_width=196)
        >>> encoder(clip.visual, torch.randn(2, 10, 196)).shape  # ten regions of each of two images
        torch.Size([2, 128])
    """

    def __init__(self, visual: Any, roi_width: int) -> None:
        super().__init__()
        self.resnet = hasattr(visual, "attnpool")
        if self.resnet:
            width = visual.attnpool.k_proj.in_features
            self.norm = nn.LayerNorm(width)
        elif hasattr(visual, "class_embedding") and getattr(visual, "attn_pool", None) is None:
            width = visual.class_embedding.shape[0]
        else:
            raise ValueError(
                f"no way is known to encode regions by a {type(visual).__name__}: take a CLIP ResNet or ViT, or frozen guides"
            )
        self.projection = nn.Parameter(torch.randn(roi_width, width) * width**-0.5)

    def forward(self, visual: Any, roi: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, k, f) and bool (b, k), False: padding -> (b, d), not normalised."""
        if roi.shape[-1] != len(self.projection):
            raise ValueError(f"regions are {roi.shape[-1]} wide, and this encoder is for {len(self.projection)}")
        x = roi.to(self.projection.dtype) @ self.projection
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        kept = mask.unsqueeze(-1)
        if self.resnet:
            first = (x * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        else:
            first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([first, x], 1)
        padding = F.pad(~mask, (1, 0))  # the first token always stays
        return self._pool(visual, self.norm(x), padding) if self.resnet else self._blocks(visual, x, padding)

    def _pool(self, visual: Any, x: Tensor, padding: Tensor) -> Tensor:
        pool = visual.attnpool
        x = x.transpose(0, 1)
        pooled, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], pool.num_heads, None,
            torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
            pool.c_proj.weight, pool.c_proj.bias, training=self.training, key_padding_mask=padding, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight,
            v_proj_weight=pool.v_proj.weight,
        )  # fmt: skip
        return pooled[0]

    def _blocks(self, visual: Any, x: Tensor, padding: Tensor) -> Tensor:
        x = visual.ln_pre(x)
        blocks = visual.transformer.resblocks[-SHARED_BLOCKS:]
        heads = blocks[0].attn.num_heads
        mask = torch.zeros_like(padding, dtype=x.dtype).masked_fill_(padding, -torch.inf)
        mask = mask[:, None, None].expand(-1, heads, x.shape[1], -1).reshape(-1, x.shape[1], x.shape[1])
        for block in blocks:
            x = block(x, attn_mask=mask)
        x = visual.ln_post(x[:, 0])
        return x if visual.proj is None else x @ visual.proj


class SoftClipModel(nn.Module):
    """Any open_clip CLIP, which with regions and tags in the batch also gives their features.

    Its state is the CLIP's own, with the same names, and ``roi_encoder.*`` if there is one, so that checkpoints are open_clip's.
    What is not found here is looked up in the CLIP.

    Args:
        clip: with ``encode_image``, ``encode_text``, ``visual`` and ``logit_scale``.
        roi_encoder: None: regions are frozen guides, whose mean is their embedding.

    Example:
        >>> from softclip.checkpoints import new_clip
        >>> clip, _ = new_clip("tiny-vit", seed=0)
        >>> model = SoftClipModel(clip, RoiEncoder(clip.visual, roi_width=196))
        >>> images = ImageRoiBatch(torch.randn(2, 3, 32, 32), roi=torch.randn(2, 10, 196))
        >>> tokens = torch.randint(1, 99, (2, 16))
        >>> output = model(images, TextTagBatch(tokens, tags=tokens))
        >>> ", ".join(output)
        'image_features, roi_features, text_features, tag_features, logit_scale'
    """

    def __init__(self, clip: nn.Module, roi_encoder: RoiEncoder | None = None) -> None:
        super().__init__()
        self.clip, self.roi_encoder = clip, roi_encoder
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_restore)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("clip"), name)

    def forward(
        self,
        image: Tensor | ImageRoiBatch | None = None,
        text: Tensor | TextTagBatch | None = None,
        micro_batch_size: int | None = None,
    ) -> dict[str, Any]:
        """What open_clip's loop hands on to the loss: features with rows of length 1, and the scale after exponentiation.

        Args:
            micro_batch_size: pairs that are encoded at a time, twice each (gradient caching, Gao et al. 2021): activations of so
                many are held, the loss is that of all. For towers without batch statistics.

        Returns:
            ``image_features``, ``text_features`` (b, d), ``logit_scale`` and, as far as the batch has them, ``roi_features``,
            ``tag_features``, ``roi_valid`` and ``tag_valid`` (bool (b)), ``group_ids``, ``logit_bias``.
        """
        if micro_batch_size is None:
            output = self._encode(image, text)
        else:
            if any(isinstance(module, _BATCH_NORMS) for module in self.modules()):
                raise ValueError("micro_batch_size: batch norm would see one micro-batch at a time; take a ViT tower")
            assert image is not None
            assert text is not None
            parts = [slice(i, i + micro_batch_size) for i in range(0, len(image), micro_batch_size)]
            outputs = [checkpoint(self._encode, image[part], text[part], use_reentrant=False) for part in parts]
            output = {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}
        output["logit_scale"] = self.clip.logit_scale.exp()  # type: ignore[operator]
        bias = getattr(self.clip, "logit_bias", None)
        return output if bias is None else {**output, "logit_bias": bias}

    def _encode(self, image: Tensor | ImageRoiBatch | None, text: Tensor | TextTagBatch | None) -> dict[str, Tensor]:
        images = ImageRoiBatch(image) if isinstance(image, Tensor) else image
        texts = TextTagBatch(text) if isinstance(text, Tensor) else text
        output: dict[str, Tensor] = {}
        if images is not None:
            output["image_features"] = _normalized(self.clip.encode_image(images.images))  # type: ignore[operator]
            if images.roi is not None:
                output["roi_features"] = self._encode_roi(images.roi, images.roi_mask)
                if images.roi_mask is not None:
                    output["roi_valid"] = images.roi_mask.any(1)
        if texts is not None:
            output["text_features"] = _normalized(self.clip.encode_text(texts.texts))  # type: ignore[operator]
            if texts.tags is not None:
                frozen = texts.tags.is_floating_point()
                features = texts.tags if frozen else self.clip.encode_text(texts.tags)  # type: ignore[operator]
                output["tag_features"] = _normalized(features)
                if texts.tag_mask is not None:
                    output["tag_valid"] = texts.tag_mask
            if texts.group_ids is not None:
                output["group_ids"] = texts.group_ids
        return output

    def _encode_roi(self, roi: Tensor, mask: Tensor | None) -> Tensor:
        if self.roi_encoder is not None:
            return _normalized(self.roi_encoder(self.clip.visual, roi, mask))
        kept = 1.0 if mask is None else mask.unsqueeze(-1)
        return _normalized((roi * kept).sum(1))


def normalized(images: Tensor, visual: Any) -> Tensor:
    """Images of 0 to 1 as the tower wants them: less the mean, by the deviation, per channel."""
    config = getattr(visual, "preprocess_cfg", {})
    mean, std = (
        images.new_tensor(config.get(name, default)).view(3, 1, 1)
        for name, default in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD))
    )
    return (images - mean) / std


def _normalized(features: Tensor) -> Tensor:
    """Rows of length 1, computed in float32 at least."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1, eps=NORM_EPS)


def _strip(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}clip.")]:
        state[prefix + name.removeprefix(f"{prefix}clip.")] = state.pop(name)


def _restore(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(state, dict)
    for name in [
        n for n in state if n.startswith(prefix) and not n.startswith((f"{prefix}roi_encoder.", f"{prefix}clip."))
    ]:
        state[f"{prefix}clip.{name.removeprefix(prefix)}"] = state.pop(name)
