import numpy as np
import onnxruntime
import pytest
import torch
from eclstm import ECLSTMRegressor
from eclstm.export import ExportOptions, export, export_onnx, export_program

FEATURES = [f"sensor_{i}" for i in range(4)]
CASES = {
    "eclstm": {},
    "eclstm by convolution": {"layers": [{"filters": [6, 40], "recurrent_activation": ["tanh", "sigmoid"]}]},
    "eclstm after convolutions": {"preprocessing": [{"filters": 3}], "layers": [{"filters": [4], "kernel_sizes": [2]}]},
    "eclstm, three conditions": {"condition_columns": ["setting_1"], "conditions": 3},
    "lstm": {"network": "lstm", "layers": [8, 6]},
    "convlstm": {"network": "convlstm"},
    "cnn-lstm": {"network": "cnn-lstm"},
}


def trained(options):
    torch.manual_seed(0)
    model = ECLSTMRegressor(FEATURES, **options)
    rows = torch.randn(200, len(model.columns)) * 3 + 500
    centres = torch.tensor([[498.0], [500.0], [503.0]]) if options.get("conditions") else None
    model.standardize.fit(rows, centres)
    model(torch.randn(32, model.rows, len(model.columns)) * 3 + 500)  # moves the running statistics off their start
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_exported_graphs_equal_the_model_at_any_batch_size(name, tmp_path):
    model = trained(CASES[name])
    program = export_program(model).module()
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 2, 7):
        segments = torch.randn(batch, model.rows, len(model.columns)) * 3 + 500
        expected = model(segments).detach()
        torch.testing.assert_close(program(segments), expected, rtol=1e-5, atol=1e-5)
        (rul,) = session.run(None, {"segments": segments.numpy()})
        np.testing.assert_allclose(rul, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_file_names_the_columns_it_reads(tmp_path):
    trained({}).save_pretrained(tmp_path)
    path = export(ExportOptions(str(tmp_path)))
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["columns"] == ",".join(FEATURES)
    assert sorted(p.suffix for p in tmp_path.iterdir() if "onnx" in p.name) == [".onnx"]
