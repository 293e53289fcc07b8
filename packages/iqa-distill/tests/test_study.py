"""The comparison: what a cell does, and what cells share."""

import dataclasses
import json

import iqa_distill.study as module
import numpy as np
import pandas as pd
import pytest
from iqa_distill.compare import read_records
from iqa_distill.data import RESYNTH, DataOptions
from iqa_distill.gmsd import psnr
from iqa_distill.metrics import srcc
from iqa_distill.study import QUICK, psnr_of, splits_of, study, train_and_evaluate
from iqa_distill.train_teacher import TeacherOptions
from iqa_distill.trainer import IQAConfig
from papercore.lab.study import ReproduceOptions, Scale
from tiny_sample import rated, references, stand_in

TINY = {
    "data": {"data": "sample", "crops": 2, "crop_size": 32}, "max_steps": 2, "per_device_train_batch_size": 8, "save_steps": 2,
    "teacher": {"options": {"dim": 8, "depth": 1, "pieces": 4}, "config": {"max_steps": 1, "per_device_train_batch_size": 4}},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def sample():
    """The stand-in, and a teacher of its crops."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        teach = module.teach_by_gmsd
        patch.setattr(
            module,
            "teach_by_gmsd",
            lambda pool, data, *rest: teach(pool, dataclasses.replace(data, crop_size=32), *rest),
        )
        splits_of.cache_clear()
        yield
    splits_of.cache_clear()


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The whole quick scale, with fewer steps."""
    folder = tmp_path_factory.mktemp("study")
    small = dataclasses.replace(study, scales={"quick": Scale({"sample": TINY}, seeds=1)})
    small.reproduce(ReproduceOptions(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def rows(reproduced):
    lines = (reproduced / "results.jsonl").read_text().splitlines()
    return {row["arm"]: row for row in map(json.loads, lines)}


def test_every_arm_runs(rows, reproduced):
    assert list(rows) == list(study.arms)
    assert all(set(row["metrics"]) >= {metric.name for metric in study.metrics} for row in rows.values())
    assert len({row["metrics"]["plcc"] for row in rows.values()}) == len(study.arms)
    assert (reproduced / "plot.png").exists()


def test_scores_of_all_arms_are_of_the_same_images(rows, reproduced):
    records = read_records(reproduced / "predictions.jsonl")
    assert set(records) == {row["run"] for row in rows.values()}
    scores = [record["scores"].tolist() for record in records.values()]
    assert all(one == scores[0] for one in scores)
    for row in rows.values():
        record = records[row["run"]]
        assert row["metrics"]["srcc"] == pytest.approx(srcc(record["predictions"], record["scores"]), abs=0.02)


def test_the_test_loss_is_recorded_for_two_arms(rows, reproduced):
    records = read_records(reproduced / "predictions.jsonl")
    assert {arm for arm, row in rows.items() if len(records[row["run"]]["curve"])} == {"a: base", "b: + Reg"}


def test_students_share_first_weights_crops_and_teachers(rows, reproduced):
    logs = {}
    for arm, row in rows.items():
        for path in (reproduced / "work" / row["run"]).glob("checkpoint-2/trainer_state.json"):
            logs[arm] = json.loads(path.read_text())["log_history"][0]
    assert list(logs) == list(study.arms)[2:]
    base = logs["a: base"].get("score")
    assert all(log["score"] == pytest.approx(base, rel=1e-5) for log in logs.values())
    assert logs["e: MCD + Reg"]["mcd"] == pytest.approx(logs["d: + MCD"]["mcd"], rel=1e-5)
    assert sorted(p.name for p in reproduced.iterdir() if p.is_dir()) == ["bias-None-0", "teacher", "work"]


def test_a_cell_gives_the_same_figures_again(rows, reproduced):
    options = {**json.loads(json.dumps(TINY)), **study.arms["e: MCD + Reg"]}
    assert train_and_evaluate(options, 0, reproduced / "work" / "again") == rows["e: MCD + Reg"]["metrics"]


def test_psnr_is_against_each_images_own_original():
    some = rated(slice(0, 42, 9))
    expected = [
        psnr(some.pixels[i].movedim(0, 2).numpy(), references()[name]) for i, name in enumerate(some.references)
    ]
    np.testing.assert_allclose(psnr_of(some, DataOptions()), expected)


def test_psnr_of_resynthesised_images_was_written_beside_them(tmp_path):
    some = dataclasses.replace(rated(slice(3)), names=[str(tmp_path / f"{i}.png") for i in (2, 0, 1)])
    pd.DataFrame({"image": ["0.png", "1.png", "2.png"], "psnr": [33.0, 30.0, 27.0]}).to_csv(tmp_path / "ratings.csv")
    assert psnr_of(some, DataOptions(data=RESYNTH, resynth=str(tmp_path))).tolist() == [27, 33, 30]


def test_a_weak_teacher_ends_a_study_of_human_scores(reproduced):
    splits = splits_of(json.dumps(dataclasses.asdict(DataOptions(crop_size=32))))
    record = reproduced / "teacher" / "teacher.json"
    before = record.read_text()
    record.write_text(json.dumps({"held_out_srcc": 0.5, "ids": []}))
    try:
        module.teach(reproduced / "teacher", splits, DataOptions(), {})  # on the sample nothing is concluded
        with pytest.raises(ValueError, match=r"0\.50; below 0\.7 nothing can be concluded"):
            module.teach(reproduced / "teacher", splits, DataOptions(data=RESYNTH), {})
    finally:
        record.write_text(before)


@pytest.mark.parametrize("scale", study.scales)
def test_every_flag_of_a_cell_is_known(scale, tmp_path):
    known = {field.name for field in dataclasses.fields(IQAConfig)} | {"role", "watch", "data", "teacher"}
    for task in study.scales[scale].tasks:
        for arm in study.arms:
            options = study._options(study.scales[scale], task, arm)
            assert set(options) <= known
            DataOptions(**options["data"])
            TeacherOptions(**options["teacher"]["options"])
            assert set(options["teacher"]["config"]) <= known
    assert QUICK["data"]["data"] == "sample"
