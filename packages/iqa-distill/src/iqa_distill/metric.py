"""A trained model as an image quality metric, called as pyiqa's are: on tensors or files, for judging or as a loss."""

from __future__ import annotations

import contextlib
import io
import textwrap
from pathlib import Path
from typing import Any

import torch
from papercore.ops import pick_device
from safetensors import SafetensorError
from torch import Tensor, nn

from iqa_distill.model import RKIQT
from iqa_distill.scoring import score_images, score_tensor

ACCEPTED = (
    "a folder that `iqa-distill train` wrote, with config.json and model.safetensors, or that model.safetensors itself"
)


def model_folder(path: str | Path) -> Path:
    """The folder of a model that is named by its folder or its file model.safetensors."""
    path = Path(path)
    return path.parent if path.name == "model.safetensors" else path


def load_model(path: str | Path, device: torch.device | str | None = None) -> RKIQT:
    """The model that a finished run wrote, in evaluation mode. Nothing is ever downloaded.

    Args:
        path: its folder, or the file model.safetensors in it. device: the best at hand, if not given.

    Raises:
        FileNotFoundError: if there is no such folder or file; the message says what is accepted. ValueError: if its files do not
        fit together.
    """
    folder = model_folder(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path}: no {name} there; expected {ACCEPTED} (nothing is downloaded)")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it reads a local folder
            model: RKIQT = RKIQT.from_pretrained(folder, strict=True)
    except (RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a model of iqa-distill: {textwrap.shorten(str(error), 500)}") from None
    return model.eval().to(device or pick_device())


class QualityMetric(nn.Module):
    """No-reference quality of images.

    Args:
        model: a trained student. Its weights are frozen: gradients go to the images.
        name: what it is called.
        as_loss: return a loss to be minimised, not scores.

    ``lower_better`` is False. ``score_range`` is the range of the scores it was trained on, (low, high).
    """

    lower_better = False

    def __init__(self, model: RKIQT, name: str = "rkiqt", as_loss: bool = False) -> None:
        super().__init__()
        self.model, self.name, self.as_loss = model.eval().requires_grad_(False), name, as_loss

    @property
    def score_range(self) -> tuple[float, float]:
        return self.model.scale.low, self.model.scale.high

    def forward(self, images: Any) -> Tensor:
        """Scores (n,), or the loss: minus the mean score, where 0..1 is the range of the training scores.

        There is no second argument: a no-reference metric has no use for a reference.

        Args:
            images: a tensor (n, 3, h, w) or (3, h, w) of RGB, floats from 0 to 1 or uint8; one path; or several paths. Gradients
                flow, with all crops in memory, if a tensor requires them or ``as_loss`` is set.

        Raises:
            ValueError: as :func:`iqa_distill.scoring.score_images`; for a loss of files, which have no gradient.
        """
        if self.as_loss and not isinstance(images, Tensor):
            raise ValueError("a loss (as_loss=True) takes a tensor of images: files have no gradient")
        if self.as_loss:
            return -score_tensor(self.model, images, normalize=True).mean()
        if isinstance(images, Tensor) and images.requires_grad and torch.is_grad_enabled():
            return score_tensor(self.model, images)
        return torch.from_numpy(score_images(self.model, images)).float().to(next(self.parameters()).device)


def load_metric(path: str | Path, device: torch.device | str | None = None, as_loss: bool = False) -> QualityMetric:
    """A :class:`QualityMetric` of what `iqa-distill train` wrote, named after its folder. Errors: :func:`load_model`.

    ``load_metric("runs/iqa-distill-sample")("photo.jpg")`` gives a tensor with one score.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     RKIQT("tiny").save_pretrained(folder)  # random weights, in place of what `iqa-distill train` writes
        ...     metric = load_metric(folder)
        >>> metric(torch.rand(2, 3, 128, 160)).shape, metric.score_range, metric.lower_better
        (torch.Size([2]), (0.0, 1.0), False)
    """
    return QualityMetric(load_model(path, device), model_folder(path).name, as_loss)
