"""Judging an encoder by its frozen features: nearest neighbours and linear classifiers; the verb ``eval``."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64, UInt8
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console, print_table
from papercore.lab.training import whole_batch
from papercore.ops import autocast_dtype, pick_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V
from tqdm.auto import tqdm

from disco.augment import Augmentation
from disco.checkpoints import load_encoder
from disco.data import DataOptions, Images, Splits, load_data
from disco.encoder import Encoder
from disco.knn import knn_accuracy
from disco.linear import PROTOCOLS, ProbeResult, Protocol, linear_probe, train_linear

KS = (10, 20, 200)


def evaluation_view(images: UInt8[Tensor, "n 3 side side"], size: int) -> UInt8[Tensor, "n 3 size size"]:
    """What an encoder for ``size`` pixels is shown of images of any side.

    Smaller ones are enlarged bicubically (authors, CIFAR), larger ones resized to 256 / 224 of the size, of which the centre is
    kept (authors, ImageNet); those of that size are left alone.

    >>> evaluation_view(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), 32).shape
    torch.Size([1, 3, 32, 32])
    """
    side = images.shape[-1]
    if side < size:
        return V.resize(images, [size, size], InterpolationMode.BICUBIC, antialias=True)
    if side > size:
        return V.center_crop(V.resize(images, [round(size * 256 / 224)] * 2, antialias=True), [size, size])
    return images


def extract_features(
    encoder: Encoder,
    images: Images,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    *,
    autocast: bool = False,
) -> Float[Tensor, "images width"]:
    """The backbone's features of every image's :func:`evaluation_view`: float32, on the CPU, not normalised.

    The encoder is in eval mode meanwhile; afterwards each of its modules is in the mode it was in.

    Args:
        batch_size: images at a time. device: where to compute, and where the encoder is left (None: where it is).
        autocast: to half precision, where the device is fast at it.

    Raises:
        ValueError: for a batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = _place(encoder, device)
    features = torch.empty(len(images), encoder.width)
    batches = torch.arange(len(images)).split(batch_size)
    shown = tqdm(batches, "features", unit="batch", delay=2, leave=False, disable=not sys.stderr.isatty())
    with _eval_mode(encoder):
        for rows, pixels in zip(shown, _pixels(images, batches), strict=True):
            view = evaluation_view(pixels.to(device), encoder.image_size)
            features[rows] = _features(encoder, view, autocast).cpu()
    return features


