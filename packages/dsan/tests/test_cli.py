"""The verbs one after the other, as a user calls them."""

import json

import pytest
from dsan import DSAN, sample
from dsan.cli import app
from dsan.images import Size
from PIL import Image

TINY = ["--widths", "4", "4", "8", "8", "--hidden", "4", "--max_steps", "2", "--per_device_train_batch_size", "16"]


@pytest.fixture(scope="module", autouse=True)
def few():
    """A sample that is drawn at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "TRAIN", 24)
        patch.setattr(sample, "TEST", 20)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "run"
    (folder.parent / "run.yaml").write_text("widths: [4, 4, 8, 8]\nhidden: 8\nvalidation: 0\nenhancement: ctc\n")
    flags = ["--config", str(folder.parent / "run.yaml"), "--output_dir", str(folder)]
    assert app(["train", *flags, *TINY]) == 0
    return folder


def test_a_config_file_gives_flags_and_the_command_line_is_stronger(run):
    assert DSAN.from_pretrained(run).context.blstm.lstms[0].hidden_size == 4


def test_eval_finds_what_training_did(run):
    assert app(["eval", "--model", str(run), "--decode", "ctx", "enh", "fuse"]) == 0
    judged = json.loads((run / "eval-sample.json").read_text())
    assert judged["scores"] == json.loads((run / "metrics.json").read_text())
    assert len(judged["predictions"]) == 20


def test_read_finds_what_eval_did(run, tmp_path):
    words = sample.sample_words(Size())[1]
    for i in range(3):
        Image.fromarray(words.arrays([i])[0][0]).save(tmp_path / f"{i}.png")
    flags = ["--model", str(run), "--json", str(tmp_path / "read.json")]
    assert app(["eval", "--model", str(run)]) == 0
    assert app(["read", str(tmp_path / "*.png"), *flags]) == 0
    judged = json.loads((run / "eval-sample.json").read_text())["predictions"][:3]
    read = json.loads((tmp_path / "read.json").read_text())
    assert [row["text"] for row in read] == [row["ctx"]["text"] for row in judged]


def test_synthesis_is_something_to_train_on(tmp_path):
    assert app(["synth", str(tmp_path / "words.zip"), "--to", "zip", "--count", "20"]) == 0
    flags = ["--data", str(tmp_path / "words.zip"), "--validation", "4", "--mask_weight", "1"]
    assert app(["train", *TINY, *flags, "--output_dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "no/such"], "no/such"),
        (["read", "no/such.png", "--model", "no/such"], "no/such"),
        (["export", "--model", "no/such"], "no/such"),
        (["compare", "no/such"], "no/such"),
        (["train", "--bakcbone", "tiny"], "did you mean '--backbone'"),
        (["reproduce", "--arms", "E"], "no arm 'E'"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
