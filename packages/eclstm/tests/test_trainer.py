import json
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from eclstm.cli import app
from eclstm.data import RunToFailure
from eclstm.evaluate import load_model
from eclstm.simulated import simulate
from eclstm.sources import DataOptions, load
from eclstm.trainer import ECLSTMConfig, ECLSTMTrainer, build_model, fit, split_segments
from safetensors.torch import load_file
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing import assert_close

# A network that learns the tiny table in a second.
LAYERS = [{"filters": [4], "kernel_sizes": [3]}]
TINY = {"sequence_length": 3, "window_size": 6, "layers": LAYERS, "dense": [8], "per_device_train_batch_size": 32}


def config(folder, **options):
    quiet = {"disable_tqdm": True, "learning_rate": 0.01}
    return ECLSTMConfig(output_dir=str(folder), **{**TINY, **quiet, **options})


def command(data, folder, **options):
    """The arguments of ``eclstm train`` for the same network."""
    options = {**TINY, "learning_rate": 0.01, "data": data, "output_dir": folder, **options}
    flags = {**options, "layers": json.dumps(options["layers"]), "dense": "8"}
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def last_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def table(tiny_table):
    return RunToFailure(tiny_table)


class TestBuildModel:
    def test_reads_the_columns_that_depend_on_the_label(self, table, tmp_path):
        assert build_model(table, config(tmp_path), cap=120).columns == ["heat", "flow"]
        assert build_model(table, config(tmp_path, select_features=False), cap=120).columns == table.columns

    def test_output_starts_at_the_mean_label(self, table, tmp_path):
        """Trap: from 0 the first epochs would only learn the mean."""
        model = build_model(table, config(tmp_path), cap=25)
        assert_close(model.output.bias.item(), table.labels(25).mean(), rtol=1e-6, atol=0)
        assert model.cap == 25

    def test_the_scaler_is_fitted_on_every_training_row(self, table, tmp_path):
        model = build_model(table, config(tmp_path), cap=120)
        scaled = model.standardize(torch.from_numpy(table.values[:, :2]).float())
        assert_close(scaled.mean(0), torch.zeros(2), rtol=0, atol=1e-3)
        assert_close(scaled.std(0), torch.ones(2), rtol=0, atol=1e-3)

    def test_conditions_are_found_by_clustering(self, tmp_path):
        """The simulated fleet flies in three: their operating points are 0, 10 and 20 in the first setting."""
        table = simulate(6, seed=0, conditions=3)
        model = build_model(table, config(tmp_path, conditions=3, select_features=False), cap=120)
        centres = model.standardize.centres.flatten()
        assert_close(centres.sort().values, torch.tensor([0.0, 10.0, 20.0]), rtol=0, atol=0.01)
        at = model.standardize.condition(torch.from_numpy(table.values).float())
        assert_close(centres[at], torch.from_numpy(table.values[:, 0].round(-1)).float(), rtol=0, atol=0.01)
        rows = torch.cat([torch.from_numpy(table.values[:, :1]), torch.from_numpy(table.values)], 1).float()
        scaled = model.standardize(rows)
        for k in range(3):
            assert_close(scaled[at == k].mean(0), torch.zeros(24), rtol=0, atol=1e-2)

    def test_conditions_may_be_told_by_several_columns_of_different_scale(self, tmp_path):
        rng = np.random.default_rng(0)
        corners = np.array([[0, 0], [0, 1e-4], [1000, 0], [1000, 1e-4]])[rng.integers(0, 4, 400)]
        points = corners * (1 + rng.normal(0, 0.01, corners.shape))
        frame = pd.DataFrame(points, columns=["height", "flow"]).assign(
            unit=1, cycle=np.arange(400), wear=np.arange(400)
        )
        options = {"conditions": 4, "condition_columns": ["height", "flow"], "select_features": False}
        model = build_model(RunToFailure(frame), config(tmp_path, **options), cap=None)
        found = model.standardize.centres / torch.tensor([1000, 1e-4])
        assert_close(found.round().unique(dim=0), torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (["serial"], r"condition_columns \['serial'\] have only 1 different values"),
            (["noise", "serial"], r"condition_columns \['noise', 'serial'\]: one is constant"),
            (["altitude"], "column 'altitude', .* is missing"),
        ],
    )
    def test_columns_that_tell_no_conditions_are_refused(self, table, tmp_path, columns, message):
        with pytest.raises(ValueError, match=message):
            build_model(table, config(tmp_path, conditions=2, condition_columns=columns), cap=120)

    def test_more_conditions_than_there_are_values_are_refused(self, tiny_frame, tmp_path):
        table = RunToFailure(tiny_frame.assign(mode=tiny_frame["cycle"] % 2))
        with pytest.raises(ValueError, match=r"conditions 3: condition_columns .'mode'. have only 2 different values"):
            build_model(table, config(tmp_path, conditions=3, condition_columns=["mode"]), cap=120)


