"""Trained models for other programs: ONNX or a torch.export program, for any batch and width; the verb ``export``."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from papercore.lab.cli import flag
from papercore.lab.files import write_json
from papercore.lab.report import console
from torch import Tensor, nn
from torch.export._patches import register_lstm_while_loop_decomposition

from dsan.images import LEAST_WIDTH
from dsan.model import DSAN
from dsan.read import load_model

TOLERANCE = 1e-4  # of log-probabilities, between the model and what was written
Format = Literal["onnx", "torch"]
Branch = Literal["ctx", "enh"]


class _Logits(nn.Module):
    """One branch of the model, of images that fill their batch."""

    def __init__(self, model: DSAN, branch: Branch) -> None:
        super().__init__()
        self.model, self.branch = model, branch

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images, branches=self.branch)
        return output.context if self.branch == "ctx" else output.enhancement


def export_model(model: DSAN, path: str | Path, format: Format = "onnx", decode: Branch = "ctx") -> dict[str, Any]:
    """Write the model in evaluation mode, read it again, and compare the two on other sizes than it was traced with.

    Input ``images``: float32 (batch, channels, 32, width), -1..1 as (x / 255 - 0.5) / 0.5 makes them, without padding; at least
    16 pixels wide.
    Output ``logits``: (batch, frames, 1 + characters), the blank first.

    Args:
        path: of the file. A JSON file of the same name beside it, and ONNX metadata, say what a reader needs: characters, blank
            and how crops are resized. decode: the branch, ctx or enh.

    Returns:
        What the JSON file says.

    Raises:
        ValueError: for another format or branch, an attention decoder, or if onnx or onnxscript is missing.
        RuntimeError: if what was written computes other values.
    """
    path = Path(path)
    about = _about(model, format, decode)
    graph = _Logits(copy.deepcopy(model), decode).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays: torch looks at it
    try:
        computes = (_write_onnx if format == "onnx" else _write_torch)(graph, temporary, about)
        if computes is not None:
            _compare(graph, computes, about, path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), about)
    return about


def _about(model: DSAN, format: str, decode: str) -> dict[str, Any]:
    if format not in ("onnx", "torch"):
        raise ValueError(f"format {format!r} is unknown: choose onnx or torch")
    if decode not in ("ctx", "enh"):
        raise ValueError(f"decode {decode!r} cannot be exported: choose ctx or enh")
    kind = model.context_kind if decode == "ctx" else model.enhancement_kind
    if kind is None:
        raise ValueError("the model has no enhancement branch: export it with --decode ctx")
    if kind == "attn":
        raise ValueError(
            f"{decode} is an attention decoder, which is fed its own characters: only CTC branches are exported"
        )
    about = {"characters": model.charset.characters, "blank": model.charset.blank, "decode": decode}
    return about | asdict(model.size) | {"min_width": LEAST_WIDTH, "mean": 0.5, "std": 0.5}


def _program(graph: nn.Module, about: dict[str, Any]) -> torch.export.ExportedProgram:
    batch, width = torch.export.Dim("batch", min=1), torch.export.Dim("width", min=LEAST_WIDTH)
    example = torch.zeros(2, about["channels"], about["height"], 100)
    # Without the decomposition the LSTM would be unrolled, for this width alone.
    with torch.no_grad(), register_lstm_while_loop_decomposition(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The tensor attributes .*_flat_weights"
        )  # nn.LSTM's own list of its parameters
        program = torch.export.export(
            graph, (example,), dynamic_shapes=({0: batch, 3: width},), prefer_deferred_runtime_asserts_over_guards=True
        )
    # It takes a batch of one and maps of one column for cases of their own and refuses them; :func:`_compare` tries both.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _write_torch(graph: nn.Module, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(graph, about), path, extra_files={"dsan.json": json.dumps(about)})
    return torch.export.load(path).module()


def _write_onnx(graph: nn.Module, path: Path, about: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    try:
        program = torch.onnx.export(
            _program(graph, about), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
        )
    except ImportError as error:
        raise ValueError(f"exporting needs onnx and onnxscript: pip install 'dsan[export]' ({error})") from None
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(path)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def _compare(graph: nn.Module, computes: Callable[[Tensor], Tensor], about: dict[str, Any], path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, width in ((1, 100), (1, LEAST_WIDTH), (3, LEAST_WIDTH), (2, 161)):
        images = torch.rand(batch, about["channels"], about["height"], width, generator=generator) * 2 - 1
        ours, theirs = (run(images).float().log_softmax(-1) for run in (graph, computes))
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=TOLERANCE):
            raise RuntimeError(f"{path}: computes other values than the model for images {tuple(images.shape)}")


@dataclass
class ExportOptions:
    """What to write."""

    model: str = flag("folder that `dsan train` wrote")
    format: str = flag("onnx or torch (a torch.export program, .pt2)", "onnx")
    decode: str = flag("branch whose logits it gives: ctx, or enh, which needs no recurrent layer", "ctx")
    output: str | None = flag("file to write; model.onnx or model.pt2 in the model's folder if not given", None)


def export(options: ExportOptions) -> Path:
    """The verb ``export``."""
    model = load_model(options.model)
    suffix = "onnx" if options.format == "onnx" else "pt2"
    path = Path(options.output or Path(options.model) / f"model.{suffix}")
    about = export_model(model, path, options.format, options.decode)  # type: ignore[arg-type]
    console.print(
        f"{path}: images (batch, {about['channels']}, {about['height']}, width) float32 in -1..1 to logits (batch, frames, "
        f"{1 + len(about['characters'])}), blank first; {path.with_suffix('.json').name} says how crops are resized",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    return path