def linear_evaluation(
    encoder: Encoder,
    train: Images,
    test: Images,
    *,
    protocol: Protocol = PROTOCOLS["imagenet"],
    seed: int = 0,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    autocast: bool = False,
) -> ProbeResult:
    """The authors' linear evaluation: a classifier trained by SGD on features of crops and flips, new ones in every epoch.

    The backbone is frozen and in eval mode. Test images are seen as :func:`evaluation_view` shows them.

    Args:
        train, test: labelled images. protocol: of SGD, its batch included. seed: of weights, order, crops and flips.
        batch_size: of the test images. device, autocast: as for :func:`extract_features`.

    Raises:
        ValueError: for images without labels, or if the classifier diverges.
        RuntimeError: if the backbone's parameters or buffers have changed, for then it was not frozen.
    """
    device, size = _place(encoder, device), encoder.image_size
    train_labels, test_labels = _labels(train, "training").to(device), _labels(test, "test").to(device)
    augmentation = Augmentation.crop_flip(size)
    generator = torch.Generator().manual_seed(seed)

    def features_of(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for pixels in _pixels(train, batches):
            pixels = pixels.to(device)
            if pixels.shape[-1] < size:
                pixels = evaluation_view(pixels, size)
            yield _features(encoder, augmentation(pixels, augmentation.draw(len(pixels), generator)), autocast)

    before = {name: value.clone() for name, value in _state(encoder.backbone)}
    test_features = extract_features(encoder, test, batch_size, autocast=autocast).to(device)
    with _eval_mode(encoder):
        result = train_linear(features_of, train_labels, test_features, test_labels, protocol=protocol, seed=seed)
    changed = [name for name, value in _state(encoder.backbone) if not torch.equal(value, before[name])]
    if changed:
        raise RuntimeError(f"linear evaluation changed the backbone it should only read: {', '.join(changed[:5])}")
    return result


def evaluate(
    encoder: Encoder,
    splits: Splits,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    autocast: bool = False,
) -> dict[str, float]:
    """Quick judgement on frozen features, in percent: knn_10, knn_20 and knn_200 (T 0.07; where there are as many training
    images), linear_top1 by the L-BFGS probe and, from six classes on, linear_top5.

    Args:
        splits: labelled training images to learn from, and test images. The others: as for :func:`extract_features`.

    Raises:
        ValueError: if there are no test images, or no labels.
    """
    train, test = _judged(splits)
    features = _labelled_features(encoder, train, test, batch_size, device, autocast)
    ks = [k for k in KS if k <= len(train)]
    neighbours = knn_accuracy(*features, k=ks) if ks else {}
    probe = linear_probe(*features)
    metrics = {f"knn_{k}": value for k, value in neighbours.items()} | {"linear_top1": probe.top1}
    return metrics if probe.top5 is None else metrics | {"linear_top5": probe.top5}


def labelled_share(labels: Int64[Tensor, " n"], fraction: float, seed: int = 0) -> Int64[Tensor, " some"]:
    """Rows of a share of each class, at least one of each, drawn by seed, ascending. A larger share holds the smaller ones.

    Raises:
        ValueError: for a fraction that is not above 0 and at most 1.

    >>> labelled_share(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.5).shape
    torch.Size([4])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction must be above 0 and at most 1, got {fraction}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([part[: max(1, round(fraction * len(part)))] for part in parts]).sort().values


@dataclass
class EvalOptions:
    """What to judge, and how."""

    model: str = flag("folder of an encoder, as `disco` writes it")
    kind: str = flag("knn or linear", "knn", positional=True)
    k: list[int] = flag("knn: numbers of neighbours", list(KS))
    temperature: float = flag("knn: T of the weights exp(cos / T)", 0.07)
    method: str = flag("linear: lbfgs (standardised features, penalty chosen on a tenth held out), or sgd", "lbfgs")
    protocol: str = flag(
        "sgd: imagenet (100 epochs, the rate of 3 halved 11 times), semi (100 epochs, halved at 60 and 80) or transfer (200 "
        "epochs, constant); the authors'",
        "imagenet",
    )
    augment: bool = flag(
        "sgd: features of new crops and flips in every epoch, as the authors; else of each image once", False
    )
    epochs: int | None = flag("sgd: instead of the protocol's; its milestones stay where they are", None)
    learning_rate: float | None = flag("sgd: instead of the protocol's", None)
    label_fraction: float = flag(
        "use only this share of each class's training images (authors: 0.01, 0.1), drawn by seed", 1.0
    )
    batch_size: int = flag("images encoded at a time", 256)
    autocast: bool = flag("encode in half precision, where the device is fast at it", False)
    seed: int = flag("of that draw, of sgd's weights, order and crops, and of the tenth held out", 0)
    output_dir: str | None = flag("where metrics.json goes; eval-DATA-KIND in the model's folder if not given", None)


def evaluate_checkpoint(options: EvalOptions, data: DataOptions) -> dict[str, float]:
    """The verb ``eval``: a table and metrics.json. The data may have other classes than those of the training (transfer)."""
    if options.kind not in ("knn", "linear"):
        raise ValueError(
            f"eval {options.kind!r} is unknown: choose knn or linear, as in `disco eval knn --model FOLDER`"
        )
    sgd = options.kind == "linear" and options.method == "sgd"
    if not sgd and (options.augment or options.epochs is not None or options.learning_rate is not None):
        raise ValueError(
            "--augment, --epochs and --learning_rate go with `disco eval linear --model FOLDER --method sgd`"
        )
    encoder = load_encoder(options.model)
    train, test = _judged(load_data(data))
    if options.label_fraction != 1:
        train = train.select(labelled_share(_labels(train, "training"), options.label_fraction, options.seed))
    metrics, details = (_knn if options.kind == "knn" else _linear)(encoder, train, test, options)
    how = ", ".join(f"{name} {value}" for name, value in details.items() if not isinstance(value, dict))
    print_table(
        f"{data.data}, {options.kind}: {len(train)} training and {len(test)} test images; {how}",
        ["", *metrics],
        [[options.model, *(f"{value:.2f}" for value in metrics.values())]],
    )
    name = re.sub(r"[^\w.-]+", "-", f"eval-{Path(data.data).name}-{options.kind}")
    path = Path(options.output_dir or Path(options.model) / name) / "metrics.json"
    record = {"model": options.model, "data": data.data, "kind": options.kind, "train": len(train), "test": len(test)}
    record |= {"classes": len(train.classes), "label_fraction": options.label_fraction, "seed": options.seed}
    write_json(path, record | details | {"metrics": metrics})
    console.print(str(path), soft_wrap=True)
    return metrics


def _knn(
    encoder: Encoder, train: Images, test: Images, options: EvalOptions
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and how they came about."""
    features = _labelled_features(encoder, train, test, **_encoding(options))
    accuracy = knn_accuracy(*features, k=options.k, temperature=options.temperature)
    return {f"knn_{k}": value for k, value in accuracy.items()}, {"temperature": options.temperature}


def _linear(
    encoder: Encoder, train: Images, test: Images, options: EvalOptions
) -> tuple[dict[str, float], dict[str, Any]]:
    if options.protocol not in PROTOCOLS:
        raise ValueError(f"protocol {options.protocol!r} is unknown: choose from {', '.join(PROTOCOLS)}")
    given: dict[str, Any] = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    protocol = replace(PROTOCOLS[options.protocol], **{name: v for name, v in given.items() if v is not None})
    if options.augment:
        result = linear_evaluation(encoder, train, test, protocol=protocol, seed=options.seed, **_encoding(options))
    else:
        features = _labelled_features(encoder, train, test, **_encoding(options))
        method = cast(Literal["lbfgs", "sgd"], options.method)
        result = linear_probe(*features, method=method, protocol=protocol, seed=options.seed)
    scores = {"top1": result.top1, "top5": result.top5, "best_epoch_top1": result.best_epoch_top1}
    details: dict[str, Any] = {"method": result.method, "penalty": result.penalty}
    if result.method == "sgd":
        details = {
            "method": "sgd",
            "augment": options.augment,
            "protocol": options.protocol,
            "schedule": asdict(protocol),
        }
    return {f"linear_{name}": value for name, value in scores.items() if value is not None}, details


def _encoding(options: EvalOptions) -> dict[str, Any]:
    return {"batch_size": options.batch_size, "device": pick_device(), "autocast": options.autocast}


def _judged(splits: Splits) -> tuple[Images, Images]:
    """Training and test images, both labelled."""
    _labels(splits.train, "training")
    if splits.test is None:
        raise ValueError("there is no test split to judge on: hold some images out with --validation 0.1")
    _labels(splits.test, "test")
    return splits.train, splits.test


def _labels(images: Images, part: str) -> Tensor:
    if images.labels is None:
        raise ValueError(
            f"the {part} images have no labels, and without labels nothing can be judged: give train/CLASS/IMAGE"
        )
    return images.labels


def _labelled_features(
    encoder: Encoder, train: Images, test: Images, batch_size: int, device: str | torch.device | None, autocast: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels for training, then those for the test, on the encoder's device."""
    device = _place(encoder, device)
    bank, queries = (
        extract_features(encoder, part, batch_size, autocast=autocast).to(device) for part in (train, test)
    )
    return bank, _labels(train, "training").to(device), queries, _labels(test, "test").to(device)


def _place(encoder: Encoder, device: str | torch.device | None) -> torch.device:
    """Move the encoder there, if it is said where; where it is now."""
    if device is not None:
        encoder.to(device)
    return next(encoder.parameters()).device


@contextlib.contextmanager
def _eval_mode(encoder: Encoder) -> Iterator[None]:
    training = [module for module in encoder.modules() if module.training]
    try:
        encoder.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _pixels(images: Images, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The images of each batch of rows; several processes decode those that are not in memory."""
    workers = 0 if images.pixels is not None else min(8, os.cpu_count() or 1)
    rows = [batch.tolist() for batch in batches]
    own = torch.Generator()  # or the loader would draw from the global one, and judging would change a training
    for batch in DataLoader(images, batch_sampler=rows, collate_fn=whole_batch, num_workers=workers, generator=own):
        yield batch["images"]


@torch.no_grad()
def _features(encoder: Encoder, images: Tensor, autocast: bool) -> Tensor:
    dtype = autocast_dtype(images.device)
    with torch.autocast(images.device.type, dtype, enabled=autocast and dtype != torch.float32):
        return encoder.backbone(encoder.normalize(images)).float()


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
