"""Teachers from files: our own folders, and checkpoints of MoCo, SwAV, DeepCluster-v2 and SeLa, read strictly."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from disco.encoder import Encoder


class _Form(NamedTuple):
    """How a kind of checkpoint names its tensors, once ``module.`` and ``_orig_mod.`` are gone."""

    name: str
    mark: str  # what some key begins with in no other form
    backbone: str
    head: str
    unused: tuple[str, ...] = ()


FORMS = (
    _Form("MoCo", "encoder_q.", "encoder_q.", "encoder_q.fc.", ("encoder_k.", "queue")),
    _Form("disco", "backbone.", "backbone.", "head."),
    _Form("SwAV, DeepCluster-v2 or SeLa", "projection_head.", "", "projection_head.", ("prototypes",)),
    _Form("MoCo, its encoder_q alone", "fc.0.", "", "fc."),
)


def load_teacher(path: str | Path, backbone: str | nn.Module | None = None, **options: Any) -> Encoder:
    """A trained backbone with its projection head, in evaluation mode; :func:`describe` says what was read.

    Every tensor of the network must be in the file with its shape, and every tensor of the file in the network, but for those
    that a teacher does without: MoCo's ``encoder_k`` and ``queue``, SwAV's ``prototypes``. The head has the widths of the file's,
    and its weights: nothing is initialised anew. ``module.`` (DistributedDataParallel) and ``_orig_mod.`` (torch.compile) in
    names are passed over.

    Args:
        path: a folder that ``Encoder.save_pretrained`` or ``disco pretrain-teacher`` wrote; or a file, .safetensors or as
            ``torch.save`` writes it (.pth, .pth.tar, .pt), of MoCo-v1 or v2, SwAV, DeepCluster-v2, SeLa, or of an encoder of
            ours.
        backbone: for a file its network, as a name for :func:`disco.backbones.build_backbone` or a module, which is filled in
            place; timm's ResNets have torchvision's names. A folder knows its own, if it was not a module.
        options: ``image_size``, ``mean``, ``std`` of :class:`disco.Encoder`, for a file its defaults, 224 pixels and ImageNet's.

    Raises:
        ValueError: if the file is damaged, holds Python objects that might run code, has no projection head, or does not fit the
            backbone: it lists the first names and says how many there are. OSError: if there is no such file or folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Encoder("cnn:8-16", dim=32, hidden=64, image_size=16).save_pretrained(folder)
        ...     teacher = load_teacher(folder)
        >>> teacher.backbone_name, teacher.dim
        ('cnn:8-16', 32)
    """
    path = Path(path)
    if path.is_dir():
        return load_encoder(path, backbone, **options)
    weights = _read(path)
    _refuse_training_state(path, weights, path.parent.parent)
    form = next((form for form in FORMS if any(key.startswith(form.mark) for key in weights)), None)
    if form is None or not any(key.startswith(form.head) for key in weights):
        raise ValueError(
            f"{path} holds a backbone but no projection head: pre-train one with `disco pretrain-teacher`, or give a checkpoint "
            "of MoCo (encoder_q.fc), SwAV (projection_head) or disco (head) as it was trained"
        )
    if backbone is None:
        raise ValueError(
            f"{path}: a file of weights does not say which network it is: give its backbone, such as resnet50"
        )
    found, unused, unknown = {}, [], []  # found: the encoder's name of a tensor -> the file's
    for key in weights:
        if key.startswith(form.unused):
            unused.append(key)
        elif key.startswith(form.head):
            layer = key.removeprefix(form.head)
            found[f"head.{layer if '.' in layer else f'0.{layer}'}"] = key  # MoCo-v1's is a Linear itself
        elif key.startswith(form.backbone):
            found[f"backbone.{key.removeprefix(form.backbone)}"] = key
        else:
            unknown.append(key)
    head = {name: weights[key] for name, key in sorted(found.items()) if name.startswith("head.")}
    encoder = Encoder(backbone, **_head_widths(path, head), **options)
    wanted = {_plain(name): (name, tensor) for name, tensor in encoder.state_dict().items()}
    _refuse(
        f"{path} ({form.name}) does not fit the backbone {encoder.backbone_name or type(backbone).__name__}",
        missing=[name for name in wanted if name not in found],
        unknown=unknown + [key for name, key in found.items() if name not in wanted],
        misshapen=[
            f"{key} is {tuple(weights[key].shape)} in the file and {tuple(wanted[name][1].shape)} in the network"
            for name, key in found.items()
            if name in wanted and weights[key].shape != wanted[name][1].shape
        ],
    )
    encoder.load_state_dict({wanted[name][0]: weights[key] for name, key in found.items()})
    encoder.origin = f"{path} ({form.name})"
    if unused:
        groups = Counter(key.partition(".")[0] for key in unused)
        encoder.origin += "; not used: " + ", ".join(
            f"{name} ({n} tensors)" if n > 1 else name for name, n in groups.items()
        )
    return encoder.eval()


def load_encoder(folder: str | Path, backbone: str | nn.Module | None = None, **options: Any) -> Encoder:
    """The encoder in a folder that ``Encoder.save_pretrained`` wrote, as a finished run does; in evaluation mode.

    Args:
        folder: the folder. backbone: if it was saved with a module for one. options: those of :class:`disco.Encoder` to replace.

    Raises:
        ValueError: if the weights do not fit, or are a training's state. FileNotFoundError: if there is no such folder or file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "a file, not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(f"{folder}: {problem}; expected one that a finished run of disco wrote")
    with contextlib.suppress(FileNotFoundError, SafetensorError), safe_open(folder / "model.safetensors", "pt") as file:
        _refuse_training_state(folder, file.keys(), folder.parent)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name}; expected a folder that a finished run of disco wrote")
    if backbone is not None:
        options["backbone"] = backbone
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it reads a local folder
            encoder: Encoder = Encoder.from_pretrained(folder, **options)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: not an encoder of disco: {textwrap.shorten(str(error), 500)}") from None
    encoder.origin = str(folder)
    return encoder