class TestSplit:
    def test_validation_units_are_not_trained_on(self, table, tmp_path):
        options = config(tmp_path, validation_share=0.3)
        model = build_model(table, options, cap=120)
        train, validation = split_segments(table, model, options)
        kept, held_out = table.split(0.3, options.seed)
        assert not set(kept.units) & set(held_out.units)
        assert len(train) == sum(kept.lengths - 7)
        assert len(validation) == sum(held_out.lengths - 7)
        assert not set(map(tuple, train.values.tolist())) & set(map(tuple, validation.values.tolist()))

    def test_every_thins_the_training_segments_only(self, table, tmp_path):
        model = build_model(table, config(tmp_path), cap=120)
        train, validation = split_segments(table, model, config(tmp_path))
        thinned, same = split_segments(table, model, config(tmp_path, every=4))
        assert len(thinned) == -(-len(train) // 4)
        assert len(same) == len(validation)


class TestPaperRecipe:
    @pytest.fixture
    def trainer(self, table, tmp_path):
        options = ECLSTMConfig(output_dir=str(tmp_path), disable_tqdm=True)
        model = build_model(table, options, cap=120)
        trainer = ECLSTMTrainer(model, options, *split_segments(table, model, options))
        trainer.create_optimizer_and_scheduler(num_training_steps=100)
        return trainer

    def test_optimizer_is_adam_as_keras_has_it(self, trainer):
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert isinstance(optimizer, torch.optim.AdamW)
        for group in optimizer.param_groups:
            assert group["weight_decay"] == 0  # without it AdamW is Adam
            assert group["lr"] == 1e-3
            assert group["eps"] == 1e-7
            assert group["betas"] == (0.9, 0.999)
        assert trainer.args.max_grad_norm == 0

    def test_learning_rate_falls_to_0_3_after_5_epochs_without_improvement(self, trainer):
        scheduler = trainer.lr_scheduler
        assert isinstance(scheduler, ReduceLROnPlateau)
        rates = []
        for rmse in [10.0, 9.0, *[9.5] * 6]:
            scheduler.step(rmse)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        np.testing.assert_allclose(rates, [1e-3] * 6 + [3e-4] * 2)

    def test_batch_epochs_patience_and_network_are_the_authors(self, trainer):
        assert trainer.args.train_batch_size == 15
        assert trainer.args.num_train_epochs == 30
        assert trainer.args.patience == 15
        assert sum(p.numel() for p in trainer.model.network.layers[1].parameters()) == 18160


def test_loss_is_the_mean_squared_error_in_cycles(table, tmp_path):
    options = config(tmp_path)
    model = build_model(table, options, cap=120).eval()
    train, validation = split_segments(table, model, options)
    trainer = ECLSTMTrainer(model, options, train, validation)
    batch = train.__getitems__(range(10))
    expected = (model(batch["segments"]) - batch["labels"]).square().mean()
    assert_close(trainer.compute_loss(model, batch), expected)


@pytest.fixture(scope="module")
def trained(tiny_table, tmp_path_factory):
    """Folder of an uninterrupted run of the command, for others to be compared with."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert app(command(tiny_table, folder, num_train_epochs=12)) == 0
    return folder


class TestTraining:
    def test_learns(self, trained):
        history = json.loads(
            (max(trained.glob("checkpoint-*"), key=lambda p: p.stat().st_mtime) / "trainer_state.json").read_text()
        )
        losses = [row["loss"] for row in history["log_history"] if "loss" in row]
        assert losses[-1] < losses[0] / 3
        assert json.loads((trained / "metrics.json").read_text())["rmse"] < 7  # a constant would miss by some 10

    def test_writes_a_folder_that_from_pretrained_reads(self, trained, tiny_table):
        assert {"config.json", "model.safetensors", "metrics.json", "predicted.png"} <= {
            p.name for p in trained.iterdir()
        }
        model = load_model(str(trained))
        assert model.columns == ["heat", "flow"]
        assert not list(trained.rglob("*.pkl"))

    def test_ends_with_the_best_epochs_weights(self, tiny_table, table, tmp_path):
        trainer = fit(
            DataOptions(data=str(tiny_table)), config(tmp_path, num_train_epochs=5, learning_rate=0.05), table
        )
        validated = [row["eval_rmse"] for row in trainer.state.log_history if "eval_rmse" in row]
        assert trainer.evaluate()["eval_rmse"] == pytest.approx(min(validated), rel=1e-5)
        assert min(validated) < validated[-1]

    def test_stops_early_without_improvement(self, tiny_table, table, tmp_path):
        trainer = fit(
            DataOptions(data=str(tiny_table)),
            config(tmp_path, num_train_epochs=40, patience=2, learning_rate=0.05),
            table,
        )
        validated = [row["eval_rmse"] for row in trainer.state.log_history if "eval_rmse" in row]
        assert len(validated) == int(np.argmin(validated)) + 3 < 40

    @pytest.mark.parametrize("network", ["lstm", "convlstm", "cnn-lstm"])
    def test_trains_the_baselines_too(self, tiny_table, table, tmp_path, network):
        options = config(tmp_path, num_train_epochs=1, network=network, layers=[5], max_steps=2)
        assert fit(DataOptions(data=str(tiny_table)), options, table).state.global_step == 2

    def test_trains_with_several_conditions(self, tiny_frame, tmp_path):
        path = tmp_path / "modes.csv"
        tiny_frame.assign(
            mode=tiny_frame["cycle"] % 2, heat=tiny_frame["heat"] + 100 * (tiny_frame["cycle"] % 2)
        ).to_csv(path)
        argv = command(path, tmp_path / "run", num_train_epochs=1, conditions=2, condition_columns="mode")
        assert app(argv) == 0
        model = load_model(str(tmp_path / "run"))
        assert model.columns[0] == "mode"
        assert "heat" in model.columns
        assert sorted(model.standardize.centres.flatten().tolist()) == pytest.approx([0, 1], abs=1e-5)

    def test_same_seed_same_weights_other_seed_others(self, tiny_table, tmp_path):
        weights = []
        for folder, seed in [("a", 3), ("b", 3), ("c", 4)]:
            assert app(command(tiny_table, tmp_path / folder, num_train_epochs=1, seed=seed)) == 0
            weights.append(load_file(tmp_path / folder / "model.safetensors"))
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert not torch.equal(weights[0]["output.weight"], weights[2]["output.weight"])

    def test_default_folder_is_named_after_the_data(self, tiny_table, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        argv = command(tiny_table, "unused", max_steps=1)
        at = argv.index("--output_dir")
        assert app(argv[:at] + argv[at + 2 :]) == 0
        assert (tmp_path / "runs" / "eclstm-tiny" / "model.safetensors").exists()


class TestResume:
    def test_a_killed_run_goes_on_to_the_same_weights(self, tiny_table, launch, tmp_path, trained):
        """kill -9 in mid-training, the same command again: bit for bit what the uninterrupted run gave."""
        folder = tmp_path / "run"
        argv = command(tiny_table, folder, num_train_epochs=12)
        code, _ = launch("eclstm.cli", argv).wait_for(folder, "trainer_state.json").end(signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert not (folder / "model.safetensors").exists()
        assert app(argv) == 0
        resumed, expected = load_file(folder / "model.safetensors"), load_file(trained / "model.safetensors")
        assert resumed.keys() == expected.keys()
        for name in expected:
            assert torch.equal(resumed[name], expected[name]), name
        assert (folder / "metrics.json").read_text() == (trained / "metrics.json").read_text()

    def test_a_resumed_run_stops_when_the_uninterrupted_one_does(self, tiny_table, table, tmp_path):
        """Epochs without improvement count on across the interruption."""
        data = DataOptions(data=str(tiny_table))
        options = {"num_train_epochs": 40, "patience": 3, "learning_rate": 0.05, "save_total_limit": None}
        whole = fit(data, config(tmp_path, **options), table).state
        checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for checkpoint in checkpoints[-2:]:  # as if killed with one epoch of patience used up
            (checkpoint / "trainer_state.json").unlink()
        resumed = fit(data, config(tmp_path, **options), table).state
        assert resumed.global_step == whole.global_step
        assert resumed.best_metric == whole.best_metric

    def test_a_finished_run_is_not_trained_further(self, tiny_table, table, tmp_path):
        data = DataOptions(data=str(tiny_table))
        options = {"num_train_epochs": 40, "patience": 1, "learning_rate": 0.05}
        whole = fit(data, config(tmp_path, **options), table)
        again = fit(data, config(tmp_path, **options), table)
        assert again.state.global_step == whole.state.global_step
        assert torch.equal(again.model.output.weight, whole.model.output.weight)

    def test_other_options_in_the_same_folder_are_refused(self, tiny_table, trained, capsys):
        before = (trained / "model.safetensors").read_bytes()
        assert app(command(tiny_table, trained, num_train_epochs=12, learning_rate=0.02)) == 2
        assert "holds a run with learning_rate 0.01, now 0.02: give another --output_dir" in last_line(capsys)
        assert app(command(tiny_table, trained, num_train_epochs=12, cap=50)) == 2
        assert "holds a run with cap 120.0, now 50.0" in last_line(capsys)
        assert (trained / "model.safetensors").read_bytes() == before

    def test_a_start_that_failed_does_not_block_its_folder(self, tiny_table, tmp_path, capsys):
        assert app(command(tiny_table, tmp_path / "run", max_steps=1, window_size=99)) == 2
        assert "segments of 101 rows" in last_line(capsys)
        assert app(command(tiny_table, tmp_path / "run", max_steps=1)) == 0


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every must be at least 1, got 0"),
            ({"layers": "[{"}, "layers is not a JSON list"),
            ({"preprocessing": "{"}, "preprocessing is not a JSON list"),
        ],
    )
    def test_of_the_configuration(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every": 0}, "every must be at least 1, got 0"),
            ({"layers": "nonsense"}, "layers is not a JSON list"),
            ({"layers": [4]}, "layers[0]: eclstm.cell.ECLSTM() argument after ** must be a mapping, not int"),
            ({"layers": 5}, "layers must be a list"),
            ({"layers": [{"filters": [4], "kernel_sizes": [7]}]}, "layers[0]: window 6 < 7 needed by kernels [7]"),
            ({"layers": [{"filters": [4], "depth": 1}]}, "unexpected keyword argument 'depth'"),
            (
                {"network": "transformer"},
                "network 'transformer' is unknown: choose from eclstm, lstm, cnn-lstm, convlstm",
            ),
            ({"network": "lstm"}, "layers of lstm are widths"),
            ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
            ({"window_size": 60}, "segments of 62 rows, but units have"),
            ({"cap": -5}, "cap must be a positive number of cycles, got -5"),
            ({"validation_share": 0}, "cannot split 8 units at a share of 0.0"),
            ({"validation_share": 1}, "cannot split 8 units at a share of 1.0"),
            ({"conditions": 0}, "conditions must be at least 1, got 0"),
            (
                {"conditions": 2, "condition_columns": "serial"},
                "condition_columns ['serial'] have only 1 different values",
            ),
            ({"conditions": 2}, "column 'setting_1', which the model reads, is missing"),
            ({"dropout": 2}, "dropout probability has to be between 0 and 1"),
            ({"patience": 0}, "patience must be at least 1, got 0"),
            ({"unit": "engine"}, "column 'engine' is missing"),
            ({"features": ["noise", "serial"]}, "no column depends on the remaining life"),
            ({"test_data": "nowhere.csv"}, "nowhere.csv: no such file"),
            ({"lr_scheduler_type": "sometimes"}, "sometimes"),
        ],
    )
    def test_of_the_command_end_in_one_line(self, tiny_table, tmp_path, capsys, options, message):
        argv = command(tiny_table, tmp_path / "run", max_steps=1)
        for name, value in options.items():
            words = value if name == "features" else [value if isinstance(value, str) else json.dumps(value)]
            at = argv.index(f"--{name}") if f"--{name}" in argv else len(argv)
            argv[at : at + 2] = [f"--{name}", *words]
        assert app(argv) == 2
        line = last_line(capsys)
        assert line.startswith("eclstm: ")
        assert message in line

    def test_a_batch_of_1_is_warned_about(self, tmp_path, caplog):
        config(tmp_path, per_device_train_batch_size=1)
        assert "a batch of 1 gives batch normalisation noisy statistics" in caplog.text
        caplog.clear()
        config(tmp_path)
        assert not caplog.text


def test_simulated_fleet_is_what_a_bare_command_trains_on(tmp_path):
    train, _ = load(DataOptions(), seed=0)
    model = build_model(train, ECLSTMConfig(output_dir=str(tmp_path)), cap=120)
    assert len([column for column in model.columns if column.startswith("sensor")]) == 17  # four never change
