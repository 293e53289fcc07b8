"""The comparison: what a cell does, and what cells share."""

import dataclasses
import gzip
import json
from functools import partial

import mmict.study as module
import pytest
import torch
from mmict import MMICTModel, data
from mmict.small import SmallOptions, cold_model
from mmict.study import coco_captions, corpora_of, splits_of, study
from papercore.lab.study import ReproduceOptions, Scale
from safetensors.torch import load_file

STAGES = {
    "steps": [1, 1, 3], "image_size": 16, "patch": 8, "vision_width": 16, "width": 16, "queries": 2, "layers": 2,
    "vocabulary": 100,
}  # fmt: skip


ARMS = ("FT", "FT + text", "vanilla ICT", "MMICT", "MMICT, random", "MMICT, cold")  # all there is to see


@pytest.fixture(scope="module", autouse=True)
def few():
    """A sample that is drawn at once, and short texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SAMPLE", 60)
        patch.setattr(module, "judge", partial(module.judge, max_new_tokens=3))
        for cached in (splits_of, corpora_of):
            cached.cache_clear()
        yield
    for cached in (splits_of, corpora_of):
        cached.cache_clear()


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """The quick scale, with fewer steps and samples."""
    folder = tmp_path_factory.mktemp("study")
    quick = study.scales["quick"]
    task = {**quick.tasks["sample"], "data": {"data": "sample", "max_train": 40, "max_test": 6}, "texts": 0}
    options = {**quick.options, "max_steps": 2, "per_device_train_batch_size": 8, "stages": STAGES}
    arms = {arm: study.arms[arm] for arm in ARMS}
    small = dataclasses.replace(study, arms=arms, scales={"quick": Scale({"sample": task}, 1, options)})
    small.reproduce(ReproduceOptions(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def rows(reproduced):
    lines = (reproduced / "results.jsonl").read_text().splitlines()
    return {row["arm"]: row for row in map(json.loads, lines)}


def test_every_arm_runs_and_none_is_another(rows, reproduced):
    assert tuple(rows) == ARMS
    assert len({row["metrics"]["nll"] for row in rows.values()}) == len(ARMS)
    assert (reproduced / "report.md").read_text()


def test_metrics_are_named_as_the_study_names_them(rows):
    measured = set().union(*(row["metrics"] for row in rows.values()))
    captions = {"nll", "token_f1", "exact_match", "cider_d", "copy_rate", "nll_k0"}
    assert captions <= measured
    assert {metric.name for metric in study.metrics} >= captions
    assert "nll_k0" not in rows["FT"]["metrics"]  # it is nll
    assert rows["MMICT"]["metrics"]["nll_k0"] != rows["MMICT"]["metrics"]["nll"]


def test_arms_share_the_frozen_parts_and_begin_with_the_same_warm_hub(rows, reproduced):
    (parts,) = reproduced.glob("parts-*")
    found = {arm: MMICTModel.from_pretrained(reproduced / "work" / row["run"]) for arm, row in rows.items()}
    assert len({model.lm.name_or_path.split("/parts-")[1] for model in found.values()}) == 1
    warm = load_file(parts / "warm" / "model.safetensors")["hub.query_tokens"]
    cold = cold_model(parts, SmallOptions(**STAGES)).hub.query_tokens
    for arm, model in found.items():  # a step of Adam moves them by the learning rate
        near, far = (warm, cold) if "cold" not in arm else (cold, warm)
        tokens = model.hub.query_tokens
        assert 0 < (tokens - near).abs().max() < 5e-3
        assert not torch.equal(near, far)
    assert found["MMICT, cold"].config == found["MMICT"].config


def test_predictions_are_kept(rows, reproduced):
    written = json.loads((reproduced / "work" / rows["MMICT"]["run"] / "predictions.json").read_text())
    assert set(written) == {"test, k = 2", "test, k = 0"}
    assert all(len(texts) == 6 for texts in written.values())


def test_arms_differ_in_what_the_claim_is_about():
    arms = study.arms
    assert {arms[name]["arm"] for name in ("FT", "FT + text", "vanilla ICT", "MMICT")} == {
        "ft",
        "ft+text",
        "ict",
        "mmict",
    }
    assert study.baseline in arms
    assert study.method in arms
    assert all({"arm", "sampler"} <= set(options) for options in arms.values())


def test_captions_for_the_language_model(tmp_path, monkeypatch):
    assert coco_captions(0) == []
    (tmp_path / "mmict").mkdir()
    with gzip.open(tmp_path / "mmict" / "coco_val2017_captions.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"captions": [f"A Cat, {i}.", "no"]}) + "\n" for i in range(3))
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    assert coco_captions(2) == ["a cat, 0", "a cat, 1"]
