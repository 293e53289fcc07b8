"""The verbs one after the other, as a user calls them."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from softclip.cli import app

QUICK = ["--max_train", "64", "--max_test", "20", "--num_train_epochs", "1", "--per_device_train_batch_size", "32"]
TINY = ["--clip", "tiny-vit", "--compare", "False"]


@pytest.fixture(scope="module", autouse=True)
def _few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("softclip.data.SAMPLE_TRAIN", 64)
        patch.setattr("softclip.data.SAMPLE_TEST", 20)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A CLIP trained by the method."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    assert app(["train", *QUICK, *TINY, "--output_dir", str(folder)]) == 0
    return folder


def test_eval_finds_what_training_did(run):
    assert app(["eval", "--model", str(run)]) == 0
    found = json.loads((run / "eval-sample" / "metrics.json").read_text())
    before = json.loads((run / "metrics.json").read_text())["soft_re"]
    assert found["metrics"] == pytest.approx(before)


def test_export_is_a_folder_that_open_clip_loads(run, tmp_path):
    assert app(["export", "--model", str(run), "--output_dir", str(tmp_path / "clean")]) == 0
    assert not (tmp_path / "clean" / "roi_encoder.safetensors").exists()
    models = []
    for folder in (run, tmp_path / "clean"):
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        models.append(model.eval())
    image = preprocess(Image.new("RGB", (50, 40), "red")).unsqueeze(0)
    texts = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clean'}")(["a red square"])
    with torch.no_grad():
        ours, clean = ([model.encode_image(image), model.encode_text(texts)] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(ours, clean, strict=True))


def test_a_config_file_gives_the_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("arm: label_smoothing\nclip: tiny-vit\ncompare: false\nbeta: 0.2\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--arm", "clip", "--output_dir", str(tmp_path / "run")]
    assert app(["train", *QUICK, *flags]) == 0
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert (options["arm"], options["beta"], options["clip"]) == ("clip", 0.2, "tiny-vit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "no/such"], "no/such"),
        (["eval"], "--model"),
        (["export", "--model", "no/such", "--output_dir", "x"], "no/such"),
        (["train", "--cilp", "tiny-vit"], "did you mean '--clip'"),
        (["train", "--data", "no/such", *TINY], "no/such: no such file or folder"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
