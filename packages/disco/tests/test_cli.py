"""The verbs one after the other, as a user calls them."""

import json

import pytest
import timm
import torch
from disco import Encoder
from disco.cli import app
from safetensors.torch import load_file

SOME = ["--max_train", "128", "--max_test", "40"]
QUICK = [*SOME, "--max_steps", "4", "--per_device_train_batch_size", "32"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A teacher, and a student of another family that learned from its folder."""
    folder = tmp_path_factory.mktemp("chain")
    teacher, student = str(folder / "teacher"), str(folder / "student")
    assert app(["pretrain-teacher", *QUICK, "--backbone", "cnn:8-16", "--dim", "16", "--output_dir", teacher]) == 0
    flags = ["--teacher", teacher, "--student", "resnet10t", "--hidden", "32", "--compare", "False"]
    assert app(["distill", *QUICK, *flags, "--output_dir", student]) == 0
    return folder


def metrics(path):
    return json.loads(path.read_text())


def test_a_teacher_is_compared_with_its_random_self(chain):
    assert set(metrics(chain / "teacher" / "metrics.json")) == {"random", "teacher"}


def test_the_student_has_the_teachers_width_and_is_judged_beside_it(chain):
    assert Encoder.from_pretrained(chain / "student").dim == 16
    judged = metrics(chain / "student" / "metrics.json")
    assert set(judged) == {"random", "teacher", "disco"}
    assert judged["teacher"] == metrics(chain / "teacher" / "metrics.json")["teacher"]


def test_the_teacher_is_named_with_its_hash(chain, capsys):
    flags = ["--teacher", str(chain / "teacher"), "--student", "resnet10t", "--hidden", "32", "--compare", "False"]
    assert app(["train", *QUICK, *flags, "--output_dir", str(chain / "student")]) == 0
    said = capsys.readouterr().out
    assert "teacher cnn:8-16" in said
    assert "head 16-16-16; weights " in said


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_eval_finds_what_training_did(kind, chain):
    flags = ["--autocast", "True", *(["--k", "10", "20"] if kind == "knn" else [])]  # training judges so, too
    assert app(["eval", kind, "--model", str(chain / "student"), *SOME, *flags]) == 0
    again = metrics(chain / "student" / f"eval-sample-{kind}" / "metrics.json")["metrics"]
    before = metrics(chain / "student" / "metrics.json")["disco"]
    names = ("knn_10", "knn_20") if kind == "knn" else ("linear_top1", "linear_top5")
    assert {name: again[name] for name in names} == pytest.approx({name: before[name] for name in names})


def test_export_is_the_students_backbone_for_timm(chain):
    assert app(["export", "--model", str(chain / "student")]) == 0
    encoder = Encoder.from_pretrained(chain / "student").eval()
    model = timm.create_model("resnet10t", num_classes=0)
    model.load_state_dict(load_file(chain / "student" / "backbone.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), encoder.backbone(images))


def test_a_config_file_gives_the_flags(chain, tmp_path):
    (tmp_path / "run.yaml").write_text(f"teacher: {chain / 'teacher'}\nstudent: cnn:4-8\nhidden: 16\ncompare: false\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--hidden", "8", "--output_dir", str(tmp_path / "run")]
    assert app(["train", *QUICK, *flags]) == 0
    assert Encoder.from_pretrained(tmp_path / "run").head[0].out_features == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "x", "--model", "folder"], "eval 'x' is unknown: choose knn or linear"),
        (["eval", "knn", "--model", "no/such"], "no/such: no such folder"),
        (["export", "--model", "no/such"], "no/such: no such folder"),
        (["train", "--studnet", "cnn:4"], "did you mean '--student'"),
        (["train", "--data", "no/such", "--student", "cnn:4", "--arm", "moco"], "no/such"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
