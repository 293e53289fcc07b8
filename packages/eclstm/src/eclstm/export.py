"""Trained regressors for systems without Python: ONNX, and the torch.export graph it comes from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from papercore.lab.cli import flag
from papercore.lab.report import console

from eclstm.evaluate import load_model
from eclstm.model import ECLSTMRegressor


def export_program(model: ECLSTMRegressor) -> torch.export.ExportedProgram:
    """The graph in evaluation mode: (batch, rows, columns) raw segments to (batch,), for any batch size."""
    model = model.eval()
    example = torch.zeros(2, model.rows, len(model.columns))
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def export_onnx(model: ECLSTMRegressor, path: str | Path) -> None:
    """Write the graph as ONNX with inputs ``segments`` and output ``rul``; the columns it reads are in its metadata.

    Raises:
        ValueError: if onnx and onnxscript are not installed.

    Example:
        >>> model = ECLSTMRegressor(["heat", "flow"])
        >>> model.rows, len(model.columns)  # the sizes of a segment
        (20, 2)
        >>> export_onnx(model, "model.onnx")  # doctest: +SKIP
        >>> onnxruntime.InferenceSession("model.onnx").run(["rul"], {"segments": segments})  # doctest: +SKIP
    """
    path = Path(path)
    try:
        program = torch.onnx.export(
            export_program(model), input_names=["segments"], output_names=["rul"], dynamo=True, verbose=False
        )
    except ImportError as error:
        raise ValueError(f"exporting needs onnx and onnxscript: pip install 'eclstm[export]' ({error})") from None
    assert program is not None
    program.model.metadata_props["columns"] = ",".join(model.columns)
    program.model.metadata_props["rows"] = str(model.rows)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    program.save(temporary)
    temporary.replace(path)


@dataclass
class ExportOptions:
    """What to write."""

    model: str = flag("folder that `eclstm train` wrote, or a Hub name")
    output: str | None = flag("file to write; model.onnx in the model's folder if not given", None)


def export(options: ExportOptions) -> Path:
    """The verb ``export``."""
    model = load_model(options.model)
    path = Path(options.output or Path(options.model) / "model.onnx")
    export_onnx(model, path)
    console.print(
        f"{path}: segments (batch, {model.rows}, {len(model.columns)}) float32 to rul (batch,)", soft_wrap=True
    )
    console.print(f"columns: {', '.join(model.columns)}", soft_wrap=True)
    return path
