"""The verbs one after the other, as a user calls them."""

import csv
import json

import pytest
from iqa_distill.cli import app
from iqa_distill.model import RKIQT
from iqa_distill.teacher import NARTeacher
from PIL import Image
from tiny_sample import ratings, stand_in

TINY = ["--crop_size", "32", "--max_steps", "2", "--per_device_train_batch_size", "8"]


@pytest.fixture(scope="module", autouse=True)
def sample():
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "teacher"
    assert app(["teacher", *TINY, "--dim", "8", "--depth", "1", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(teacher):
    folder = teacher.parent / "run"
    (teacher.parent / "run.yaml").write_text(f"teacher: {teacher}\narm: drd\ncrops: 3\ntoken_init: learned\n")
    flags = ["--config", str(teacher.parent / "run.yaml"), "--arm", "mcd", "--output_dir", str(folder)]
    assert app(["train", *flags, *TINY]) == 0
    return folder


def test_a_config_file_gives_flags_and_the_command_line_is_stronger(run, teacher):
    assert RKIQT.from_pretrained(run).stems is None
    assert json.loads((run / "options.json").read_text())["arm"] == "mcd"
    assert NARTeacher.from_pretrained(teacher).depth == 1
    assert not (run / "teacher").exists()


def test_eval_finds_what_training_did(run):
    assert app(["eval", "--model", str(run)]) == 0
    judged = json.loads((run / "eval-sample.json").read_text())
    assert judged["correlations"] == pytest.approx(json.loads((run / "metrics.json").read_text()), abs=1e-4)
    assert len(judged["predictions"]) == 6


def test_score_finds_what_eval_did(run, tmp_path):
    judged = json.loads((run / "eval-sample.json").read_text())["predictions"]
    rated = ratings()
    for i, row in enumerate(judged):
        Image.fromarray(rated.open(rated.names.index(row["image"]))).save(tmp_path / f"{i}.png")
    assert app(["score", str(tmp_path / "*.png"), "--model", str(run), "--csv", str(tmp_path / "scores.csv")]) == 0
    with (tmp_path / "scores.csv").open() as stream:
        scores = [float(row["score"]) for row in csv.DictReader(stream)]
    assert scores == pytest.approx([row["prediction"] for row in judged], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "no/such"], "no/such"),
        (["score", "no/such.png", "--model", "no/such"], "no/such"),
        (["export", "--model", "no/such"], "no/such"),
        (["compare", "no/such"], "no/such"),
        (["train", "--bakcbone", "tiny"], "did you mean '--backbone'"),
        (["teacher", "--peices", "3"], "did you mean '--pieces'"),
        (["reproduce", "--arms", "E"], "no arm 'E'"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
