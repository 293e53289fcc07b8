import json
import signal
from pathlib import Path

import pytest
from sinkd.cli import app
from transformers import AutoModelForSequenceClassification, AutoTokenizer

QUICK = ["--num_train_epochs", "1", "--max_train", "64", "--max_test", "32"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """60 texts of two classes, with an answer that a word tells."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    words = ["good", "bad"]
    path.write_text("text,label\n" + "".join(f"a {words[i % 2]} film number {i},{words[i % 2]}\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the first command writes."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert app(["train", *QUICK, "--output_dir", str(folder)]) == 0
    return folder


def pretrained(classifier, folder):
    """A body without a classifier, as the Hub has it."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier).bert
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    return folder


def test_the_sample_compares_teacher_alone_kd_and_sinkd(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "student alone", "KD alone", "SinKD"]
    assert all(0 <= m["accuracy"] <= 1 for m in metrics.values())
    assert (trained / "training.png").stat().st_size > 10_000
    AutoModelForSequenceClassification.from_pretrained(trained)


def test_students_start_equal_and_end_differently(trained):
    def record(folder):
        return json.loads((folder / "options.json").read_text())

    assert record(trained)["beta"] == 0.03
    assert record(trained / "KD-alone")["beta"] == 0.0
    metrics = json.loads((trained / "metrics.json").read_text())
    assert len({m["teacher_l1"] for name, m in metrics.items() if name != "teacher"}) == 3


def test_eval_reads_it(trained, capsys):
    flags = ["eval", "--model", str(trained), "--max_test", "32"]
    assert app([*flags, "--teacher", str(trained / "teacher")]) == 0
    again = json.loads((trained / "eval-sample" / "metrics.json").read_text())
    before = json.loads((trained / "metrics.json").read_text())["SinKD"]
    for name in ("accuracy", "agreement", "teacher_l1"):
        assert again[name] == pytest.approx(before[name], abs=1e-6)


def test_the_same_command_goes_on_and_another_one_is_refused(trained, capsys):
    assert app(["train", *QUICK, "--output_dir", str(trained)]) == 0
    assert app(["train", *QUICK, "--beta", "3", "--output_dir", str(trained)]) == 2
    assert "beta 0.03, now 3.0" in capsys.readouterr().err


def test_a_file_a_teacher_and_its_first_layers(table, trained, tmp_path):
    """Fine-tune on a table of one's own, then distil from that with a cache of its logits."""
    teacher, cache, student = (str(tmp_path / name) for name in ("teacher", "cache", "student"))
    base = str(trained / "teacher")
    common = ["--data", str(table), "--num_train_epochs", "1", "--max_length", "32"]
    assert app(["train", *common, "--student", base, "--output_dir", teacher]) == 2  # 8 labels there, 2 here
    body = pretrained(base, tmp_path / "body")
    assert app(["train", *common, "--student", str(body), "--output_dir", teacher]) == 0
    assert (
        app(["cache-teacher", "--teacher", teacher, "--data", str(table), "--max_length", "32", "--cache", cache]) == 0
    )
    flags = [*common, "--student", str(body), "--student_layers", "1"]
    assert app(["train", *flags, "--teacher_cache", cache, "--output_dir", student]) == 0
    live = str(tmp_path / "live")
    assert app(["train", *flags, "--teacher", teacher, "--output_dir", live]) == 0
    results = [json.loads(Path(folder, "metrics.json").read_text())["SinKD"]["accuracy"] for folder in (student, live)]
    assert results[0] == results[1]
    assert AutoModelForSequenceClassification.from_pretrained(student).config.num_hidden_layers == 1


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_language_models_by_prompts(kind, tmp_path):
    folder = tmp_path / "run"
    flags = ["--architecture", kind, "--compare", "False", "--max_length", "64", "--output_dir", str(folder)]
    assert app(["train", *QUICK, *flags]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["SinKD"]["accuracy"] <= 1
    assert app(["eval", "--model", str(folder), "--max_test", "32"]) == 0
    again = json.loads((folder / "eval-sample" / "metrics.json").read_text())
    assert again["accuracy"] == metrics["SinKD"]["accuracy"]


def test_language_modelling(tmp_path):
    folder = tmp_path / "run"
    flags = ["--objective", "language", "--compare", "False", "--topk", "20", "--output_dir", str(folder)]
    assert app(["train", *QUICK, *flags]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["SinKD"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{table}"], "give --teacher"),
        (["--objective", "x"], "objective must be classify or language"),
        (["--objective", "language", "--architecture", "encoder"], "needs a decoder"),
        (["--alpha", "2"], "alpha must be in [0, 1]"),
        (["--eps", "-1"], "eps must be positive"),
        (["--data", "{table}", "--teacher", "no/such/model"], "no/such/model"),
    ],
)
def test_wrong_input_is_one_line(flags, message, table, tmp_path, capsys):
    flags = [flag.format(table=table) for flag in flags]
    assert app(["train", *flags, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_a_teacher_that_was_never_fine_tuned_is_refused(table, trained, tmp_path, capsys):
    body = pretrained(trained / "teacher", tmp_path / "body")
    assert app(["train", "--data", str(table), "--teacher", str(body), "--output_dir", str(tmp_path / "run")]) == 2
    assert "not fine-tuned for reviews yet" in capsys.readouterr().err


def test_killed_in_training_the_same_command_ends_as_if_it_had_not_been(launch, tmp_path):
    flags = ["train", "--max_train", "64", "--num_train_epochs", "6", "--save_strategy", "steps", "--save_steps", "1"]
    killed, whole = ([*flags, "--output_dir", tmp_path / name] for name in ("killed", "whole"))
    code, _ = launch("sinkd.cli", killed).wait_for(tmp_path / "killed", "checkpoint-*").end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    for words in (killed, whole):
        code, error = launch("sinkd.cli", words).end()
        assert code == 0, error
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
