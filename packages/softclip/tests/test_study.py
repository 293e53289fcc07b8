"""The comparison: what a cell does, what cells share, and how similarities are ranked."""

import dataclasses
import json
import shutil
import tarfile
from io import BytesIO

import numpy as np
import pytest
import softclip.study as module
import torch
from papercore.lab.study import ReproduceOptions, Scale
from PIL import Image
from scipy.stats import spearmanr
from softclip.data import DataOptions
from softclip.guidance import GuideOptions
from softclip.study import COMMON, spearman, study, train_and_evaluate
from softclip.trainer import SoftClipConfig

OURS, BASELINE = study.method, study.baseline
TINY = {**COMMON, "data": {"data": "sample"}, "clip": "tiny-vit", "max_steps": 3, "per_device_train_batch_size": 16}


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    monkeypatch.setattr("softclip.data.SAMPLE_TRAIN", 48)
    monkeypatch.setattr("softclip.data.SAMPLE_TEST", 20)
    for cached in (module.splits_of, module.guides_of):
        cached.cache_clear()
    yield
    for cached in (module.splits_of, module.guides_of):
        cached.cache_clear()


def cell(folder, arm, seed=0, **options):
    return train_and_evaluate({**TINY, **study.arms[arm], **options}, seed, folder / f"{arm} {seed} {len(options)}")


class TestCells:
    def test_run_once_and_are_reported(self, tmp_path, monkeypatch):
        small = dataclasses.replace(study, scales={"quick": Scale({"scenes": TINY}, seeds=1)})
        options = ReproduceOptions(output_dir=str(tmp_path), arms=[BASELINE, OURS])
        comparison = small.reproduce(options)
        clip, soft = (row["metrics"] for row in comparison.rows)
        assert comparison.verdict("scenes") == "ran"
        known = {metric.name for metric in study.metrics} - {"group_macro"}
        assert known <= soft.keys()
        assert known - clip.keys() == {"target_rank"}
        before = (tmp_path / "results.jsonl").read_bytes()
        monkeypatch.setattr(small, "run", None)
        small.reproduce(options)
        assert (tmp_path / "results.jsonl").read_bytes() == before
        assert (tmp_path / "plot.png").exists()

    def test_give_the_same_figures_again_and_others_for_another_seed(self, tmp_path):
        first = cell(tmp_path, BASELINE)
        shutil.rmtree(tmp_path)
        module.splits_of.cache_clear()
        assert cell(tmp_path, BASELINE) == first
        assert cell(tmp_path, BASELINE, seed=1) != first

    def test_targets_of_frozen_guides_are_ranked_the_same_whatever_is_learnt(self, tmp_path):
        first, other = (cell(tmp_path, "soft_re, frozen guides", seed) for seed in (0, 1))
        assert first["target_rank"] == pytest.approx(other["target_rank"])
        assert first["target_rank"] > 0.2
        assert first["prediction_rank"] != other["prediction_rank"]

    def test_targets_of_shuffled_guides_are_not_ranked(self, tmp_path):
        assert "target_rank" not in cell(tmp_path, "soft_re, frozen and shuffled")

    def test_images_that_guide_themselves_are_ranked_by_their_own_similarity(self, tmp_path):
        assert -1 <= cell(tmp_path, "soft_self")["target_rank"] <= 1

    def test_emoji_are_judged_by_their_coarser_groups_too(self, tmp_path, monkeypatch):
        (tmp_path / "softclip").mkdir()
        for part, count in (("train", 16), ("test", 6)):
            with tarfile.open(tmp_path / f"softclip/{part}-0000.tar", "w") as shard:
                for i in range(count):
                    picture = BytesIO()
                    Image.new("RGB", (32, 32), (10 * i, 200, 90)).save(picture, "PNG")
                    words = {
                        "tags": [f"tag {i % 3}"],
                        "root": str(i),
                        "subgroup": f"sub {i % 3}",
                        "group": f"all {i % 2}",
                    }
                    files = {
                        "png": picture.getvalue(),
                        "txt": f"emoji {i}".encode(),
                        "json": json.dumps(words).encode(),
                    }
                    for suffix, content in files.items():
                        member = tarfile.TarInfo(f"{i:03}.{suffix}")
                        member.size = len(content)
                        shard.addfile(member, BytesIO(content))
        monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
        metrics = cell(tmp_path, OURS, data={"data": "emoji"}, per_device_train_batch_size=8)
        assert 0 <= metrics["group_macro"] <= 100
        assert metrics["scale"] > 1
        assert not {"target_rank", "prediction_rank"} & metrics.keys()


class TestSpearman:
    def test_is_scipys_of_each_rows_negatives(self):
        rng = np.random.default_rng(0)
        scores, truth = rng.standard_normal((9, 9)), rng.integers(0, 3, (9, 9)) / 2
        rows = [
            spearmanr(np.delete(a, i), np.delete(b, i)).statistic
            for i, (a, b) in enumerate(zip(scores, truth, strict=True))
        ]
        assert spearman(torch.from_numpy(scores), torch.from_numpy(truth)) == pytest.approx(np.mean(rows))

    def test_ignores_the_diagonal(self):
        scores = torch.rand(6, 6)
        assert spearman(scores + 9 * torch.eye(6), scores) == pytest.approx(1)
        assert spearman(-scores, scores) == pytest.approx(-1)

    def test_of_equal_values_is_0(self):
        scores = torch.tensor([[0.0, 1, 2], [1, 0, 2], [5, 5, 0]])
        assert spearman(scores, scores) == pytest.approx(2 / 3)


@pytest.mark.parametrize("scale", study.scales)
def test_every_option_of_a_cell_is_known(scale, tmp_path):
    for task in study.scales[scale].tasks:
        for arm in study.arms:
            options = study._options(study.scales[scale], task, arm)
            DataOptions(**options.pop("data"))
            GuideOptions(**options.pop("guide", {}))
            assert options.pop("clip").startswith("tiny-")
            SoftClipConfig(output_dir=str(tmp_path), **options)
