"""The comparison: its arms, what they share, and what is kept of each."""

import dataclasses
import json

import dsan.study as module
import pytest
from dsan import sample
from dsan.cli import app
from dsan.compare import read_records
from dsan.data import DataOptions
from dsan.study import IIIT5K, study, train_and_evaluate
from dsan.train import ModelOptions, new_model
from dsan.trainer import DSANConfig
from papercore.lab.study import Scale

CELL = {
    "data": {"max_train": 24, "max_test": 30, "validation": 0}, "model": {"widths": [4, 4, 8, 8], "hidden": 4},
    "max_steps": 3, "per_device_train_batch_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A sample that is drawn at once."""
    monkeypatch.setattr(sample, "TRAIN", 24)
    monkeypatch.setattr(sample, "TEST", 30)
    module.splits_of.cache_clear()
    yield
    module.splits_of.cache_clear()


@pytest.fixture
def tiny(monkeypatch):
    """The study, quick enough for a test."""
    small = dataclasses.replace(study, scales={"quick": Scale({"sample": CELL}, seeds=1)})
    monkeypatch.setattr(module, "study", small)
    return small


def test_all_arms_run_and_a_second_call_runs_nothing(tiny, tmp_path, monkeypatch):
    command = ["reproduce", "--scale", "quick", "--output_dir", str(tmp_path)]
    assert app(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(study.arms)
    runs = list(read_records(tmp_path / "correct.jsonl").values())
    for row, right in zip(rows, runs, strict=True):
        second = row["options"]["arm"]["enhancement"] is not None
        assert right.keys() == ({"ctx", "enh", "fuse", "digit"} if second else {"ctx", "digit"})
        assert all(len(bits) == 30 for bits in right.values())
        assert row["metrics"]["accuracy"] == pytest.approx(100 * right["ctx"].mean())
        assert ("enh" in row["metrics"]) == second
        assert (right["digit"] == runs[0]["digit"]).all()
    before = {name: (tmp_path / name).read_bytes() for name in ("results.jsonl", "correct.jsonl")}
    monkeypatch.setattr(tiny, "run", None)
    assert app(command) == 0
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert (tmp_path / "plot.png").exists()
    assert app(["compare", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "mcnemar.json").read_text())) == 6  # arms and groups of words


def test_a_cell_gives_the_same_figures_again(tmp_path):
    arm = study.arms[study.method]
    first, again = (train_and_evaluate({**CELL, **arm}, 0, tmp_path / "work" / name) for name in "ab")
    assert first == again


@pytest.mark.parametrize("scale", study.scales)
@pytest.mark.parametrize("arm", study.arms)
def test_every_flag_of_a_cell_is_known(scale, arm):
    for task in study.scales[scale].tasks:
        options = study._options(study.scales[scale], task, arm)
        data, model = options.pop("data"), {**options.pop("model"), **options.pop("arm")}
        assert data.keys() <= {f.name for f in dataclasses.fields(DataOptions)} | {"supplied"}
        assert options.keys() <= {f.name for f in dataclasses.fields(DSANConfig)}
        network = new_model(ModelOptions(**model), seed=0)
        assert (network.attention is None) == (arm[0] in "AC")
        assert (network.enhancement is None) == (arm[0] in "AB")


def test_supplied_words_and_fonts_are_those_beside_the_crops(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    monkeypatch.setattr(module, "load_words", lambda options, *rest: seen.append(options))
    module.splits_of(json.dumps(IIIT5K["data"]))
    assert (seen[0].data, seen[0].words) == (["iiit5k"], str(tmp_path / "dsan" / "words_mj88k.txt.gz"))
    assert seen[0].fonts == str(tmp_path / "dsan" / "fonts")
