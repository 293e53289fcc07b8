import dataclasses
import json
import math

import pytest
from eclstm.model import ECLSTMRegressor
from eclstm.sources import DataOptions
from eclstm.study import study, train_and_evaluate
from eclstm.trainer import ECLSTMConfig
from papercore.lab.study import ReproduceOptions, Scale

FEATURES = [f"sensor_{i}" for i in range(16)]


@pytest.mark.parametrize("arm", study.arms)
def test_every_arm_is_a_network(arm):
    fields = {"network", "layers"}
    assert study.arms[arm].keys() <= fields
    model = ECLSTMRegressor(FEATURES, **study.arms[arm])
    assert sum(p.numel() for p in model.parameters()) > 10_000


def test_arms_differ_in_what_their_names_say():
    models = {arm: ECLSTMRegressor(FEATURES, **options) for arm, options in study.arms.items()}
    size = {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()}
    assert size["ECLSTM"] == 48421
    assert abs(size["flat LSTM, as small as ECLSTM"] - size["ECLSTM"]) < 0.1 * size["ECLSTM"]
    assert size["flat LSTM"] > 7 * size["ECLSTM"]
    cells = [layer.cell for layer in models["ECLSTM, no cell convolution"].network.layers]
    assert all(cell.cell_kernel is None for cell in cells)
    assert [layer.cell.filters for layer in models["ECLSTM, one convolution a gate"].network.layers] == [[10], [20]]
    assert [layer.output_size for layer in models["ECLSTM, one convolution a gate"].network.layers] == [
        layer.output_size for layer in models["ECLSTM"].network.layers
    ]


def test_baseline_and_method_are_arms_and_the_papers_figures_belong_to_arms():
    assert study.baseline in study.arms
    assert study.method in study.arms
    assert study.paper.keys() <= study.arms.keys()


@pytest.mark.parametrize("scale", study.scales)
def test_every_scale_sets_options_that_exist(scale, tmp_path):
    known = {f.name for c in (ECLSTMConfig, DataOptions) for f in dataclasses.fields(c)}
    assert study.scales[scale].options.keys() <= known
    ECLSTMConfig(output_dir=str(tmp_path), **study.scales[scale].options)


def test_the_paper_scale_is_the_authors_recipe(tmp_path):
    options = ECLSTMConfig(output_dir=str(tmp_path), **study.scales["paper"].options)
    assert options.norm_momentum == 0.01
    assert options.per_device_train_batch_size == 15
    assert options.num_train_epochs == 30


def test_a_cell_trains_and_judges(tiny_table, tmp_path):
    network = {"sequence_length": 2, "window_size": 6, "layers": [{"filters": [3]}]}
    options = {"data": str(tiny_table), "cap": 25, "max_steps": 2, **network}
    metrics = train_and_evaluate(options, 1, tmp_path / "cell")
    assert metrics.keys() >= {metric.name for metric in study.metrics}
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["units_beyond_cap"] < metrics["units"] == 2
    recorded = json.loads((tmp_path / "cell" / "options.json").read_text())
    assert recorded["cap"] == 25
    assert recorded["seed"] == 1


@pytest.mark.parametrize("scale", ["small", "full", "paper"])
def test_real_scales_read_the_sets_their_tasks_name(scale):
    for task, options in study.scales[scale].tasks.items():
        data = {**study.scales[scale].options, **options}
        assert (data["data"], data["subset"]) == ("cmapss", task)


def test_the_small_scale_thins_the_large_set_only():
    scale = study.scales["small"]
    assert {task: options.get("every", 1) for task, options in scale.tasks.items()} == {"FD001": 1, "FD002": 4}


class TestReproduce:
    arms = ("flat LSTM", "ECLSTM")

    def reproduce(self, table, folder, **more):
        options = {"data": str(table), "sequence_length": 2, "window_size": 9, "max_steps": 2, **more}
        short = dataclasses.replace(study, scales={"quick": Scale({"tiny": {}}, seeds=2, options=options)})
        return short.reproduce(ReproduceOptions("quick", output_dir=str(folder), arms=list(self.arms)))

    def test_compares_two_arms_end_to_end(self, tiny_table, tmp_path):
        comparison = self.reproduce(tiny_table, tmp_path)
        assert len(comparison.rows) == 4
        assert comparison.verdict("tiny") == "ran"
        assert {"report.md", "report.json", "plot.png", "results.jsonl"} <= {p.name for p in tmp_path.iterdir()}
        assert self.reproduce(tiny_table, tmp_path).rows == comparison.rows

    def test_other_options_are_trained_anew_in_the_same_folder(self, tiny_table, tmp_path):
        before = self.reproduce(tiny_table, tmp_path)
        after = self.reproduce(tiny_table, tmp_path, max_steps=3)
        assert {row["options"]["max_steps"] for row in after.rows} == {3}
        assert len(after.rows) == len(before.rows)
