"""Pretrained weights from a file into a network. Nothing is fetched, and nothing in a file can run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = re.compile(r"^((module|_orig_mod|backbone)\.)+")  # DistributedDataParallel, torch.compile, mmcls


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file or one of ``torch.save``, there alone or under ``model`` or ``state_dict``.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``backbone.``) are dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a damaged file, one with other objects than tensors and plain values, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected weights, .safetensors or of torch.save")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what is no checkpoint makes the readers fail in any way
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ValueError(
                f"{path}: not read, as it holds {unsafe[1]}, and such objects may run code; save the state dict alone"
            ) from None
        raise ValueError(f"{path}: damaged, or not a file of weights ({type(error).__name__})") from None
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    pairs = content.items() if isinstance(content, dict) else ()
    tensors = {_WRAPPERS.sub("", str(name)): value for name, value in pairs if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: no tensors, neither by name nor under model or state_dict")
    return tensors


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """Set all of a network's weights. Returns the names in ``weights`` that it has no use for, such as a classifier's.

    Counters of batches (``num_batches_tracked``), which old files lack, may be missing.

    Args:
        source: what an error names.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in weights and not name.endswith(".num_batches_tracked")]
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} of the network's {len(wanted)} weights are missing: {', '.join(missing[:3])}"
        )
    for name, value in wanted.items():
        if name in weights and weights[name].shape != value.shape:
            raise ValueError(f"{source}: {name} is {tuple(weights[name].shape)}, the network's {tuple(value.shape)}")
    network.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    return [name for name in weights if name not in wanted]
