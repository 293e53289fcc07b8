"""Scores of whole images: crops are cut while they are needed, so that memory does not grow with the size or number of images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from iqa_distill.images import check_tensor, open_rgb
from iqa_distill.model import RKIQT


def score_images(
    model: RKIQT,
    sources: Any,
    *,
    normalize: bool = False,
    max_crops_per_batch: int = 64,
    progress: bool = False,
) -> NDArray[np.float64]:
    """The quality of each image, the mean over its crops; higher is better.

    Images are decoded one after another, and crops of several share a batch. The crops of an image depend on its size and the
    model's ``preprocessing`` alone, so that its score is the same among any others.

    Args:
        model: where its weights are is where it runs; its mode is as before afterwards.
        sources: paths, bytes, arrays (h, w, 3), PIL images or tensors, see :func:`iqa_distill.images.open_rgb`; an iterable of
            them, one path, or a tensor (n, 3, h, w) of RGB: uint8, or floats from 0 to 1, which are not rounded.
        normalize: 0..1 for the range of the training scores, which a score may leave a little, not the data set's own units.
        max_crops_per_batch: bounds the memory; it does not change a score.

    Returns:
        (images,).

    Raises:
        ValueError: for an image that cannot be read or is smaller than 32 pixels, naming it, and for a tensor beyond 0..1.
        OSError: for a path that cannot be read.
    """
    if max_crops_per_batch < 1:
        raise ValueError(f"max_crops_per_batch must be at least 1, got {max_crops_per_batch}")
    if isinstance(sources, str | Path):
        sources = [sources]
    if isinstance(sources, Tensor):
        sources = sources if sources.ndim == 4 else sources[None]
    total = len(sources) if isinstance(sources, Sized) else None
    bar = tqdm(sources, "scoring", total, unit="image", delay=2, leave=False, disable=None if progress else True)
    crops = (_crops(model, source, f"image {number}") for number, source in enumerate(bar, 1))
    device = next(model.parameters()).device
    found: list[Tensor] = []
    with torch.inference_mode(), _evaluating(model):
        for batch in _batches(crops, max_crops_per_batch):
            found.append(model.predict(model.preprocessing.normalize(batch.to(device))).cpu().double())
    if not found:
        return np.zeros(0)
    scores = torch.cat(found).view(-1, model.preprocessing.crops).mean(1).numpy()
    return np.asarray(model.scale.unit(scores) if normalize else model.scale.restore(scores), dtype=np.float64)


def score_tensor(
    model: RKIQT, images: Float[Tensor, "images 3 height width"], *, normalize: bool = False
) -> Float[Tensor, " images"]:
    """:func:`score_images` of a tensor, differentiable in the images. All crops are in memory at once.

    Args:
        images: floats from 0 to 1. normalize: 0..1 for the range of the training scores.

    Raises:
        ValueError: as :func:`iqa_distill.images.check_tensor`.
    """
    crops = torch.cat([_tensor_crops(model, image) for image in check_tensor(images)])
    with _evaluating(model):
        scores = model.predict(model.preprocessing.normalize(crops.to(next(model.parameters()).device)))
    scores = scores.view(-1, model.preprocessing.crops).mean(1)
    return model.scale.unit(scores) if normalize else model.scale.restore(scores)


def _crops(model: RKIQT, source: Any, name: str) -> Tensor:
    """(crops, 3, c, c) of 0..255."""
    if isinstance(source, Tensor) and source.dtype != torch.uint8:
        return _tensor_crops(model, check_tensor(source)[0])
    if isinstance(source, Tensor):
        source = source.movedim(0, -1).cpu().numpy()
    image = open_rgb(source, None if isinstance(source, str | Path) else name)
    return model.preprocessing.crops_of(torch.from_numpy(model.preprocessing.resized(image)).movedim(-1, 0))


def _tensor_crops(model: RKIQT, image: Tensor) -> Tensor:
    """(crops, 3, c, c) of 0..255, of an image (3, h, w) of 0..1, resized as Pillow does it but without its rounding."""
    if model.preprocessing.resize is not None:
        size = model.preprocessing.resize
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    return model.preprocessing.crops_of(255 * image)


def _batches(crops: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Crops of all images in their order, ``size`` at a time."""
    waiting = torch.empty(0, dtype=torch.uint8)
    for new in crops:
        waiting = torch.cat([waiting, new])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        yield waiting


@contextlib.contextmanager
def _evaluating(model: RKIQT) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
