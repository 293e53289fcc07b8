"""The verbs one after the other, as a user calls them."""

import json

import mmict
import mmict.train
import pytest
from mmict import MMICTModel, data
from mmict.cli import app
from mmict.sample import render_shapes
from mmict.small import SmallOptions
from PIL import Image

STAGES = SmallOptions((2, 2, 2), image_size=16, patch=8, vision_width=16, width=16, queries=2, layers=2, vocabulary=100)


@pytest.fixture(scope="module", autouse=True)
def few():
    """A small model and a sample that are made at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmict.train, "STAGES", STAGES)
        patch.setattr(data, "SAMPLE", 60)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "run"
    (folder.parent / "run.yaml").write_text("k: 1\nsampler: visual\nmax_train: 30\ncompare: false\n")
    flags = ["--config", str(folder.parent / "run.yaml"), "--output_dir", str(folder), "--k", "3", "--max_test", "6"]
    assert app(["train", *flags, "--max_steps", "2", "--per_device_train_batch_size", "8"]) == 0
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, array in enumerate(render_shapes(3).images):
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


def test_a_config_file_gives_flags_and_the_command_line_is_stronger(run):
    options = json.loads((run / "options.json").read_text())
    assert (options["k"], options["sampler"], options["max_train"]) == (3, "visual", 30)


def test_eval_finds_what_training_did(run):
    assert app(["eval", "--model", str(run), "--num_beams", "1"]) == 0
    judged = json.loads((run / "eval-sample.json").read_text())
    trained = json.loads((run / "metrics.json").read_text())["mmict"]
    assert judged["scores"]["test"]["3"] == pytest.approx(trained)
    assert set(judged["scores"]["test"]) == {"0", "3"}


def test_caption_says_what_the_model_says(run, photos, tmp_path):
    (photos / "demos.jsonl").write_text(json.dumps({"image": "2.png", "text": "a red cross"}))
    flags = ["--model", str(run), "--demos", str(photos / "demos.jsonl"), "--json", str(tmp_path / "said.json")]
    assert app(["caption", str(photos / "*.png"), *flags]) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert len(said) == 3
    model = MMICTModel.from_pretrained(run)
    example = mmict.Example(str(photos / "2.png"), "a red cross")
    assert said[0]["text"] == model.generate([str(photos / "0.png")], demonstrations=[example])[0]


def test_answer(run, photos, capsys):
    flags = ["--model", str(run), "--question", "what colour is it?", "--json", "-"]
    assert app(["answer", str(photos / "0.png"), *flags]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["question"] == "what colour is it?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "no/such"], "no/such"),
        (["caption", "no/such.png", "--model", "no/such"], "no/such"),
        (["train", "--modle", "x"], "--modle"),
        (["train", "--max_trian", "3"], "did you mean '--max_train'"),
        (["reproduce", "--arms", "E"], "no arm 'E'"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
