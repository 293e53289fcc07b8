import json

import dsan.export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dsan import CTCCharset, ctc_greedy
from dsan.export import export_model
from dsan.images import normalize
from papercore.lab.cli import App
from tiny_dsan import tiny_dsan

app = App("dsan", "test")
app.command("export", "dsan.export:export", "test")
SIZES = [(1, 100), (3, 37), (2, 208)]


def images(batch, width, channels=1):
    random = np.random.default_rng(width)
    return torch.from_numpy(random.integers(0, 256, (batch, channels, 32, width), dtype=np.uint8))


def test_onnx_is_enough_to_read(tmp_path, capsys):
    model = tiny_dsan(characters="ab1", keep_ratio=True)
    model.save_pretrained(tmp_path)
    assert app(["export", "--model", str(tmp_path)]) == 0
    assert (
        "model.onnx: images (batch, 1, 32, width) float32 in -1..1 to logits (batch, frames, 4)"
        in capsys.readouterr().out
    )
    path = tmp_path / "model.onnx"
    about = json.loads(path.with_suffix(".json").read_text())
    assert about == {
        "characters": "ab1", "blank": 0, "decode": "ctx", "height": 32, "width": 100, "channels": 1, "keep_ratio": True,
        "max_width": 800, "rotate_tall": False, "min_width": 16, "mean": 0.5, "std": 0.5,
    }  # fmt: skip
    metadata = {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}
    assert about.items() <= metadata.items()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, width in [*SIZES, (1, 16), (1, 19)]:
        pixels = images(batch, width)
        (logits,) = session.run(None, {"images": normalize(pixels).numpy()})
        assert np.allclose(logits, model(normalize(pixels)).context.detach().numpy(), atol=1e-4)
        texts = [reading.text for reading in ctc_greedy(torch.from_numpy(logits), CTCCharset("ab1"))]
        assert texts == [reading.text for reading in model.read_fitted(list(pixels.numpy()))]
    assert {node.op_type for node in onnx.load(path).graph.node} >= {
        "LSTM",
        "Resize",
    }  # neither unrolled nor for one size
    assert not list(tmp_path.glob(".*"))


def test_torch_program(tmp_path):
    model = tiny_dsan(channels=3, attention_maps="channel")
    training = model.train().training
    about = export_model(model, tmp_path / "new" / "m.pt2", "torch", "ctx")
    assert model.training is training
    model.eval()
    files = {"dsan.json": ""}
    program = torch.export.load(tmp_path / "new" / "m.pt2", extra_files=files).module()
    assert json.loads(files["dsan.json"]) == about == json.loads((tmp_path / "new" / "m.json").read_text())
    with torch.no_grad():
        for batch, width in [*SIZES, (1, about["min_width"])]:
            pixels = normalize(images(batch, width, channels=3))
            assert torch.allclose(program(pixels), model(pixels).context, atol=1e-5)


def test_the_enhancement_branch_needs_no_recurrent_layer(tmp_path):
    export_model(tiny_dsan(), tmp_path / "m.pt2", "torch", "enh")
    graph = torch.export.load(tmp_path / "m.pt2").graph
    assert torch.ops.aten.lstm.input not in {node.target for node in graph.nodes}


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    write = dsan.export._write_torch

    def wrong(*given):
        computes = write(*given)
        return lambda pixels: computes(pixels) + torch.linspace(0, 1, 37)

    monkeypatch.setattr(dsan.export, "_write_torch", wrong)
    with pytest.raises(RuntimeError, match=r"m.pt2: computes other values than the model for images \(1, 1, 32, 100\)"):
        export_model(tiny_dsan(), tmp_path / "m.pt2", "torch", "enh")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "decode", "format", "message"),
    [
        ({}, "ctx", "tflite", "format 'tflite' is unknown: choose onnx or torch"),
        ({}, "fuse", "onnx", "decode 'fuse' cannot be exported: choose ctx or enh"),
        ({"enhancement": None}, "enh", "onnx", "has no enhancement branch: export it with --decode ctx"),
        ({"context": "attn"}, "ctx", "onnx", "ctx is an attention decoder"),
        ({"enhancement": "attn"}, "enh", "torch", "enh is an attention decoder"),
    ],
)
def test_what_cannot_be_exported(tmp_path, options, decode, format, message):
    with pytest.raises(ValueError, match=message):
        export_model(tiny_dsan(**options), tmp_path / "m", format, decode)
    assert not list(tmp_path.iterdir())
