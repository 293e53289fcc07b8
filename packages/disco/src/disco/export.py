"""A trained backbone for other programs, without its head: a state dict that timm and torchvision load; the verb ``export``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from papercore.lab.cli import flag
from papercore.lab.report import console
from safetensors.torch import save_file
from torch import nn

from disco.backbones import library_options
from disco.checkpoints import load_encoder
from disco.encoder import Encoder


def export_backbone(encoder: Encoder, path: str | Path) -> None:
    """Write the backbone's state dict as safetensors, with its name, width, image size, mean and std in the metadata, as JSON.

    The names are those of ``timm.create_model(NAME, num_classes=0)``, or of torchvision's network without its last Linear.

    Raises:
        ValueError: if the file is not called .safetensors: by the suffix timm tells what it reads.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    about = {
        "backbone": encoder.backbone_name,
        "width": encoder.width,
        "image_size": encoder.image_size,
        "mean": encoder.mean,
        "std": encoder.std,
    }
    weights = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in encoder.backbone.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(weights, temporary, {"format": "pt", **{key: json.dumps(value) for key, value in about.items()}})
    temporary.replace(path)


def loading_code(encoder: Encoder, path: str | Path) -> str:
    """Two lines of Python that make ``model`` from what :func:`export_backbone` wrote.

    >>> print(loading_code(Encoder("resnet18", image_size=32), "r18.safetensors"))
    import timm
    model = timm.create_model('resnet18', num_classes=0, checkpoint_path='r18.safetensors')

    Raises:
        ValueError: for a backbone without a name.
    """
    if encoder.backbone_name is None:
        raise ValueError("the backbone is a module without a name, which only its own program can build")
    library, _, name = encoder.backbone_name.rpartition(":")
    if library == "cnn":
        return (
            "import disco.backbones, safetensors.torch; "
            f"model = disco.backbones.build_backbone({encoder.backbone_name!r})\n"
            f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
        )
    library = library or "timm"
    options = "".join(f", {k}={v}" for k, v in library_options(library, name, encoder.image_size).items())
    if library == "timm":
        return (
            f"import timm\nmodel = timm.create_model({name!r}, num_classes=0{options}, checkpoint_path={str(path)!r})"
        )
    classifier = [place for place, module in encoder.backbone.named_modules() if isinstance(module, nn.Identity)][-1]
    return (
        "import safetensors.torch, torch, torchvision; "
        f"model = torchvision.models.get_model({name!r}{options})\n"
        f"model.set_submodule({classifier!r}, torch.nn.Identity()); "
        f"model.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    )


@dataclass
class ExportOptions:
    """What to write."""

    model: str = flag("folder of an encoder, as `disco` writes it")
    output: str | None = flag("file to write, .safetensors; backbone.safetensors in that folder if not given", None)


def export(options: ExportOptions) -> Path:
    """The verb ``export``."""
    encoder = load_encoder(options.model)
    path = Path(options.output or Path(options.model) / "backbone.safetensors")
    export_backbone(encoder, path)
    console.print(
        f"{path}: {encoder.backbone_name}, images (batch, 3, {encoder.image_size}, {encoder.image_size}) to features "
        f"(batch, {encoder.width}); mean {encoder.mean}, std {encoder.std}; load it by",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    console.print(loading_code(encoder, path), soft_wrap=True, markup=False, highlight=False)
    return path
