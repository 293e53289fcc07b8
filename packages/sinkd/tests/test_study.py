from dataclasses import fields

import pytest
from papercore.lab.study import ReproduceOptions
from sinkd.loss import SinKDLoss
from sinkd.models import ModelOptions
from sinkd.readers import DataOptions, load
from sinkd.study import first_classes, study, train_and_evaluate
from sinkd.train import TrainOptions
from sinkd.trainer import SinKDConfig

QUICK = {"data": "sample", "max_train": 64, "max_test": 32, "num_train_epochs": 1}


def cell(folder, name, seed=0, **options):
    return train_and_evaluate({**QUICK, **options}, seed, folder / "work" / name)


def test_all_cells_of_a_task_share_one_teacher(tmp_path):
    cell(tmp_path, "kl", beta=0.0)
    (teacher,) = (tmp_path / "teachers").iterdir()
    before = (teacher / "teacher" / "model.safetensors").stat().st_mtime_ns
    ours = cell(
        tmp_path, "sinkd", seed=1, learning_rate=1e-3, per_device_train_batch_size=16, teacher_learning_rate=2e-3
    )
    itself = cell(tmp_path, "teacher", role="teacher")
    assert list((tmp_path / "teachers").iterdir()) == [teacher]
    assert (teacher / "teacher" / "model.safetensors").stat().st_mtime_ns == before
    assert set(ours) == {metric.name for metric in study.metrics}
    assert itself["agreement"] == 1.0
    assert itself["teacher_l1"] == 0.0
    assert ours["teacher_l1"] > 0


def test_an_arm_is_what_decides(tmp_path):
    kl, again, sinkd = (cell(tmp_path, name, beta=beta) for name, beta in (("a", 0.0), ("b", 0.0), ("c", 3.0)))
    assert kl == again
    assert kl["teacher_l1"] != sinkd["teacher_l1"]


def test_language_cells_report_log_likelihood_and_likeness_of_tokens(tmp_path):
    options = {"objective": "language", "topk": 20, "teacher": "scratch:32x1", "student": "scratch:16x1"}
    result = cell(tmp_path, "lm", **options)
    itself = cell(tmp_path, "teacher", role="teacher", **options)
    assert result["score"] < 0
    assert set(result) == {metric.name for metric in study.metrics}
    assert 0 < result["agreement"] < 1
    assert 0 < result["teacher_l1"] < 2
    assert itself["agreement"] == 1.0
    assert itself["teacher_l1"] == 0.0


def test_the_first_classes_are_a_task_of_their_own():
    whole = load(DataOptions(), 0)
    few = first_classes(whole, 3)
    assert few.train.task.labels == whole.train.task.labels[:3]
    for ours, theirs in ((few.train, whole.train), (few.validation, whole.validation), (few.test, whole.test)):
        assert ours.labels == [y for y in theirs.labels if y < 3]
        assert ours.first == [text for text, y in zip(theirs.first, theirs.labels, strict=True) if y < 3]


def test_validation_rows_are_not_test_rows(tmp_path):
    assert cell(tmp_path, "a", role="teacher") != cell(tmp_path, "b", role="teacher", split="validation")


@pytest.mark.parametrize("name", study.arms)
def test_every_arm_is_a_loss(name):
    options = {k: v for k, v in study.arms[name].items() if k != "role"}
    weights = SinKDLoss(**options)
    assert bool(weights.beta) == (options.get("beta") != 0.0)


def test_a_task_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no task 'x'"):
        study.reproduce(ReproduceOptions(output_dir=str(tmp_path), tasks=["x"]))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_flag_of_a_task_is_known(scale):
    """A name that nothing reads would end in the engine's configuration, which refuses it."""
    known = {f.name for kind in (DataOptions, ModelOptions, TrainOptions, SinKDConfig) for f in fields(kind)}
    for task in study.scales[scale].tasks:
        for arm in study.arms:
            assert set(study._options(study.scales[scale], task, arm)) <= known | {"role"}
