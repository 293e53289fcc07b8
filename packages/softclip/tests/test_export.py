import json
import re

import open_clip
import pytest
import torch
from papercore.lab.cli import App
from softclip.checkpoints import load_clip, new_clip, save_clip, save_roi
from softclip.export import ExportOptions, export, export_clip
from softclip.model import RoiEncoder

app = App("softclip", "test")
app.command("export", "softclip.export:export", "test")
IMAGES = torch.linspace(-2, 2, 3 * 32 * 32).view(1, 3, 32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's, with a ROI encoder and other files."""
    folder = tmp_path_factory.mktemp("run")
    clip, config = new_clip("tiny-resnet", seed=0)
    save_clip(folder, clip, config, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    save_roi(folder, RoiEncoder(clip.visual, 5))
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_folder(tmp_path, folder, capsys):
    out = export(ExportOptions(str(folder), str(tmp_path / "out")))
    assert {path.name for path in out.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}
    scope = {}
    exec(capsys.readouterr().out.partition("load it by\n")[2], scope)
    assert scope["preprocess"].transforms[-1].std == [0.2, 0.2, 0.1]
    with torch.no_grad():
        assert torch.equal(scope["model"].eval().encode_image(IMAGES), load_clip(str(folder)).clip.encode_image(IMAGES))
    assert scope["tokenizer"](["a"]).shape == (1, 16)


def test_a_checkpoint_of_training_with_a_roi_encoder(tmp_path, capsys):
    clip, config = new_clip("tiny-vit", seed=0)
    (tmp_path / "mine.json").write_text(json.dumps(config))
    torch.save(
        {"epoch": 1, "state_dict": clip.state_dict() | {"roi_encoder.w": torch.ones(2)}}, tmp_path / "epoch_1.pt"
    )
    flags = ["--model", str(tmp_path / "epoch_1.pt"), "--clip", str(tmp_path / "mine.json")]
    assert app(["export", *flags, "--output_dir", str(tmp_path / "out")]) == 0
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(IMAGES), clip.eval().encode_image(IMAGES))


def test_what_open_clip_computes_is_compared(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("softclip.export.save_clip", lambda folder, clip, *rest: save_clip(folder, other, *rest))
    other, _ = new_clip("tiny-resnet", seed=1)
    with pytest.raises(RuntimeError, match="open_clip computes other features"):
        export_clip(load_clip(str(folder)), tmp_path / "out")


def test_wrong_input_is_told_in_a_line(tmp_path, folder, capsys):
    torch.save(new_clip("tiny-vit", seed=0)[0].state_dict(), tmp_path / "vit.pt")
    for arguments, message in (
        (["--model", tmp_path / "vit.pt"], "vit.pt: a file does not say which network it is: give its name, such as"),
        (["--model", tmp_path / "vit.pt", "--clip", "tiny-resnet"], "vit.pt cannot be loaded into the network: "),
        (["--model", folder, "--clip", "tiny-vit"], "--clip goes with a file of weights, and"),
        (["--model", folder, "--output_dir", folder], "is the model itself: give another --output_dir"),
        (["--model", tmp_path / "absent"], "is no folder, and a name alone has no weights"),
    ):
        assert app(["export", "--output_dir", str(tmp_path / "out"), *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(re.escape(message), line)
