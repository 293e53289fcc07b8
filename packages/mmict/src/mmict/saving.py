"""A checkpoint: what was trained, and the names and fingerprints of the frozen parts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from papercore.lab.files import write_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmict.hub import MHub, MHubConfig
from mmict.lm import add_lora, load_lm
from mmict.processor import Processor
from mmict.vision import VisionEncoder, fingerprint, load_vision


def save(model: Any, folder: Path) -> None:
    """As :meth:`mmict.MMICTModel.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: value.detach().contiguous() for name, value in model.named_parameters() if _is_kept(name)}
    save_file(trained, str(folder / "model.safetensors"), {"format": "pt"})
    model.processor.save_pretrained(folder)
    base = model.lm.get_base_model() if hasattr(model.lm, "peft_config") else model.lm
    write_json(
        folder / "config.json",
        {
            "mmict": dataclasses.asdict(model.config),
            "hub": dataclasses.asdict(model.hub.config),
            "vision": {**model.vision.record(), "name": _relative(model.vision.source, folder)},
            "lm": {
                "name": _relative(base.name_or_path, folder),
                "dtype": str(base.dtype).removeprefix("torch."),
                "lora": _lora(model.lm),
            },
            "fingerprints": {"vision": fingerprint(model.vision.network), "lm": fingerprint(base)},
        },
    )


def load_parts(folder: Path) -> tuple[dict[str, Any], VisionEncoder, Any, MHub, Processor]:
    """The configuration in a checkpoint, its frozen parts, and a hub of its sizes with random weights.

    Raises:
        ValueError: if it is no checkpoint, or a frozen part is not the one it was trained with.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there; a checkpoint is a folder that `mmict train` wrote")
    record = json.loads((folder / "config.json").read_text())
    if "mmict" not in record:
        raise ValueError(f"{folder} is no checkpoint of mmict: its config.json has no entry 'mmict'")
    vision = load_vision(**{**record["vision"], "name": _found(record["vision"]["name"], folder)})
    lm: Any = load_lm(_found(record["lm"]["name"], folder), dtype=getattr(torch, record["lm"]["dtype"]))
    for part, module in (("vision", vision.network), ("lm", lm)):
        if fingerprint(module) != record["fingerprints"][part]:
            raise ValueError(f"{folder}: {record[part]['name']} is not the {part} that it was trained with")
    if record["lm"]["lora"]:
        lm = add_lora(lm, **record["lm"]["lora"])
    return record["mmict"], vision, lm, MHub(MHubConfig(**record["hub"])), Processor.from_pretrained(folder)


def load_trained(model: Any, path: Path) -> None:
    """The weights of a checkpoint's model.safetensors.

    Raises:
        ValueError: if the file is damaged, or some are missing, have other shapes, or have no place here.
    """
    try:
        found = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no file of weights ({error})") from None
    wanted = {name: value.shape for name, value in model.named_parameters() if _is_kept(name)}
    given = {name: value.shape for name, value in found.items()}
    if wanted != given:
        apart = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
        raise ValueError(f"{path} does not fit this model: {len(apart)} tensors differ, such as {apart[0]}")
    model.load_state_dict(found, strict=False)


def _is_kept(name: str) -> bool:
    return name == "separator" or name.startswith("hub.") or ".lora_" in name


def _relative(name: str, folder: Path) -> str:
    return os.path.relpath(name, folder) if Path(name).exists() else name


def _found(name: str, folder: Path) -> str:
    return str(folder / name) if (folder / name).exists() else name


def _lora(lm: Any) -> dict[str, Any] | None:
    if not hasattr(lm, "peft_config"):
        return None
    config = lm.peft_config["default"]
    return {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
