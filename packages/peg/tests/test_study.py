"""The paper's comparison: what a run does, and what its data say."""

import json

import numpy as np
import pytest
import torch
from peg.models import new_model
from peg.study import BagOfPieces, Margin, bootstrap, compare, splits, study, untrained
from peg.trainer import PegConfig

TINY = {
    "task": "sample", "encoder": "static", "width": 16, "num_train_epochs": 1, "learning_rate": 1e-2,
    "per_device_train_batch_size": 512, "hard_negatives": 2, "weight_decay": 0.0, "warmup_steps": 0,
    "micro_batch_tokens": None, "disable_tqdm": True,
}  # fmt: skip


class TestCompare:
    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("run")
        return compare({**TINY, "hardness_end": 5.0, "temperature": 0.05}, 0, folder), folder

    def test_metrics_of_both_splits(self, trained):
        metrics, folder = trained
        assert {metric.name for metric in study.metrics} == set(metrics)
        values = json.loads((folder / "per_query.json").read_text())
        assert set(values) == set(splits("sample")["test"].qrels)
        assert np.mean(list(values.values())) == pytest.approx(metrics["nDCG@10"])

    def test_it_learns(self, trained, tmp_path):
        before = compare({**TINY, "trained": False}, 0, tmp_path)
        assert trained[0]["nDCG@10"] > before["nDCG@10"]

    def test_a_seed_gives_the_same_figures_and_weights_others(self, trained, tmp_path):
        options = {**TINY, "hardness_end": 5.0, "temperature": 0.05}
        assert compare(options, 0, tmp_path) == trained[0]
        assert compare({**options, "margin": 3.0}, 0, tmp_path) != trained[0]

    def test_bm25_needs_no_training(self, tmp_path):
        assert 0.3 < compare({"task": "sample", "bm25": True}, 0, tmp_path)["nDCG@10"] < 0.5

    def test_real_data_are_asked_for(self, monkeypatch):
        monkeypatch.delenv("PAPERCORE_DATA", raising=False)
        with pytest.raises(FileNotFoundError, match="medquad: set PAPERCORE_DATA"):
            splits.__wrapped__("medquad")


def test_a_margin_treats_all_negatives_alike():
    sims = torch.tensor([[0.1, 0.9]])
    assert Margin(2.0).log_weight(sims, sims[:, :1], Margin(2.0).lam(3, 10)).tolist() == [[2.0, 2.0]]


class TestBagOfPieces:
    def test_cut_texts_have_the_models_own_embeddings(self):
        model = new_model("static:8", ["red blue green"])
        bag = BagOfPieces(model, {})
        ours = bag.embed(["red blue green red", "blue"], 2)
        torch.testing.assert_close(ours, model.encode(["red blue", "blue"], convert_to_tensor=True))
        assert set(bag.known) == {("red blue green red", 2), ("blue", 2)}

    def test_empty_texts(self):
        bag = BagOfPieces(new_model("static:8", ["red blue green"]), {})
        assert bag.embed(["", "blue", ""], 4)[[0, 2]].eq(0).all()


class TestArms:
    def test_options_are_those_of_the_configuration(self):
        own = {"task", "encoder", "width", "bm25", "trained"}
        for scale in study.scales.values():
            for task in scale.tasks.values():
                for arm in study.arms.values():
                    assert {**scale.options, **task, **arm}.keys() <= own | PegConfig.__dataclass_fields__.keys()

    def test_the_control_is_as_cold_as_the_ramp_ends(self):
        method, control = study.arms[study.method], study.arms["H: C as cold as E ends"]
        assert 1 / control["temperature"] == pytest.approx(1 / method["temperature"] + method["hardness_end"])
        assert control["hardness_end"] == 0

    def test_the_same_start_for_all_arms_of_a_seed(self):
        torch.manual_seed(0)
        first = untrained("sample", "static", 8)
        torch.manual_seed(0)
        second = untrained("sample", "static", 8)
        assert torch.equal(first[0].embedding.weight, second[0].embedding.weight)


class TestBootstrap:
    def write(self, folder, arm, seed, values):
        path = folder / "work" / f"t-{arm}-{seed}-0a1b2c3d" / "per_query.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({str(i): v for i, v in enumerate(values)}))

    def test_mean_and_interval(self, tmp_path):
        rng = np.random.default_rng(0)
        base, gain = rng.uniform(size=400), rng.normal(0.02, 0.1, size=400)
        for seed in (0, 1):
            self.write(tmp_path, "E", seed, base + gain + 0.01 * (-1) ** seed)
            self.write(tmp_path, "C", seed, base)
        found = bootstrap(tmp_path, "t", "E", "C")
        assert found.mean == pytest.approx(gain.mean())
        half = 1.96 * gain.std() / 20
        assert (found.low, found.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.15 * half)
        assert found.n == 400

    def test_missing_runs_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no values for each query of t, E"):
            bootstrap(tmp_path, "t", "E", "C")