def load_queue(path: str | Path) -> tuple[Tensor, int] | None:
    """The queue of a MoCo checkpoint, to start a student's with (the authors' loading of teachers does so: ``queue_init``).

    Returns:
        (keys (K, dim), the next place to write, 0 to K - 1), or None if there is no queue, as in a folder.

    Raises:
        ValueError, OSError: as :func:`load_teacher`, and for a queue that is no matrix.
    """
    path = Path(path)
    weights = {} if path.is_dir() else _read(path)
    if "queue" not in weights:
        return None
    queue, pointer = weights["queue"], int(weights.get("queue_ptr", torch.zeros(1)).item())
    if queue.dim() != 2 or not 0 <= pointer < queue.shape[1]:
        raise ValueError(f"{path}: a queue of shape {tuple(queue.shape)} with pointer {pointer}; expected (dim, K)")
    return queue.T.contiguous(), pointer


def describe(encoder: Encoder) -> str:
    """In one or two lines: the backbone and how many tensors of it were read, the head's widths, a hash of the weights, the
    file, and what of it was not used.

    >>> print(describe(Encoder("cnn:8-16", dim=32, hidden=64, image_size=16)))  # doctest: +ELLIPSIS
    cnn:8-16: 12 tensors, 0.00 M parameters, 16 features; head 16-64-32; weights ...
    """
    linear = [module for module in encoder.head if isinstance(module, nn.Linear)]
    widths = "-".join(map(str, [linear[0].in_features, *(layer.out_features for layer in linear)]))
    norm = " with batch normalisation" if any(isinstance(module, nn.BatchNorm1d) for module in encoder.head) else ""
    name = encoder.backbone_name or type(encoder.backbone).__name__
    parameters = sum(parameter.numel() for parameter in encoder.backbone.parameters()) / 1e6
    origin = f"\nfrom {encoder.origin}" if encoder.origin else ""
    return (
        f"{name}: {len(encoder.backbone.state_dict())} tensors, {parameters:.2f} M parameters, {encoder.width} features; "
        f"head {widths}{norm}; weights {weights_hash(encoder)}{origin}"
    )


def weights_hash(module: nn.Module) -> str:
    """The first 12 hexadecimal digits of SHA-256 over names and bytes of ``state_dict()``, sorted by name.

    >>> layer = nn.Linear(2, 1)
    >>> before = weights_hash(layer)
    >>> _ = layer.bias.data.add_(1)
    >>> weights_hash(layer) == before
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefixes of wrappers."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what is no checkpoint makes the reader fail in any way, OSError among them
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ValueError(
                f"{path}: not read, as it holds {unsafe[1]}, and such objects may run code; "
                "save the state dict alone, without anything but tensors"
            ) from None
        raise ValueError(f"{path}: damaged, or not a file of weights ({type(error).__name__})") from None
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise ValueError(f"{path}: no tensors, neither by name nor under state_dict or model")
    return {_plain(key): value for key, value in tensors.items()}


def _head_widths(path: Path, head: Mapping[str, Tensor]) -> dict[str, Any]:
    linear = [tensor for name, tensor in head.items() if name.endswith(".weight") and tensor.dim() == 2]
    if not linear:
        raise ValueError(f"{path}: its projection head has no Linear: {', '.join(head)}")
    return {
        "dim": linear[-1].shape[0],
        "hidden": linear[0].shape[0] if len(linear) > 1 else 0,
        "batch_norm": any(name.endswith(".running_mean") for name in head),
    }


def _refuse_training_state(path: Path, keys: Collection[str], run: Path) -> None:
    if any(key.startswith("student.") for key in keys):
        raise ValueError(f"{path} is the state of a training: give the folder of the run, {run}, once it has finished")


def _refuse(what: str, missing: list[str], unknown: list[str], misshapen: list[str]) -> None:
    """Raise if there is anything in the lists."""
    parts = [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in (
            ("tensors are missing", missing),
            ("are unknown", unknown),
            ("have another shape", misshapen),
        )
        if names
    ]
    if parts:
        raise ValueError(f"{what}: {'; '.join(parts)}")
