"""Features of frozen pictures: each distinct image is encoded once, and its tokens are kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from papercore.lab.files import write_json
from torch import Tensor
from tqdm.auto import tqdm

from mmict.samples import Samples
from mmict.vision import VisionEncoder, fingerprint

DTYPES = {torch.float16: np.float16, torch.float32: np.float32}
BLOCK = 1024  # images that are pooled at a time


class Features:
    """Tokens of the images of a :class:`Samples`, by their rows there; see :func:`encode`.

    Args:
        array: (images, P, width) float16 or float32, in memory or mapped from a file.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n P width"]:
        """Float32, on the CPU."""
        return torch.from_numpy(self.array[rows.cpu().numpy()]).float()

    def pooled(self) -> Float[Tensor, "images width"]:
        """The mean over an image's tokens, of length 1: what visual neighbours are found by."""
        return torch.cat([F.normalize(self[rows].mean(1), dim=1) for rows in torch.arange(len(self)).split(BLOCK)])


def encode(
    vision: VisionEncoder,
    samples: Samples,
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Features:
    """Let the encoder see each image once; or read what it saw from ``path``, if the file is of these images and this encoder.

    Features are of whole pictures: who trains on random crops (:meth:`VisionEncoder.augmented`) cannot use them.

    Args:
        path: a .npy file, which is mapped, not loaded; a .json beside it says what it was made of. A file made of something else
            is made anew. None: keep them in memory.
        dtype: to keep them in, float16 or float32: an image takes P * width * 2 or 4 bytes.
        device: where the encoder is, or is moved to.

    Raises:
        ValueError: for a file at ``path`` that is not ours; features that float16 cannot hold; an image that cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"features are kept in float16 or float32, not {dtype}")
    shape = (len(samples.images), vision.tokens, vision.width)
    if path is None:
        array = np.empty(shape, DTYPES[dtype])
        _fill(array, vision, samples, batch_size, device, progress)
        return Features(array)
    path = Path(path).with_suffix(".npy")
    key, beside = _key(vision, samples, dtype), path.with_suffix(".json")
    if path.exists():
        if not beside.exists():
            raise ValueError(
                f"{path} has no {beside.name} beside it, so it is not ours: name another file, or remove it"
            )
        if json.loads(beside.read_text()) == key:
            return Features(np.load(path, mmap_mode="r"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=DTYPES[dtype], shape=shape)
        _fill(array, vision, samples, batch_size, device, progress)
        array.flush()
        write_json(beside, {})  # until the new file is there, the old one belongs to nothing
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(beside, key)
    return Features(np.load(path, mmap_mode="r"))


def _fill(
    array: np.ndarray,
    vision: VisionEncoder,
    samples: Samples,
    batch_size: int,
    device: str | torch.device,
    progress: bool,
) -> None:
    vision.to(device)
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(array), desc="features", unit="image", disable=not progress, dynamic_ncols=True) as bar,
    ):
        for start in range(0, len(array), batch_size):
            rows = range(start, min(start + batch_size, len(array)))
            pixels = torch.cat(list(pool.map(lambda row: vision.pixels([samples.open(row)]), rows)))
            found = vision(pixels.to(device)).float().cpu().numpy()
            if not np.abs(found).max() <= np.finfo(array.dtype).max:
                raise ValueError(
                    f"features up to {np.abs(found).max():g} do not fit {array.dtype}: keep them in float32"
                )
            array[start : rows.stop] = found
            bar.update(len(rows))


def _key(vision: VisionEncoder, samples: Samples, dtype: torch.dtype) -> dict[str, Any]:
    """What features depend on, for JSON."""
    images = hashlib.sha256()
    for image in samples.images:
        if isinstance(image, np.ndarray):
            images.update(f"{image.shape} {hashlib.sha256(image.tobytes()).hexdigest()}\n".encode())
        else:
            file = Path(image).stat()
            images.update(f"{image} {file.st_size} {file.st_mtime_ns}\n".encode())
    return {
        "images": [len(samples.images), images.hexdigest()],
        "encoder": [vision.source, fingerprint(vision.network)],
        "pixels": [vision.image_size, *vision.mean, *vision.std],
        "dtype": str(dtype).removeprefix("torch."),
    }
