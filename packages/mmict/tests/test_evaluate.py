import json
from dataclasses import dataclass
from types import SimpleNamespace

import mmict.evaluate
import numpy as np
import pytest
from mmict.data import DataOptions, Splits
from mmict.metrics import scores
from mmict.sample import render_shapes
from papercore.lab.cli import App
from papercore.lab.training import resumable

app = App("mmict", "test")
app.command("eval", "mmict.evaluate:evaluate", "test")


@dataclass
class Options:
    """Of training."""

    k: int = 2
    sampler: str = "visual"


def splits(options):
    questions = options.data == "sample-vqa"
    train, test = render_shapes(50, questions=questions), render_shapes(30, seed=1, questions=questions)
    return Splits(train, {"test": test.select(range(options.max_test or 30))} if options.test_share else {})


@pytest.fixture
def calls(monkeypatch):
    """Instead of a model: one that repeats its last demonstration, and is right without any. Returns what it was asked."""
    calls = SimpleNamespace(data=[], judge=[], model=SimpleNamespace(config=SimpleNamespace(demonstration="vt_text")))

    def judge(model, queries, pool, sampler, k, **options):
        calls.judge.append((sampler, k, options))
        samples, shown = queries.samples, [pool.samples.texts[:k]] * len(queries.samples)
        texts = [of[-1] if of else truth for of, truth in zip(shown, samples.texts, strict=True)]
        ones = np.ones(len(texts))
        return SimpleNamespace(predictions=texts, nll=ones * (3 - k), tokens=ones * 2, demonstrations=shown)

    monkeypatch.setattr(
        mmict.evaluate, "load_samples", lambda options: (calls.data.append(options), splits(options))[1]
    )
    monkeypatch.setattr(mmict.evaluate, "load_model", lambda folder: calls.model)
    monkeypatch.setattr(mmict.evaluate, "prepare", lambda model, samples: SimpleNamespace(samples=samples))
    monkeypatch.setattr(mmict.evaluate, "new_sampler", lambda pool, sampler, seed: (len(pool.samples), sampler, seed))
    monkeypatch.setattr(mmict.evaluate, "judge", judge)
    return calls


@pytest.fixture
def folder(tmp_path):
    """As `train` leaves it."""
    resumable(tmp_path, DataOptions(max_train=40, max_test=9), Options())
    return tmp_path


def run(capsys, *arguments):
    code = app(["eval", *map(str, arguments)])
    return code, capsys.readouterr()


def test_with_and_without_demonstrations_on_the_data_of_the_run(calls, folder, capsys):
    code, printed = run(capsys, "--model", folder, "--num_beams", 2)
    assert code == 0
    generate = {"batch_size": 32, "num_beams": 2, "max_new_tokens": 30, "min_length": 1}
    assert calls.judge == [((50, "visual", 0), k, generate) for k in (0, 2)]
    assert calls.data == [DataOptions(max_train=40, max_test=9)]
    train, test = render_shapes(50), render_shapes(9, seed=1)
    record = json.loads((folder / "eval-sample.json").read_text())
    found = record["scores"]["test"]
    assert found["0"]["exact_match"] == 1
    copied = [train.texts[1]] * 9
    expected = scores(
        copied,
        test.references,
        test.questions,
        nll=np.ones(9),
        tokens=np.full(9, 2),
        demonstrations=[train.texts[:2]] * 9,
    )
    assert found["2"] == pytest.approx(expected)
    assert record["tokenizer"] == "[a-z0-9']+ on lower-case text"
    rows = [row for row in record["predictions"] if row["k"] == 2]
    assert [row["id"] for row in rows] == test.ids
    assert rows[0]["prediction"] == copied[0]
    assert rows[0]["demonstrations"] == train.texts[:2]
    assert rows[0]["references"] == test.references[0]
    assert (rows[0]["nll"], rows[0]["tokens"], rows[0]["test"]) == (1, 2, "test")
    out = " ".join(printed.out.split())
    assert f"{folder} on sample: 9 test samples; visual demonstrations of 50" in out
    assert "of the texts are wrong and repeat a demonstration; compare with k = 0" in out
    assert "test, k = 0:" not in out


def test_what_is_asked_for_goes_before_the_record(calls, folder, tmp_path, capsys):
    flags = [
        "--data",
        "sample-vqa",
        "--max_test",
        30,
        "--k",
        3,
        0,
        "--sampler",
        "random",
        "--seed",
        4,
        "--batch_size",
        8,
    ]
    code, printed = run(capsys, "--model", folder, *flags, "--output", tmp_path / "new" / "e.json")
    assert code == 0
    assert [(sampler[1:], k, options["batch_size"]) for sampler, k, options in calls.judge] == [
        (("random", 4), 0, 8),
        (("random", 4), 3, 8),
    ]
    found = json.loads((tmp_path / "new" / "e.json").read_text())["scores"]["test"]["3"]
    assert {"vqa_accuracy", "yes_no", "other", "copy_rate_other"} <= found.keys()
    assert "30 test samples; random demonstrations" in " ".join(printed.out.split())


def test_a_model_without_demonstrations_is_judged_once(calls, folder, capsys):
    calls.model.config.demonstration = "none"
    assert run(capsys, "--model", folder)[0] == 0
    assert [k for _, k, _ in calls.judge] == [0]


def test_a_model_without_a_record_is_judged_on_the_sample(calls, tmp_path, capsys):
    assert run(capsys, "--model", tmp_path)[0] == 0
    assert calls.data == [DataOptions()]
    assert [(sampler[1], k) for sampler, k, _ in calls.judge] == [("random", 0), ("random", 2)]


def test_wrong_input_is_told_in_a_line(calls, folder, capsys):
    for flags, message in (
        (["--k", -1], "expected k of 0 or more"),
        (["--batch_size", 0], "batch_size of 1 or more"),
        (["--test_share", 0], "sample: there are no test samples to judge on: give --test or --test_share"),
        (["--min_length", 40], "min_length 40 is more than max_new_tokens 30"),
        (["--num_beams", 0], "num_beams must be at least 1, got 0"),
    ):
        code, printed = run(capsys, "--model", folder, *flags)
        assert code == 2
        (line,) = printed.err.splitlines()
        assert message in line
