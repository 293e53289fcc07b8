"""Judging a CLIP by test pairs: retrieval, many-to-many retrieval and zero-shot classification; the verb ``eval``."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.ops import autocast_dtype, pick_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from softclip.checkpoints import load_clip
from softclip.data import DataOptions, load_pairs
from softclip.dataset import PairDataset
from softclip.model import normalized
from softclip.retrieval import mean_average_precision, retrieval_recall, unit_features
from softclip.zero_shot import TEMPLATES, read_templates, zero_shot_accuracy, zero_shot_classifier


def encode_pairs(
    model: nn.Module, dataset: PairDataset, batch_size: int = 256, device: str | torch.device | None = None
) -> tuple[Float[Tensor, "pairs width"], Float[Tensor, "pairs width"]]:
    """Image and text features of all pairs: float32 unit rows, on the model's device.

    Images of bytes are normalised with the mean and standard deviation that open_clip keeps in ``visual.preprocess_cfg``, or
    CLIP's where it does not; those with a fraction are taken as they are. Half precision is used where the device is fast at it.
    The model is in eval mode meanwhile.

    Args:
        model: open_clip's or ours: something with ``encode_image``, ``encode_text`` and ``visual``.
        batch_size: pairs at a time. device: where to compute, and where the model is left (None: where it is).

    Raises:
        ValueError: for a batch_size below 1, no pairs, or a feature that is NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(dataset):
        raise ValueError("there are no pairs to encode")
    device = _place(model, device)
    images, texts = [], []
    batches = torch.arange(len(dataset)).split(batch_size)
    with _inference(model, device):
        for rows in tqdm(batches, "features", unit="batch", delay=2, leave=False, disable=not sys.stderr.isatty()):
            image, text = dataset.__getitems__(rows.tolist())
            pixels = image.images.to(device)
            if not pixels.is_floating_point():
                pixels = normalized(pixels.float() / 255, model.visual)
            images.append(model.encode_image(pixels).float())  # type: ignore[operator]
            texts.append(model.encode_text(text.texts.to(device)).float())  # type: ignore[operator]
    image_features, text_features = unit_features(image_features=torch.cat(images), text_features=torch.cat(texts))
    return image_features, text_features


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    dataset: PairDataset,
    *,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """All that can be measured on the pairs, in percent.

    Always Recall@1, 5 and 10 of :func:`softclip.retrieval.retrieval_recall`: pairs of one name are one image with several texts,
    and a text is correct for its own image only. Another image's caption of equal words is wrong, and being tied counts ahead.
    With ``dataset.pairs.groups`` also :func:`softclip.retrieval.mean_average_precision`, with ``labels`` also
    :func:`softclip.zero_shot.zero_shot_accuracy`; images of several texts count once.

    Args:
        tokenizer: the model's, for the names of classes. dataset: whose ``pairs`` have groups and labels.
        templates: for the names of classes. batch_size, device: as for :func:`encode_pairs`.

    Raises:
        ValueError: as :func:`encode_pairs` and :func:`softclip.zero_shot.zero_shot_classifier`.
    """
    device, pairs = _place(model, device), dataset.pairs
    images, texts = encode_pairs(model, dataset, batch_size)
    first: dict[object, int] = {}
    for row, name in enumerate(pairs.names):
        first.setdefault(name, row)
    number = {name: i for i, name in enumerate(first)}
    owners, rows = torch.tensor([number[name] for name in pairs.names]), torch.tensor(list(first.values()))
    images = images[rows]
    metrics = retrieval_recall(images, texts, text_to_image=owners)
    if pairs.groups is not None:
        groups = torch.tensor(pairs.groups)
        metrics |= mean_average_precision(images, texts, groups[rows], groups)
    if pairs.labels is not None:
        with _inference(model, device):
            encode_text: Any = model.encode_text
            classifier = zero_shot_classifier(encode_text, tokenizer, pairs.classes, templates, device=device)
        metrics |= zero_shot_accuracy(images, torch.tensor(pairs.labels)[rows], classifier)
    return metrics


@dataclass
class EvalOptions:
    """What to judge, and how."""

    model: str = flag("folder that `softclip train` wrote, or an open_clip model with a checkpoint, as RN50:weights.pt")
    templates: str | None = flag(
        "zero-shot: file with a text a line, {} for a class's name; three of ours if not given", None
    )
    batch_size: int = flag("pairs encoded at a time", 256)
    output_dir: str | None = flag("where metrics.json goes; eval-DATA in the model's folder if not given", None)


def evaluate_checkpoint(data: DataOptions, options: EvalOptions) -> dict[str, float]:
    """The verb ``eval``: a table and metrics.json."""
    templates = read_templates(options.templates) if options.templates else TEMPLATES
    pairs = load_pairs(data).test
    if pairs is None:
        raise ValueError("there are no test pairs to judge on: give --test, or hold some out with --validation 0.1")
    loaded = load_clip(options.model)
    dataset = PairDataset(pairs, loaded.tokenizer, loaded.image_size, preprocess=_unusual_preprocess(loaded.clip))
    metrics = evaluate(
        loaded.clip,
        loaded.tokenizer,
        dataset,
        templates=templates,
        batch_size=options.batch_size,
        device=pick_device(),
    )
    print_table(
        f"{options.model} on {data.data}: {len(pairs)} test pairs",
        ["metric", "%"],
        [[name, f"{value:.2f}"] for name, value in metrics.items()],
    )
    name = re.sub(r"[^\w.-]+", "-", f"eval-{Path(data.data).name}")
    path = Path(options.output_dir or _folder(options.model) / name) / "metrics.json"
    record = {"model": options.model, "data": data.data, "test": len(pairs)}
    if pairs.labels is not None:
        record |= {"classes": len(pairs.classes), "templates": list(templates)}
    write_json(path, record | {"metrics": metrics})
    console.print(str(path), soft_wrap=True)
    return metrics


def _folder(model: str) -> Path:
    return Path(model) if Path(model).is_dir() else Path(model.partition(":")[2]).parent


def _unusual_preprocess(clip: Any) -> Any:
    """open_clip's preparation of images, if the model asks for another than the data set's own: shorter side, bicubic."""
    settings = clip.visual.preprocess_cfg
    if (settings["resize_mode"], settings["interpolation"]) == ("shortest", "bicubic"):
        return None
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)


def _place(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """Move the model there, if it is said where; where it is now."""
    if device is not None:
        model.to(device)
    return next(model.parameters()).device


@contextlib.contextmanager
def _inference(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, half precision where it is fast; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    dtype = autocast_dtype(device)
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        for module in training:
            module.training = True
