import json
import re

import pytest
import timm
import torch
from disco import Encoder
from disco.backbones import build_backbone
from disco.export import ExportOptions, export, export_backbone, loading_code
from disco.model import DisCo
from papercore.lab.cli import App
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision import models

NAMES = [
    "timm:mobilenetv3_small_100",
    "resnet18",
    "timm:efficientnet_b0",
    "timm:vit_tiny_patch16_224",
    "timm:xcit_nano_12_p16_224",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:googlenet",
    "cnn:4-6",
]


def trained(name, size=32):
    """An encoder whose running statistics have moved off their start."""
    torch.manual_seed(0)
    encoder = Encoder(name, dim=4, hidden=6, image_size=size, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
    with torch.no_grad():
        encoder(torch.randn(4, 3, size, size))
    return encoder.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_code_gives_the_same_features(tmp_path, name):
    encoder = trained(name)
    export_backbone(encoder, tmp_path / "b.safetensors")
    code = loading_code(encoder, tmp_path / "b.safetensors")
    assert len(code.splitlines()) == 2
    assert "disco" in code or not name.startswith("cnn")
    scope = {}
    exec(code, scope)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(images), encoder.backbone(images))


def test_the_printed_code_has_the_image_size():
    with torch.device("meta"):
        code = {
            name: loading_code(Encoder(f"torchvision:{name}", image_size=224), "b") for name in ("vit_b_32", "maxvit_t")
        }
    assert "get_model('vit_b_32', image_size=224)\nmodel.set_submodule('heads.head', " in code["vit_b_32"]
    assert "get_model('maxvit_t', input_size=(224, 224))" in code["maxvit_t"]


def test_mobilenet_v3_large_in_timm(tmp_path):
    encoder = trained("timm:mobilenetv3_large_100")
    path = tmp_path / "backbone.safetensors"
    export_backbone(encoder, path)
    first = timm.create_model("mobilenetv3_large_100", num_classes=0)
    first.load_state_dict(load_file(path), strict=True)
    second = timm.create_model("mobilenetv3_large_100", num_classes=0, checkpoint_path=str(path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = encoder.backbone(images)
        assert features.shape == (2, 1280)
        assert torch.equal(first.eval()(images), features)
        assert torch.equal(second.eval()(images), features)


def test_torchvision_without_its_last_linear(tmp_path):
    encoder = trained("torchvision:mobilenet_v3_large")
    export_backbone(encoder, tmp_path / "b.safetensors")
    network = models.mobilenet_v3_large()
    network.classifier[3] = nn.Identity()
    network.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval()(images), encoder.backbone(images))


def test_verb(tmp_path, capsys):
    encoder = trained("cnn:4-6", 16)
    encoder.save_pretrained(tmp_path / "run")
    assert export(ExportOptions(str(tmp_path / "run"))) == tmp_path / "run" / "backbone.safetensors"
    path = export(ExportOptions(str(tmp_path / "run"), str(tmp_path / "new" / "student.safetensors")))
    printed = capsys.readouterr().out
    assert printed.endswith(
        f"{path}: cnn:4-6, images (batch, 3, 16, 16) to features (batch, 6); mean (0.5, 0.4, 0.3), std (0.25, 0.2, 0.1); "
        f"load it by\n{loading_code(encoder, path)}\n"
    )
    weights = load_file(path)
    assert not [name for name in weights if "head" in name]
    backbone = build_backbone("cnn:4-6")
    backbone.load_state_dict(weights, strict=True)
    assert torch.equal(backbone[0].weight, encoder.backbone[0].weight)
    assert sorted(p.name for p in path.parent.iterdir()) == ["student.safetensors"]


def test_metadata(tmp_path):
    export_backbone(trained("cnn:4-6", 16), tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        about = file.metadata()
    assert about.pop("format") == "pt"
    assert {key: json.loads(value) for key, value in about.items()} == {
        "backbone": "cnn:4-6",
        "width": 6,
        "image_size": 16,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.2, 0.1],
    }


def test_tied_weights_are_written_twice(tmp_path):
    linear = nn.Linear(48, 48)
    encoder = Encoder(nn.Sequential(nn.Flatten(), linear, linear), dim=4, hidden=0, image_size=4)
    export_backbone(encoder, tmp_path / "b.safetensors")
    encoder.backbone.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)
    with pytest.raises(ValueError, match="a module without a name"):
        loading_code(encoder, "b.safetensors")


def test_what_is_no_finished_run_is_told_in_a_line(tmp_path, capsys):
    app = App("disco", "test")
    app.command("export", "disco.export:export", "test")
    run = tmp_path / "run"
    DisCo(trained("cnn:4-6", 16), arm="moco", queue_size=16).save_pretrained(run / "checkpoint-4")
    trained("cnn:4-6", 16).save_pretrained(tmp_path / "good")
    for arguments, message in (
        ([tmp_path / "absent"], "no such folder"),
        ([run], "no config.json; expected a folder that a finished run of disco wrote"),
        ([run / "checkpoint-4"], f"is the state of a training: give the folder of the run, {run}"),
        ([tmp_path / "good" / "config.json"], "a file, not a folder"),
        ([tmp_path / "good", "--output", "student.pth"], "student.pth: expected a name that ends in .safetensors"),
    ):
        assert app(["export", "--model", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(re.escape(message), line)
