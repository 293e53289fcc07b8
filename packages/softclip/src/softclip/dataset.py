"""Batches of pairs for the training loop: images with their regions, captions with their tags."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from softclip.batch import ImageRoiBatch, TextTagBatch
from softclip.readers import Pairs

MOST_IN_MEMORY = 2**32  # bytes of all images
TOKENISED_AT_ONCE = 1024  # texts


class PairDataset(Dataset[tuple[ImageRoiBatch, TextTagBatch]]):
    """Pairs with tokenised texts; a list of positions gives a whole batch.

    Args:
        pairs: see :class:`softclip.readers.Pairs`.
        tokenizer: texts -> int (texts, length).
        image_size: side, pixels. The shorter side of an image is resized to it (bicubic) and its centre cut out.
        preprocess: instead of that, image -> tensor, such as open_clip's; it is done anew each time.
        roi: (float (n, k, f), bool mask (n, k)) as of :func:`softclip.roi.collect`.
        tags: of each image its tags, which are joined by ", " to one text; or frozen features (n, width), zeros for an image
            without.
        group_positives: whether pairs of one group are positives of each other, as several captions of one image are.
        in_memory: whether to decode all images now; by default if that takes less than 4 GiB. Not with ``preprocess``.

    Attributes:
        images: uint8 (n, 3, image_size, image_size) where they are in memory, else None.
        texts: int (n, length). tags: int (n, length) or frozen features, tag_mask: bool (n), False where there are none; or None.
        roi, roi_mask, group_ids: as given; or None.

    Raises:
        ValueError: for regions or tags that are not one for each pair; for an image that cannot be decoded, now or in a batch.

    >>> from softclip.sample import render_scenes
    >>> scenes = render_scenes(5)
    >>> dataset = PairDataset(scenes, lambda texts: torch.tensor([[len(text)] for text in texts]), 32, tags=scenes.tags)
    >>> images, texts = dataset.__getitems__([3, 1])
    >>> images.images.shape, texts.tags.shape
    (torch.Size([2, 3, 32, 32]), torch.Size([2, 1]))
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: Callable[[list[str]], Tensor],
        image_size: int,
        *,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
        roi: tuple[Float[Tensor, "n k f"], Bool[Tensor, "n k"]] | None = None,
        tags: Sequence[Sequence[str]] | Tensor | None = None,
        group_positives: bool = False,
        in_memory: bool | None = None,
    ) -> None:
        for name, values in (("roi", roi and roi[0]), ("roi's mask", roi and roi[1]), ("tags", tags)):
            if values is not None and len(values) != len(pairs):
                raise ValueError(f"{len(pairs)} pairs, but {name} of {len(values)}")
        self.pairs, self.image_size, self.preprocess = pairs, image_size, preprocess
        self.roi: Tensor | None = None if roi is None else roi[0]
        self.roi_mask: Tensor | None = None if roi is None else roi[1]
        self.group_ids = torch.tensor(pairs.groups) if group_positives and pairs.groups is not None else None
        self.texts = _tokens(tokenizer, pairs.captions)
        self.tags = self.tag_mask = None
        if isinstance(tags, Tensor):
            self.tags, self.tag_mask = tags, tags.any(1)
        elif tags is not None:
            self.tags = _tokens(tokenizer, [", ".join(names) for names in tags])
            self.tag_mask = torch.tensor([len(names) > 0 for names in tags])
        if in_memory is None:
            in_memory = len(pairs) * 3 * image_size**2 < MOST_IN_MEMORY
        self.images = self._decoded() if in_memory and preprocess is None else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[ImageRoiBatch, TextTagBatch]:
        """One pair, without the dimension of a batch."""
        images, texts = self.__getitems__([index])
        return images[0], texts[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[ImageRoiBatch, TextTagBatch]:
        rows = torch.as_tensor(indices)

        def take(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        images = torch.stack([self._image(i) for i in indices]) if self.images is None else self.images[rows]
        return (
            ImageRoiBatch(images, take(self.roi), take(self.roi_mask)),
            TextTagBatch(self.texts[rows], take(self.tags), take(self.tag_mask), take(self.group_ids)),
        )

    def _image(self, index: int) -> Tensor:
        image = self.pairs.image(index)
        return square(image, self.image_size) if self.preprocess is None else self.preprocess(image)

    def _decoded(self) -> Tensor:
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def decode(index: int) -> None:
            images[index] = self._image(index)

        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            done = pool.imap_unordered(decode, range(len(self)), chunksize=64)
            for _ in tqdm(done, "decode", len(self), unit=" images", delay=2, leave=False):
                pass
        return images


def square(image: Image.Image, side: int) -> UInt8[Tensor, "3 side side"]:
    """The shorter side resized, and the centre cut out, as open_clip does for evaluation.

    >>> square(Image.new("RGB", (40, 30)), 16).shape
    torch.Size([3, 16, 16])
    """
    resized = F.resize(image, [side], InterpolationMode.BICUBIC)
    return F.pil_to_tensor(F.center_crop(resized, [side, side]))


def _tokens(tokenizer: Callable[[list[str]], Tensor], texts: list[str]) -> Tensor:
    starts = range(0, len(texts), TOKENISED_AT_ONCE)
    parts = tqdm(starts, "tokenise", unit_scale=TOKENISED_AT_ONCE, unit=" texts", delay=2, leave=False)
    return torch.cat([tokenizer(texts[i : i + TOKENISED_AT_ONCE]) for i in parts])
