import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eclstm.cli import app
from eclstm.data import RunToFailure, Segments
from eclstm.evaluate import all_windows, evaluate, load_model, predict_segments, rmse, rul_score
from eclstm.model import ECLSTMRegressor
from eclstm.sources import DataOptions, load
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

EXAMPLE = json.loads((Path(__file__).parent / "golden" / "labels_scores_windows.json").read_text())["score_example"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ECLSTMRegressor(["heat", "flow"], 3, 6, layers=[{"filters": [4]}], dense=[8], cap=20)


@pytest.fixture
def fleet(tiny_frame):
    """Units that stop at 30, 6 and 8 cycles; 5, 40 and 20 are left."""
    frame = tiny_frame[tiny_frame["unit"] <= 3]
    kept = frame["cycle"] <= frame["unit"].map({1: 30, 2: 6, 3: 8})
    table = RunToFailure(frame[kept])
    table.remaining = np.array([5.0, 40.0, 20.0])
    return table


class TestScore:
    def test_equals_the_authors(self):
        assert rul_score(EXAMPLE["y_true"], EXAMPLE["y_pred"]) == pytest.approx(16.25916688785653, rel=1e-14)
        assert EXAMPLE["score"] == 16.25916688785653

    def test_late_costs_more_than_early(self):
        assert rul_score([50], [60]) == pytest.approx(np.e - 1)
        assert rul_score([50], [37]) == pytest.approx(np.e - 1)

    @given(st.lists(st.tuples(st.floats(0, 200), st.floats(-50, 300)), min_size=1, max_size=20))
    @settings(max_examples=50, deadline=None)
    def test_is_a_sum_over_units_that_only_perfection_makes_zero(self, pairs):
        true, predicted = map(list, zip(*pairs, strict=True))
        score = rul_score(true, predicted)
        assert score == pytest.approx(sum(rul_score([t], [p]) for t, p in pairs))
        assert score >= 0
        assert rul_score(true, true) == 0

    def test_large_errors_are_computed_in_double_precision(self):
        """Trap: exp(1000 / 10) overflows in float32."""
        assert rul_score(np.zeros(1, np.float32), np.full(1, 1000, np.float32)) == pytest.approx(np.expm1(100.0))

    def test_errors_beyond_double_precision_are_clipped_with_a_warning(self):
        with pytest.warns(UserWarning, match=r"an error of 1e\+04 cycles is clipped"):
            score = rul_score([0, 10], [1e4, 10])
        assert score == pytest.approx(np.expm1(500.0))

    def test_small_errors_keep_their_digits(self):
        assert rul_score([0], [1e-9]) == pytest.approx(1e-10, rel=1e-6)


class TestRmse:
    def test_is_the_root_of_the_mean_square(self):
        assert rmse([1, 2, 3], [1, 4, 7]) == pytest.approx(np.sqrt(20 / 3))

    def test_is_computed_in_double_precision(self):
        true = np.full(1000, 16777216, np.float32)
        assert rmse(true, true.astype(np.float64) + 1) == 1


class TestEvaluate:
    def test_judges_the_last_row_of_each_unit_against_capped_and_raw_labels(self, model, fleet):
        result = evaluate(model, fleet)
        assert result.units == [1, 2, 3]
        np.testing.assert_array_equal(result.raw, [5, 40, 20])
        np.testing.assert_array_equal(result.capped, [5, 20, 20])
        metrics = result.metrics
        assert metrics["units"] == 3
        assert metrics["units_beyond_cap"] == 1
        assert metrics["rmse"] == rmse([5, 20, 20], result.predicted)
        assert metrics["rmse_raw"] == rmse([5, 40, 20], result.predicted)
        assert metrics["score"] == rul_score([5, 20, 20], result.predicted)
        assert metrics["score_raw"] == rul_score([5, 40, 20], result.predicted)
        assert metrics["rmse"] != metrics["rmse_raw"]

    def test_predicts_from_the_last_rows_and_pads_short_units(self, model, fleet):
        predicted = evaluate(model, fleet).predicted
        rows = [
            fleet.values[22:30, :2],
            np.r_[fleet.values[[30, 30]], fleet.values[30:36]][:, :2],
            fleet.values[36:44, :2],
        ]
        with torch.inference_mode():
            expected = model(torch.from_numpy(np.stack(rows)).float())
        np.testing.assert_allclose(predicted, expected, rtol=1e-6)

    def test_without_a_cap_labels_are_raw(self, model, fleet):
        model.cap = None
        metrics = evaluate(model, fleet).metrics
        assert metrics["rmse"] == metrics["rmse_raw"]
        assert metrics["units_beyond_cap"] == 0

    def test_batches_do_not_change_predictions(self, model, fleet):
        model.train()  # batch statistics would
        segments = Segments(fleet, model.columns, model.rows, fleet.labels())
        whole = predict_segments(model, segments)
        assert not model.training
        np.testing.assert_allclose(predict_segments(model, segments, batch_size=7), whole, rtol=1e-6)
        assert whole.dtype == np.float64

    def test_all_windows_judges_every_segment(self, model, fleet):
        metrics = all_windows(model, fleet)
        segments = Segments(fleet, model.columns, model.rows, fleet.labels(cap=None))
        assert metrics["segments"] == len(segments) == 23 + 1
        predicted, (_, true) = predict_segments(model, segments), segments.arrays()
        assert metrics["rmse"] == pytest.approx(rmse(np.minimum(true, 20), predicted))
        assert metrics["rmse_raw"] == pytest.approx(rmse(true, predicted))

    def test_a_test_table_without_the_models_columns_is_refused(self, model, fleet):
        fleet.columns[0] = "temperature"
        with pytest.raises(ValueError, match="column 'heat', which the model reads, is missing"):
            evaluate(model, fleet)


class TestLoadModel:
    def test_a_folder_without_a_checkpoint_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no config\.json; expected a folder that `eclstm train` wrote"):
            load_model(str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"nowhere: no config\.json"):
            load_model("nowhere")

    def test_a_mistyped_run_is_not_looked_for_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        with pytest.raises(FileNotFoundError, match=r"runs/eclstm-FD009: no config\.json"):
            load_model("runs/eclstm-FD009")

    @pytest.mark.parametrize("change", ["missing", "another shape"])
    def test_weights_that_do_not_fit_the_network_are_refused(self, model, tmp_path, change):
        """Or a part of the network would silently stay random."""
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        bias = weights.pop("output.bias")
        save_file(
            weights if change == "missing" else {**weights, "output.bias": torch.cat([bias, bias])},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(ValueError, match=r"(?s)not a checkpoint of eclstm: .*output\.bias"):
            load_model(str(tmp_path))

    def test_half_a_checkpoint_is_named(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
            load_model(str(tmp_path))


class TestVerb:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_writes_metrics_and_a_plot_beside_the_model(self, folder, model, tiny_table):
        assert app(["eval", "--model", str(folder), "--data", str(tiny_table), "--seed", "3"]) == 0
        metrics = json.loads((folder / "eval-tiny" / "metrics.json").read_text())
        _, test = load(DataOptions(data=str(tiny_table)), seed=3)
        assert metrics == pytest.approx(evaluate(model, test).metrics)
        assert (folder / "eval-tiny" / "predicted.png").read_bytes().startswith(b"\x89PNG")
        assert not (folder / "metrics.json").exists()  # the name of what training wrote

    def test_writes_elsewhere_on_request(self, folder, tiny_table, tmp_path, capsys):
        argv = ["eval", "--model", str(folder), "--data", str(tiny_table), "--output_dir", str(tmp_path / "out")]
        assert app([*argv, "--every_window", "true"]) == 0
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "predicted.png"}
        assert not list(folder.glob("eval-*"))
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["every_window_segments"] > metrics["units"] == 2
        out = capsys.readouterr().out
        assert "last segment of each of 2 units" in out
        assert "labels capped at 20" in out
        assert "raw labels" in out

    def test_judges_on_the_simulated_fleet_by_default(self, tmp_path):
        torch.manual_seed(0)
        ECLSTMRegressor(["sensor_1", "sensor_2"], 2, 5, layers=[{"filters": [2]}]).save_pretrained(tmp_path)
        assert app(["eval", "--model", str(tmp_path)]) == 0
        assert json.loads((tmp_path / "eval-simulated" / "metrics.json").read_text())["units"] == 40

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "nowhere"], "nowhere: no config.json; expected a folder that `eclstm train` wrote"),
            ([], "--model"),
            (["--model", "{model}", "--data", "nowhere.csv"], "nowhere.csv: no such file"),
            (["--model", "{model}"], "column 'heat', which the model reads, is missing"),
        ],
    )
    def test_what_is_wrong_is_said_in_one_line(self, folder, capsys, arguments, message):
        assert app(["eval", *(a.format(model=folder) for a in arguments)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]

    @pytest.mark.parametrize(
        ("file", "content"), [("config.json", b"{"), ("config.json", b"{}"), ("model.safetensors", b"nothing")]
    )
    def test_a_damaged_checkpoint_is_named_in_one_line(self, folder, capsys, file, content):
        (folder / file).write_bytes(content)
        assert app(["eval", "--model", str(folder)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert f"{folder}: not a checkpoint of eclstm" in lines[0]
