"""Regions of interest of images, and the names of what is in them; from any source, all ours.

The paper's regions come from an object detector, ten of each image. Here whatever gives a vector for each region will do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import timm.data
import torch
import torchvision
from jaxtyping import Bool, Float
from papercore.ops import pick_device
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from softclip.readers import Pairs

logger = logging.getLogger(__name__)

_HALVES = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.25, 0.5) for x in (0.0, 0.25, 0.5)]
GRID = torch.tensor([(0.0, 0.0, 1.0, 1.0), *_HALVES])  # the whole image and nine boxes of half its sides
THUMBNAIL = 8  # pixels


class RoiTags(NamedTuple):
    """What is known of an image.

    Args:
        roi: float32 (k, f), a vector for each region, k = 0 if there is none.
        tags: names of what is in the image; None if the source does not tell.
    """

    roi: Float[Tensor, "k f"]
    tags: list[str] | None = None


class RoiTagProvider(Protocol):
    """Gives the regions of an image in RGB; ``index`` is its position in the pairs. Any such function will do.

    >>> from softclip.sample import render_scenes
    >>> def colour(image: Image.Image, index: int) -> RoiTags:  # the whole image as one region, and a tag
    ...     return RoiTags(torch.tensor([image.resize((1, 1)).getpixel((0, 0))]) / 255, ["scene"])
    >>> roi, mask, tags = collect(colour, render_scenes(4))
    >>> roi.shape, tags[0]
    (torch.Size([4, 1, 3]), ['scene'])
    """

    def __call__(self, image: Image.Image, index: int) -> RoiTags: ...


class Thumbnails:
    """Each region's pixels, shrunk to 8 x 8, and its box: 196 numbers. Hand-crafted, no network.

    Args:
        boxes: of each image (k, 4), x0, y0, x1, y1 as shares of its sides, 0 to 1. None: the ten of :data:`GRID`.

    >>> Thumbnails()(Image.new("RGB", (30, 20), "white"), 0).roi.shape
    torch.Size([10, 196])
    """

    def __init__(self, boxes: Sequence[Tensor] | None = None) -> None:
        self.boxes = boxes

    def __call__(self, image: Image.Image, index: int) -> RoiTags:
        boxes = GRID if self.boxes is None else self.boxes[index]
        crops = _crops(image, boxes, (THUMBNAIL, THUMBNAIL))
        return RoiTags(torch.cat([crops.flatten(1) * 2 - 1, boxes], 1))  # pixels in -1 to 1


class GridCrops:
    """The ten boxes of :data:`GRID` through a frozen network, and the boxes.

    Args:
        model: a name of timm, whose weights are fetched if they are not there, or a module: images (n, 3, h, w), normalised ->
            features (n, f). Size, mean and deviation of the images are those of its ``pretrained_cfg``, or ImageNet's usual.

    Raises:
        ValueError: for a name that timm lacks.
    """

    def __init__(self, model: str | nn.Module) -> None:
        if isinstance(model, str):
            try:
                model = timm.create_model(model, pretrained=True, num_classes=0).to(pick_device())
            except RuntimeError as error:
                raise ValueError(f"grid:{model}: timm cannot make this model: {error}") from None
        self.model = model.eval().requires_grad_(False)
        self.config = timm.data.config.resolve_model_data_config(self.model)

    def __call__(self, image: Image.Image, index: int) -> RoiTags:
        height, width = self.config["input_size"][1:]
        crops = F.normalize(_crops(image, GRID, (width, height)), self.config["mean"], self.config["std"])
        with torch.no_grad():
            features = self.model(crops.to(_device(self.model))).float().cpu()
        return RoiTags(torch.cat([features, GRID], 1))


class Detector:
    """The most confident objects of a frozen detector: a feature and a box of each, and their classes as tags.

    Args:
        model: a detection model of torchvision with a box head (fasterrcnn_..., maskrcnn_..., keypointrcnn_...), by name, whose
            weights are fetched if they are not there, or a module.
        classes: names by number, where a module is given; None: there are no tags.
        most: objects of an image.

    Raises:
        ValueError: for a name that torchvision lacks, or a model without box head.
    """

    def __init__(self, model: str | nn.Module, classes: Sequence[str] | None = None, most: int = 10) -> None:
        if isinstance(model, str):
            known = torchvision.models.list_models(torchvision.models.detection, include="*rcnn*")
            if model not in known:
                raise ValueError(f"detector:{model}: expected one of {', '.join(known)}")
            weights = torchvision.models.get_model_weights(model).DEFAULT
            classes = weights.meta["categories"]
            model = cast(nn.Module, torchvision.models.get_model(model, weights=weights).to(pick_device()))
        if not hasattr(getattr(model, "roi_heads", None), "box_head"):
            raise ValueError(f"a detector needs a box head, as Faster R-CNN has; {type(model).__name__} has none")
        self.model: Any = model
        model.eval().requires_grad_(False)
        self.classes, self.most = classes, most

    @torch.no_grad()
    def __call__(self, image: Image.Image, index: int) -> RoiTags:
        pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True).to(_device(self.model))
        images, _ = self.model.transform([pixels])
        features = self.model.backbone(images.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        proposals, _ = self.model.rpn(images, features)
        heads = self.model.roi_heads
        found = heads(features, proposals, images.image_sizes)[0][0]  # by falling confidence
        boxes = found["boxes"][: self.most]
        vectors = heads.box_head(heads.box_roi_pool(features, [boxes], images.image_sizes))
        height, width = images.image_sizes[0]
        shares = boxes / boxes.new_tensor([width, height, width, height])
        tags = None
        if self.classes is not None:
            tags = [self.classes[label] for label in found["labels"][: self.most].tolist()]
        return RoiTags(torch.cat([vectors, shares], 1).float().cpu(), tags)


class Precomputed:
    """Vectors made before.

    Args:
        arrays: of each image (k, f), or a function that reads them.
    """

    def __init__(self, arrays: Sequence[np.ndarray] | Callable[[int], np.ndarray]) -> None:
        self.read = arrays if callable(arrays) else arrays.__getitem__

    def __call__(self, image: Image.Image, index: int) -> RoiTags:
        return RoiTags(torch.from_numpy(np.asarray(self.read(index), np.float32)))


def provider_for(spec: str, pairs: Pairs) -> RoiTagProvider | None:
    """The source of regions that ``spec`` names.

    Args:
        spec: ``none`` (gives None), ``thumbnails`` (of the pairs' own boxes if they have any), ``grid:TIMM_NAME``,
            ``detector:TORCHVISION_NAME``, or ``field`` (the pairs' own vectors).

    Raises:
        ValueError: for any other, or ``field`` where the pairs have none.
    """
    kind, _, name = spec.partition(":")
    if spec == "none":
        return None
    if spec == "thumbnails":
        return Thumbnails(pairs.boxes)
    if spec == "field":
        if pairs.roi is None:
            raise ValueError("roi field: these data have no regions of their own; name where they are by roi_field")
        return Precomputed(pairs.roi)
    if kind == "grid" and name:
        return GridCrops(name)
    if kind == "detector" and name:
        return Detector(name)
    raise ValueError(f"roi {spec!r}: expected none, thumbnails, grid:TIMM_NAME, detector:TORCHVISION_NAME or field")


def collect(
    provider: RoiTagProvider, pairs: Pairs
) -> tuple[Float[Tensor, "n k f"], Bool[Tensor, "n k"], list[list[str]] | None]:
    """The regions of all images, held in memory, and their tags.

    Returns:
        (roi, mask, tags): rows beyond an image's own are zeros and False in the mask; tags are None if the provider gives none.
        Images without regions are counted in one warning.

    Raises:
        ValueError: if vectors are not (k, f), differ in width, or are not finite, or an image cannot be decoded, naming the
            image; if no image has a region.
    """
    rois: list[Tensor] = []
    tags: list[list[str]] = []
    told = False
    width = None
    for i in tqdm(range(len(pairs)), "regions", unit=" images", delay=2, leave=False):
        found = provider(pairs.image(i), i)
        roi = found.roi.float()
        if roi.ndim != 2:
            raise ValueError(f"{pairs.names[i]}: regions must be an array (k, f), got {tuple(roi.shape)}")
        if len(roi):
            width = width or roi.shape[1]
            if roi.shape[1] != width:
                raise ValueError(f"{pairs.names[i]}: regions of width {roi.shape[1]}, but those before have {width}")
            if not roi.isfinite().all():
                raise ValueError(f"{pairs.names[i]}: a region has a value that is NaN or infinite")
        rois.append(roi)
        tags.append(found.tags or [])
        told |= found.tags is not None
    if width is None:
        raise ValueError("none of the images has a region")
    counts = torch.tensor([len(roi) for roi in rois])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    padded = torch.zeros(*mask.shape, width)
    padded[mask] = torch.cat([roi for roi in rois if len(roi)])
    if lacking := int((counts == 0).sum()):
        logger.warning("%d of %d images have no region; their targets stay one-hot", lacking, len(rois))
    return padded, mask, tags if told else None


def _crops(image: Image.Image, boxes: Tensor, size: tuple[int, int]) -> Float[Tensor, "k 3 height width"]:
    """Boxes of an image at one size (width, height), 0 to 1."""
    scale = torch.tensor([image.width, image.height] * 2)
    crops = [image.resize(size, Image.Resampling.BICUBIC, tuple(box)) for box in (boxes.clamp(0, 1) * scale).tolist()]
    pixels = np.array([np.asarray(crop) for crop in crops], np.float32).reshape(-1, size[1], size[0], 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)
