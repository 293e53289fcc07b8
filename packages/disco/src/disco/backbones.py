"""Backbones by name: small convolutional networks of our own, and those of timm and torchvision."""

from __future__ import annotations

import difflib
import itertools
import re
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models

_CNN = re.compile(r"cnn:([1-9]\d*(?:-[1-9]\d*)*)(?:x([1-9]\d*))?")
NAMES = {"timm": timm.list_models, "torchvision": lambda: models.list_models(module=models)}


def small_cnn(widths: list[int], depth: int = 1) -> nn.Sequential:
    """Stages of ``depth`` 3 x 3 convolutions, each with batch normalisation and ReLU; then the mean over what is left.

    The first stage halves the image, the second keeps its size, each later one halves it again.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage, width in enumerate(widths):
        for index in range(depth):
            stride = 2 if index == 0 and stage != 1 else 1
            layers += [
                nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build_backbone(name: str, image_size: int = 224) -> nn.Module:
    """A network with random weights that maps images (batch, 3, height, width) to pooled features (batch, width).

    Args:
        name: one of

            - ``cnn:8-16-32``, ``cnn:48-48-96-192x2``: :func:`small_cnn` of these widths, with one or two convolutions a stage;
            - ``timm:NAME`` or ``NAME``: timm's, as ``timm.create_model(NAME, num_classes=0)`` makes it. MobileNetV3 keeps the
              convolution of its head: 1280 features, not 960, as in the authors' program;
            - ``torchvision:NAME``: torchvision's classifier, its last Linear replaced by Identity; a Dropout before it stays.
        image_size: side in pixels, of networks that have a fixed one (ViT, XCiT, Swin).

    Weights are never downloaded: pass ``timm.create_model(NAME, pretrained=True, num_classes=0)`` itself for a pretrained one.

    Raises:
        ValueError: for an unknown name (it gives the nearest), or a network that cannot be built for this size.

    Example:
        >>> build_backbone("timm:mobilenetv3_large_100")(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 1280])
    """
    if image_size < 1:
        raise ValueError(f"backbone {name!r} for images of {image_size} x {image_size}: a side is at least 1 pixel")
    library, separator, model = name.partition(":")
    if not separator:
        library, model = "timm", name
    if library == "cnn":
        match = _CNN.fullmatch(name)
        if match is None:
            raise ValueError(
                f"backbone {name!r}: write widths and convolutions a stage, as in cnn:8-16-32 or cnn:8-16x2"
            )
        return small_cnn([int(width) for width in match[1].split("-")], int(match[2] or 1))
    if library not in ("timm", "torchvision"):
        raise ValueError(f"backbone {name!r}: expected cnn:WIDTHS, timm:NAME (or NAME) or torchvision:NAME")
    known = {model: f"{library}:{model}" for model in NAMES[library]()}
    if not separator:
        known = {model: f"torchvision:{model}" for model in NAMES["torchvision"]()} | {model: model for model in known}
    if model not in NAMES[library]():
        close = difflib.get_close_matches(model, known, 1)
        hint = f"; did you mean {known[close[0]]!r}?" if close else ""
        raise ValueError(f"backbone {name!r}: {library} has no network {model!r}{hint}")
    options = library_options(library, model, image_size)
    try:
        if library == "torchvision":
            return _torchvision(model, options)
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **options)
        return network
    except (ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"backbone {name!r} for images of {image_size} x {image_size}: {_words(error)}") from None


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def library_options(library: str, model: str, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model(model, num_classes=0)`` or ``torchvision.models.get_model(model)`` needs besides: the image size
    of networks that have a fixed one.

    >>> library_options("timm", "vit_tiny_patch16_224", 32), library_options("timm", "resnet18", 32)
    ({'img_size': 32}, {})
    """
    if library == "timm":
        config = timm.get_pretrained_cfg(model)
        return {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    if model.startswith("vit_"):
        return {"image_size": image_size}
    if model.startswith("maxvit_"):
        return {"input_size": (image_size, image_size)}
    if model in ("googlenet", "inception_v3"):  # their auxiliary classifiers would answer, too, in training
        return {"aux_logits": False, "init_weights": True}
    return {}


def _torchvision(model: str, options: dict[str, Any]) -> nn.Module:
    network: nn.Module = models.get_model(model, weights=None, **options)
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("its classifier has no Linear to remove; see whether timm has the network")
    network.set_submodule(linear[-1], nn.Identity())
    return network


def feature_width(backbone: nn.Module, image_size: int) -> int:
    """The width of a backbone's features, found by a forward pass of two black images that leaves the backbone as it was.

    Args:
        backbone: maps (batch, 3, image_size, image_size) to (batch, width); on any device. image_size: pixels.

    Raises:
        ValueError: if it cannot take such images, or if what comes is not (batch, width).

    Example:
        >>> feature_width(build_backbone("cnn:8-16"), image_size=32)
        16
    """
    training = [module for module in backbone.modules() if module.training]
    like = next(itertools.chain(backbone.parameters(), backbone.buffers()), torch.empty(0))
    try:
        images = torch.zeros(2, 3, image_size, image_size, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            features = backbone.eval()(images)
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(f"the backbone cannot take images of {image_size} x {image_size}: {_words(error)}") from error
    finally:
        for module in training:
            module.training = True
    if not isinstance(features, torch.Tensor) or features.shape[:1] != (2,) or features.dim() != 2:
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"a backbone must map (batch, 3, height, width) to (batch, width); 2 images gave {shape}. "
            "Pool what comes, and drop the classifier"
        )
    return features.shape[1]
