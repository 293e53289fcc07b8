"""CLIP models by name, from files whose tensors must all fit, and saved as folders that open_clip loads."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, cast

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from papercore.lab.files import write_json
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softclip.model import RoiEncoder

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # open_clip's names
ROI_WEIGHTS = "roi_encoder.safetensors"
ROI_PREFIX = "roi_encoder."  # in the state dict of a SoftClipModel, whose other keys are the CLIP's own

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
TINY: dict[str, dict[str, Any]] = {
    "tiny-resnet": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": _TEXT,
    },
    "tiny-vit": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": _TEXT,
    },
}


class LoadedClip(NamedTuple):
    """A CLIP with what its inputs must be. ``mean`` and ``std`` are of images in 0..1, per channel."""

    clip: nn.Module
    model_cfg: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    tokenizer: Any


def model_config(name: str) -> dict[str, Any]:
    """The architecture called so, as open_clip describes it: embed_dim, vision_cfg, text_cfg, ...

    Args:
        name: tiny-resnet or tiny-vit (ours: 32 pixels, 128 features, 16 tokens), a name of ``open_clip.list_models()``, or the
            path of a JSON file like those of open_clip.

    Raises:
        ValueError: for an unknown name, or a file that is not such JSON. FileNotFoundError: if there is no such file.
    """
    if name in TINY:
        return deepcopy(TINY[name])
    if name.endswith(".json"):
        try:
            config = json.loads(Path(name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON: {error}") from None
        if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            raise ValueError(f"{name}: expected a model of open_clip, with embed_dim, vision_cfg and text_cfg")
        return config
    config = open_clip.get_model_config(name.replace("/", "-"))
    if config is None:
        raise ValueError(f"model {name!r} is unknown: choose {', '.join(TINY)}, one of open_clip, or a JSON file")
    return config


def new_clip(name: str, seed: int | None = None, image_size: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """An untrained CLIP, and its configuration as :func:`save_clip` needs it.

    Args:
        name: as for :func:`model_config`. seed: of the weights; the global generator is then left alone.
        image_size: side in pixels, instead of the model's own.

    Raises:
        ValueError, FileNotFoundError: as :func:`model_config`.

    >>> clip, config = new_clip("tiny-vit", seed=0)
    >>> clip.encode_image(torch.zeros(1, 3, 32, 32)).shape, config["embed_dim"]
    (torch.Size([1, 128]), 128)
    """
    config = model_config(name)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, {"model_cfg": config, "preprocess_cfg": {}})
        return _build(f"local-dir:{folder}", seed), config


def load_clip(spec: str) -> LoadedClip:
    """A trained CLIP, in evaluation mode.

    Args:
        spec: one of

            - a folder that :func:`save_clip` wrote, or any with open_clip_config.json and open_clip_model.safetensors.
            - ``NAME:FILE``: a name for :func:`model_config`, and weights in a .pt or .safetensors file, such as the epoch_N.pt of
              open_clip or ``softclip-train``. A pickle that holds more than tensors and plain values is refused.
            - ``NAME:TAG`` or ``hf-hub:NAME``: weights that open_clip downloads.

    Raises:
        ValueError: if weights do not fit the network, saying how many and which first; for a damaged file, an unknown name.
        OSError: if a file is missing.
    """
    if Path(spec).is_dir():
        if not (Path(spec) / CONFIG).is_file():
            raise FileNotFoundError(f"{spec}: no {CONFIG}; expected a folder that `softclip train` or `export` wrote")
        config = json.loads((Path(spec) / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        clip = _build(f"local-dir:{spec}")
        _fill(clip, Path(spec) / WEIGHTS)
        return _loaded(clip, config, spec)
    name, _, weights = spec.partition(":")
    if not weights:
        raise ValueError(f"{spec!r} is no folder, and a name alone has no weights: give NAME:FILE or NAME:TAG")
    if name == "hf-hub":
        return _loaded(_download(spec), open_clip.get_model_config(spec), spec)
    if weights in open_clip.list_pretrained_tags_by_model(name.replace("/", "-")):
        return _loaded(_download(name, weights), model_config(name))
    clip, config = new_clip(name, seed=0)
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file, and no tag that open_clip knows for {name}")
    _fill(clip, Path(weights))
    return _loaded(clip, config)


def save_clip(
    folder: str | Path,
    clip: nn.Module,
    model_cfg: Mapping[str, Any],
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> None:
    """Write a folder for ``open_clip.create_model_and_transforms("local-dir:FOLDER")``, with exactly the CLIP's own weights.

    Args:
        clip: of open_clip. model_cfg: its configuration, as :func:`new_clip` gives it.
        mean, std: of images in 0..1, per channel, to be subtracted and divided by; None: those that the CLIP was made with.
    """
    folder, visual = Path(folder), cast(Any, clip.visual)
    preprocess = {key: visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    preprocess |= {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    _write(folder / WEIGHTS, clip.state_dict())
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        tokenizer_of(model_cfg).save_pretrained(folder)  # open_clip looks for it there


def save_roi(folder: str | Path, roi_encoder: RoiEncoder) -> None:
    """Write what the ROI encoder has of its own, without the tower it shares, beside the CLIP."""
    _write(Path(folder) / ROI_WEIGHTS, roi_encoder.state_dict())


def load_roi(folder: str | Path, visual: nn.Module) -> RoiEncoder | None:
    """The ROI encoder in a folder, for the tower of the CLIP there; in evaluation mode. None if there is none.

    Raises:
        ValueError: if it does not fit the tower.
    """
    path = Path(folder) / ROI_WEIGHTS
    if not path.is_file():
        return None
    try:
        weights = load_file(path)
        encoder = RoiEncoder(visual, len(weights["projection"]))
        encoder.load_state_dict(weights)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit the image tower: {_short(error)}") from None
    return encoder.eval()


def tokenizer_of(model_cfg: Mapping[str, Any], folder: str | Path | None = None) -> Any:
    """The tokenizer that goes with a configuration: texts -> int64 (n, context_length).

    Args:
        folder: where a tokenizer of Hugging Face was saved; else it is looked up by name.

    >>> tokenizer_of(TINY["tiny-vit"])(["a red cat"]).shape
    torch.Size([1, 16])
    """
    text = model_cfg["text_cfg"]
    kwargs = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    if text.get("hf_tokenizer_name"):
        source = str(folder or text["hf_tokenizer_name"])
        return HFTokenizer(source, tokenizer_mode=text.get("tokenizer_mode"), **kwargs)
    return SimpleTokenizer(**kwargs)


def _loaded(clip: nn.Module, config: Any, source: str | None = None) -> LoadedClip:
    visual: Any = clip.visual
    size = visual.image_size
    size = size if isinstance(size, int) else size[0]
    if source is None or not source.startswith("hf-hub:"):
        tokenizer = tokenizer_of(config, source)
    else:
        tokenizer = open_clip.get_tokenizer(source)
    mean, std = (tuple(visual.preprocess_cfg[key]) for key in ("mean", "std"))
    return LoadedClip(clip.eval(), config, mean, std, size, tokenizer)


def _build(name: str, seed: int | None = None) -> nn.Module:
    """The network that open_clip makes for a local folder, without its weights."""
    with _quiet(), torch.random.fork_rng([], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        return open_clip.create_model(name, load_weights=False)


def _download(name: str, tag: str | None = None) -> nn.Module:
    try:
        return open_clip.create_model(name, tag, require_pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: {_short(error)}") from None


def _fill(clip: nn.Module, path: Path) -> None:
    """Load weights by open_clip's own function, which knows older names and other image sizes, and tell what does not fit."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with _quiet():
            found = open_clip.load_checkpoint(clip, str(path), strict=False, weights_only=True)
    except UnpicklingError:  # torch's own words say how to run it all the same
        raise ValueError(f"{path} cannot be loaded: it is damaged, or holds objects that may run code") from None
    except Exception as error:  # no checkpoint at all, or tensors of other shapes
        raise ValueError(f"{path} cannot be loaded into the network: {_short(error)}") from None
    unexpected = [key for key in found.unexpected_keys if not key.startswith(ROI_PREFIX)]
    problems = [
        f"{len(keys)} tensors are {word}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for word, keys in (("missing", found.missing_keys), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems)}")


def _write(path: Path, weights: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {key: tensor.detach().cpu().contiguous().clone() for key, tensor in weights.items()},
        temporary,
        {"format": "pt"},
    )
    temporary.replace(path)


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 400)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of open_clip that a network starts with random weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
