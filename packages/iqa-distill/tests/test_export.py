import json

import iqa_distill.export
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from iqa_distill.export import export_model
from iqa_distill.scoring import score_images
from papercore.lab.cli import App
from tiny_rkiqt import tiny_rkiqt

app = App("iqa-distill", "test")
app.command("export", "iqa_distill.export:export", "test")
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def crops(model):
    return model.preprocessing.crops_of(torch.from_numpy(IMAGE).permute(2, 0, 1)) / 255


def test_onnx_is_enough_to_score(tmp_path, capsys):
    model = tiny_rkiqt(crops=5)
    model.save_pretrained(tmp_path)
    assert app(["export", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "model.onnx: crops (batch, 3, 32, 32) float32 in 0..1 to scores (batch,), 0 to 100, higher is better" in said
    about = json.loads((tmp_path / "model.json").read_text())
    assert about["preprocessing"]["crop_size"] == 32
    assert about["preprocessing"]["crops"] == 5
    assert about["scale"] == {"mean": 50, "std": 20, "low": 0, "high": 100}
    metadata = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert about.items() <= metadata.items()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"crops": crops(model).numpy()})
    assert scores.mean() == pytest.approx(score_images(model, [IMAGE])[0], abs=1e-2)
    assert session.run(None, {"crops": crops(model)[:1].numpy()})[0] == pytest.approx(scores[:1], abs=1e-2)
    assert not list(tmp_path.glob(".*"))


def test_torch_program(tmp_path):
    model = tiny_rkiqt(token_init="learned", infer="mean").train()
    about = export_model(model, tmp_path / "new" / "m.pt2", "torch")
    assert model.training
    files = {"iqa-distill.json": ""}
    program = torch.export.load(tmp_path / "new" / "m.pt2", extra_files=files).module()
    assert json.loads(files["iqa-distill.json"]) == about == json.loads((tmp_path / "new" / "m.json").read_text())
    with torch.no_grad():
        assert program(crops(model)).mean().item() == pytest.approx(score_images(model, [IMAGE])[0], abs=1e-2)


def test_what_was_written_is_compared(tmp_path, monkeypatch):
    write = iqa_distill.export._write_torch

    def wrong(*given):
        computes = write(*given)
        return lambda images: computes(images) + 20 * 1.1e-4

    monkeypatch.setattr(iqa_distill.export, "_write_torch", wrong)
    with pytest.raises(RuntimeError, match=r"m\.pt2: computes other scores than the model for 1 crops"):
        export_model(tiny_rkiqt(), tmp_path / "m.pt2", "torch")
    assert not list(tmp_path.iterdir())


def test_another_format(tmp_path):
    with pytest.raises(ValueError, match="format 'tflite' is unknown: choose onnx or torch"):
        export_model(tiny_rkiqt(), tmp_path / "m", "tflite")
    assert not list(tmp_path.iterdir())
