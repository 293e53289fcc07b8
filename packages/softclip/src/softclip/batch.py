"""What a step sees: images with their regions, captions with their tags. open_clip's training loop takes them for tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


class _Moves:
    """Moves and counts as a tensor does."""

    def _fields(self) -> dict[str, Tensor | None]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Self:
        """On a device; ``dtype`` is for numbers with a fraction, whereas tokens, masks and bytes stay what they are."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=non_blocking)

        return type(self)(**{name: move(tensor) for name, tensor in self._fields().items()})

    def pin_memory(self) -> Self:
        return type(self)(**{k: None if v is None else v.pin_memory() for k, v in self._fields().items()})

    def __getitem__(self, rows: Any) -> Self:
        """Some of the pairs."""
        return type(self)(**{k: None if v is None else v[rows] for k, v in self._fields().items()})

    @property
    def _first(self) -> Tensor:
        first = next(iter(self._fields().values()))
        assert first is not None
        return first

    def __len__(self) -> int:
        return len(self._first)

    @property
    def shape(self) -> torch.Size:
        return self._first.shape

    @property
    def device(self) -> torch.device:
        return self._first.device


@dataclass
class ImageRoiBatch(_Moves):
    """Images and the regions of interest found in them.

    Args:
        images: (b, 3, height, width), uint8, or floating and normalised.
        roi: (b, k, f), a vector for each region; rows beyond an image's own are padding. None: no regions.
        roi_mask: bool (b, k), False is padding; None: none is.
    """

    images: Tensor
    roi: Tensor | None = None
    roi_mask: Tensor | None = None


@dataclass
class TextTagBatch(_Moves):
    """Captions and the images' tags, tokenised.

    Args:
        texts: int (b, length). tags: int (b, length), an image's tags as one text. None: no tags.
        tag_mask: bool (b), False: this image has no tags. None: all have.
        group_ids: int (b); pairs of one number are positives of each other, as several captions of one image. None: no two are.
    """

    texts: Tensor
    tags: Tensor | None = None
    tag_mask: Tensor | None = None
    group_ids: Tensor | None = None
