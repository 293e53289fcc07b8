"""A teacher that sees each view once: a fixed set of views of every image, and its embeddings of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from disco.augment import Augmentation, Draws
from disco.checkpoints import weights_hash
from disco.data import Images
from disco.encoder import Encoder
from disco.loss import unit


class FixedViews:
    """The same few random views of each image in every epoch, so that a teacher's embeddings of them can be kept.

    The teacher is most of the cost of a step (its two passes are about three quarters for ResNet-50 and EfficientNet-B0). With V
    views an image has V (V - 1) / 2 pairs; the embeddings take V x images x dim x 2 bytes.

    Args:
        augmentation: draws them. images: how many there are. views: V, at least 2. seed: of the draws.

    Raises:
        ValueError: for fewer than 2 views.
    """

    def __init__(self, augmentation: Augmentation, images: int, views: int, seed: int = 0) -> None:
        if views < 2:
            raise ValueError(f"a pair of views needs at least 2 for each image, got {views}")
        self.augmentation, self.views, self.seed = augmentation, views, seed
        drawn = [augmentation.draw(images, torch.Generator().manual_seed(1_000_003 * seed + v)) for v in range(views)]
        self.draws = Draws(*(torch.stack(values) for values in zip(*drawn, strict=True)))
        self.embeddings: Tensor | None = None  # (views, images, dim), float16

    def pair(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two different views for each of ``count`` images."""
        first = torch.randint(self.views, (count,), generator=generator)
        other = torch.randint(1, self.views, (count,), generator=generator)
        return first, (first + other) % self.views

    def of(self, index: Tensor, view: Tensor) -> Draws:
        """The draws of images ``index`` in their views ``view``."""
        return Draws(*(values[view, index] for values in self.draws))

    def teacher(self, index: Tensor, view: Tensor) -> Tensor:
        """(batch, dim), unit rows: what the teacher made of them."""
        assert self.embeddings is not None
        return unit(self.embeddings[view, index].float())

    def embed(self, teacher: Encoder, images: Images, path: Path, device: torch.device, bf16: bool = False) -> None:
        """Let the teacher see every view once, in eval mode, and keep what it makes of them in ``path``; or read it from there.

        Raises:
            ValueError: if ``path`` was written for another teacher, another number of images or other views, or is none of ours.
        """
        belongs = {
            "teacher": weights_hash(teacher),
            "images": str(len(images)),
            "views": f"{self.views} of seed {self.seed}, {self.augmentation}",
        }
        if path.exists():
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a file of embeddings ({error}): delete it, or name another") from None
            with file:
                known = file.metadata() or {}
                for key, value in belongs.items():
                    if known.get(key) != value:
                        raise ValueError(
                            f"{path} was written for {key} {known.get(key)}, now {value}: delete it, or name another"
                        )
                self.embeddings = file.get_tensor("embeddings")
            return
        self.embeddings = self._embed(teacher.eval().to(device), images, device, bf16)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({"embeddings": self.embeddings}, temporary, belongs)
        temporary.replace(path)

    @torch.inference_mode()
    def _embed(self, teacher: Encoder, images: Images, device: torch.device, bf16: bool) -> Tensor:
        embeddings = torch.empty(self.views, len(images), teacher.dim, dtype=torch.float16)
        with tqdm(
            total=embeddings.shape[:2].numel(), desc="teacher", unit="view", dynamic_ncols=True, mininterval=1
        ) as bar:
            for index in torch.arange(len(images)).split(256):
                batch = images.__getitems__(index.tolist())["images"].to(device)
                for v in range(self.views):
                    views = teacher.normalize(self.augmentation(batch, self.of(index, torch.full_like(index, v))))
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        embedded = teacher(views.contiguous(memory_format=torch.channels_last))
                    embeddings[v, index] = unit(embedded).to("cpu", torch.float16)
                    bar.update(len(index))
        return embeddings
