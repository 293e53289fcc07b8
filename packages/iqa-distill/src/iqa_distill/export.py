"""Trained models for other programs: ONNX or a torch.export program, for any number of crops; the verb ``export``."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console
from torch import Tensor, nn

from iqa_distill.metric import load_model, model_folder
from iqa_distill.model import RKIQT

TOLERANCE = 1e-4  # of scores, as a share of the deviation of the training scores


class _Score(nn.Module):
    """Crops of 0..1 to scores in the data set's units."""

    def __init__(self, model: RKIQT) -> None:
        super().__init__()
        self.model = model

    def forward(self, crops: Tensor) -> Tensor:
        return self.model.scale.restore(self.model.predict(self.model.preprocessing.normalize(255 * crops)))


def export_model(model: RKIQT, path: str | Path, format: str = "onnx") -> dict[str, Any]:
    """Write the model in evaluation mode, read it again, and compare the two on batches of other sizes than it was traced with.

    Input ``crops``: float32 (batch, 3, c, c) of RGB, 0 to 1; normalisation is inside. Output ``scores``: (batch,), in the units
    of the training scores, higher is better. An image's score is the mean over its crops.

    Args:
        path: of the file. A JSON file of the same name beside it, and the file's own metadata, say how images become crops and
            what the range of the scores is. format: "onnx" or "torch".

    Returns:
        What the JSON file says.

    Raises:
        ValueError: for another format, or if onnx or onnxscript is missing. RuntimeError: if what was written computes other
            scores, by more than 1e-4 of their deviation.
    """
    if format not in ("onnx", "torch"):
        raise ValueError(f"format {format!r} is unknown: choose onnx or torch")
    path = Path(path)
    about = {"preprocessing": asdict(model.preprocessing), "scale": asdict(model.scale), "higher_is_better": True}
    about = json.loads(json.dumps(about))
    graph = _Score(copy.deepcopy(model)).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays: torch looks at it
    try:
        computes = (_write_onnx if format == "onnx" else _write_torch)(graph, temporary, about)
        if computes is not None:
            _compare(graph, computes, path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), about)
    return about


def _program(graph: _Score) -> torch.export.ExportedProgram:
    size = graph.model.preprocessing.crop_size
    with torch.no_grad():
        return torch.export.export(
            graph, (torch.rand(2, 3, size, size),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )


def _write_torch(graph: _Score, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(graph), path, extra_files={"iqa-distill.json": json.dumps(about)})
    return torch.export.load(path).module()


def _write_onnx(graph: _Score, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    try:
        program = torch.onnx.export(
            _program(graph), input_names=["crops"], output_names=["scores"], dynamo=True, verbose=False
        )
    except ImportError as error:
        raise ValueError(f"exporting needs onnx and onnxscript: pip install 'iqa-distill[export]' ({error})") from None
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(path)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda crops: torch.from_numpy(session.run(None, {"crops": crops.numpy()})[0])


@torch.no_grad()
def _compare(graph: _Score, computes: Callable[[Tensor], Tensor], path: Path) -> None:
    size, generator = graph.model.preprocessing.crop_size, torch.Generator().manual_seed(0)
    for batch in (1, 3):
        crops = torch.rand(batch, 3, size, size, generator=generator)
        ours, theirs = graph(crops), computes(crops)
        if ours.shape != theirs.shape or not torch.allclose(
            ours, theirs, rtol=0, atol=TOLERANCE * graph.model.scale.std
        ):
            raise RuntimeError(f"{path}: computes other scores than the model for {batch} crops")


@dataclass
class ExportOptions:
    """What to write."""

    model: str = flag("folder that `iqa-distill train` wrote")
    format: str = flag("onnx or torch (a torch.export program, .pt2)", "onnx")
    output: str | None = flag("file to write; model.onnx or model.pt2 in the model's folder if not given", None)


def export(options: ExportOptions) -> Path:
    """The verb ``export``."""
    model = load_model(options.model)
    path = Path(
        options.output or model_folder(options.model) / f"model.{'onnx' if options.format == 'onnx' else 'pt2'}"
    )
    export_model(model, path, options.format)
    size = model.preprocessing.crop_size
    console.print(
        f"{path}: crops (batch, 3, {size}, {size}) float32 in 0..1 to scores (batch,), {model.scale.low:g} to "
        f"{model.scale.high:g}, higher is better; {path.with_suffix('.json').name} says how images become crops",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    return path
