"""The comparison: what a cell does, what cells share, and when nothing is concluded."""

import dataclasses
import json

import disco.study as module
import pytest
from disco.cli import app
from disco.data import DataOptions
from disco.study import SAMPLE, study, train_and_evaluate
from disco.trainer import DisCoConfig
from papercore.lab.study import ReproduceOptions, Scale

OURS, BASELINE = study.method, study.baseline
TINY = {
    **SAMPLE, "teacher": "cnn:8-16", "student": "cnn:4-8", "max_train": 200, "max_test": 60, "fixed_views": 3, "queue_size": 128,
    "max_steps": 3, "per_device_train_batch_size": 32, "learning_rate": 0.12, "better_by": -100,
    "pretraining": {"max_steps": 2, "per_device_train_batch_size": 32, "queue_size": 128},
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """The study, quick enough for a test, also for the command line."""
    small = dataclasses.replace(study, scales={"quick": Scale({"sample": TINY}, seeds=1)})
    monkeypatch.setattr(module, "study", small)
    return small


def cell(folder, name, arm, seed=0, **options):
    return train_and_evaluate({**TINY, **study.arms[arm], **options}, seed, folder / "work" / name)


def test_two_arms_run_and_a_second_call_runs_nothing(tiny, tmp_path, monkeypatch):
    options = ReproduceOptions(output_dir=str(tmp_path), arms=[BASELINE, OURS])
    comparison = tiny.reproduce(options)
    assert [row["arm"] for row in comparison.rows] == [BASELINE, OURS]
    assert all(set(row["metrics"]) >= {metric.name for metric in study.metrics} for row in comparison.rows)
    assert comparison.verdict("sample") == "ran"
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(tiny, "run", None)
    tiny.reproduce(options)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert (tmp_path / "plot.png").exists()


def test_cells_share_one_teacher_and_its_embeddings(tmp_path):
    first = cell(tmp_path, "e", OURS)
    (place,) = (tmp_path / "teachers").iterdir()
    files = [place / name for name in ("model.safetensors", "teacher.json", "views.safetensors")]
    before = [file.stat().st_mtime_ns for file in files]
    other = cell(tmp_path, "d", "D: DisCo, hidden = features", seed=1)
    teacher = cell(tmp_path, "t", "teacher")
    assert list((tmp_path / "teachers").iterdir()) == [place]
    assert [file.stat().st_mtime_ns for file in files] == before
    assert first != other
    assert teacher == json.loads((place / "teacher.json").read_text())["trained"]


def test_a_cell_gives_the_same_figures_again_and_another_arm_others(tmp_path):
    first, again, alone = (cell(tmp_path, name, arm) for name, arm in (("a", OURS), ("b", OURS), ("c", BASELINE)))
    assert first == again
    assert first != alone


def test_an_untrained_student_needs_no_teacher(tmp_path):
    random = cell(tmp_path, "random", "A: random student")
    assert not (tmp_path / "teachers").exists()
    assert random == cell(tmp_path, "again", "A: random student")
    assert random != cell(tmp_path, "other", "A: random student", seed=1)


def test_validation_images_are_not_the_test_images(tmp_path):
    options = {"validation": 0.3, "max_test": 50}
    test, validation = (cell(tmp_path, s, "A: random student", split=s, **options) for s in ("test", "validation"))
    assert test != validation


def test_a_teacher_that_is_hardly_better_than_random_is_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TINY, "better_by", 101)
    assert app(["reproduce", "--scale", "quick", "--output_dir", str(tmp_path)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("disco: ")]
    assert len(error) == 1
    assert "points above that of random weights, and 101 are asked for before students are judged" in error[0]
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("scale", study.scales)
def test_every_flag_of_a_cell_is_known(scale):
    """A name that nothing reads would end in the engine's configuration, which refuses it."""
    known = {f.name for kind in (DataOptions, DisCoConfig) for f in dataclasses.fields(kind)}
    own = {"role", "student", "teacher", "pretraining", "learning_rates", "hidden", "split", "first_seed", "better_by"}
    for task in study.scales[scale].tasks:
        for arm in study.arms:
            options = study._options(study.scales[scale], task, arm)
            assert set(options) <= known | own
            assert set(options["pretraining"]) <= known


@pytest.mark.parametrize("arm", study.arms)
def test_every_arm_is_one_of_the_trainers(arm, tmp_path):
    options = study.arms[arm]
    if "role" not in options:
        DisCoConfig(output_dir=str(tmp_path), arm=options["arm"])
