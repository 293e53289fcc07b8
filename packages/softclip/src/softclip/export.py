"""A trained CLIP for other programs: a clean folder of open_clip, without what only the training needed; the verb ``export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from papercore.lab.cli import flag
from papercore.lab.report import console

from softclip.checkpoints import LoadedClip, load_clip, save_clip


def export_clip(loaded: LoadedClip, folder: str | Path) -> None:
    """Write the folder, and see that what open_clip loads from it computes the same.

    Raises:
        RuntimeError: if it does not.
    """
    save_clip(folder, loaded.clip, loaded.model_cfg, loaded.mean, loaded.std)
    images = torch.randn(2, 3, loaded.image_size, loaded.image_size, generator=torch.Generator().manual_seed(0))
    texts = loaded.tokenizer(["a red cat", "two dogs on a beach"])
    again = open_clip.create_model(f"local-dir:{folder}").eval()
    for ours, theirs in zip(_features(loaded.clip, images, texts), _features(again, images, texts), strict=True):
        if not torch.allclose(ours, theirs, atol=1e-5):
            raise RuntimeError(f"{folder}: open_clip computes other features from it, by {(ours - theirs).abs().max()}")


@torch.no_grad()
def _features(clip: Any, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return clip.encode_image(images, normalize=True), clip.encode_text(texts, normalize=True)


@dataclass
class ExportOptions:
    """What to write, and where."""

    model: str = flag("folder of a run, or a .pt or .safetensors file such as softclip-train's epoch_N.pt")
    output_dir: str = flag("folder to write")
    clip: str | None = flag("for a file, its network: a name of open_clip, tiny-resnet, tiny-vit, or a JSON file", None)


def export(options: ExportOptions) -> Path:
    """The verb ``export``."""
    spec, folder = options.model, Path(options.output_dir)
    if Path(spec).is_file():
        if options.clip is None:
            raise ValueError(f"{spec}: a file does not say which network it is: give its name, such as --clip RN50")
        spec = f"{options.clip}:{spec}"
    elif options.clip is not None:
        raise ValueError(f"--clip goes with a file of weights, and {spec} is none")
    if Path(spec).is_dir() and folder.resolve() == Path(spec).resolve():
        raise ValueError(f"{folder} is the model itself: give another --output_dir")
    loaded = load_clip(spec)
    export_clip(loaded, folder)
    console.print(
        f"{folder}: images (batch, 3, {loaded.image_size}, {loaded.image_size}) and texts to {loaded.model_cfg['embed_dim']} "
        f"features; load it by\nimport open_clip\n"
        f"model, _, preprocess = open_clip.create_model_and_transforms({f'local-dir:{folder}'!r})\n"
        f"tokenizer = open_clip.get_tokenizer({f'local-dir:{folder}'!r})",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    return folder
