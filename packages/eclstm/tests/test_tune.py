import json
import signal

import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from eclstm import ECLSTMRegressor
from eclstm.cli import app
from eclstm.evaluate import load_model
from eclstm.simulated import simulate
from eclstm.tune import search_space, valid


@pytest.fixture
def table(tmp_path):
    fleet = simulate(6, seed=0)
    frame = pd.DataFrame(fleet.values[:, :6], columns=fleet.columns[:6])
    frame.insert(0, "unit", np.repeat(fleet.units, fleet.lengths))
    frame.insert(1, "cycle", fleet.times)
    frame.to_csv(tmp_path / "fleet.csv", index=False)
    return tmp_path / "fleet.csv"


def flags(table, folder, *more):
    small = ["--max_epochs", "2", "--min_epochs", "1", "--eta", "2", "--every", "20", "--no_select_features"]
    return ["tune", "--data", str(table), "--output_dir", str(folder), *small, *more]


def trials(folder):
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'tune.db'}")
    names = ("bracket", "configuration", "budget")
    return sorted(
        (*(t.user_attrs[n] for n in names), json.dumps(t.params, sort_keys=True), t.value) for t in study.trials
    )


def test_what_the_space_offers_can_be_built():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    built = 0
    for _ in range(60):
        try:
            options = valid(search_space(study.ask()), shortest=40)
        except ValueError:
            continue
        names = ("layers", "preprocessing", "sequence_length", "window_size", "dense", "dropout")
        ECLSTMRegressor(["a", "b", "c"], **{name: options[name] for name in names})
        built += 1
    assert built > 20


def test_what_cannot_be_built_is_refused_by_arithmetic():
    layer = {"kernel_sizes": [5, 5], "stride": 2}
    fits = {"sequence_length": 4, "window_size": 13, "preprocessing": [], "layers": [layer]}
    assert valid(fits, shortest=16) == fits
    with pytest.raises(ValueError, match="a unit has 15"):
        valid(fits, shortest=15)
    with pytest.raises(ValueError, match="window 12 < 13"):
        valid({**fits, "window_size": 12}, shortest=40)
    with pytest.raises(ValueError, match="window 6 < 13"):
        valid({**fits, "preprocessing": [{"filters": 3, "kernel_size": 3, "stride": 2}]}, shortest=40)


def test_tune_ends_with_a_model_and_its_flags(table, tmp_path):
    assert app(flags(table, tmp_path / "out")) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["evaluations"] == len(trials(out)) == 5
    assert load_model(str(out / "best")).cap == 120
    assert {"predicted.png", "search.png", "best.yaml"} <= {p.name for p in out.iterdir()}
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["num_train_epochs"] == 2
    train = ["train", "--data", str(table), "--config", str(out / "best.yaml"), "--max_steps", "2", "--output_dir"]
    assert app([*train, str(tmp_path / "again"), "--no_select_features"]) == 0
    assert load_model(str(tmp_path / "again")).rows == best["sequence_length"] + best["window_size"] - 1


def test_a_search_with_other_options_is_refused(table, tmp_path, capsys):
    assert app(flags(table, tmp_path / "out")) == 0
    capsys.readouterr()
    assert app(flags(table, tmp_path / "out", "--sweeps", "2")) == 2
    assert "sweeps 1, now 2" in capsys.readouterr().err


def test_killed_or_shared_a_search_ends_with_the_same_trials(table, launch, tmp_path):
    assert app(flags(table, tmp_path / "whole")) == 0
    killed = launch("eclstm.cli", flags(table, tmp_path / "killed"))
    code, _ = killed.wait_for(tmp_path / "killed" / "bracket-0-1", "checkpoint-*").end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert trials(tmp_path / "killed") != trials(tmp_path / "whole")
    assert app(flags(table, tmp_path / "killed")) == 0
    assert trials(tmp_path / "killed") == trials(tmp_path / "whole")
    for worker in [launch("eclstm.cli", flags(table, tmp_path / "shared")) for _ in range(2)]:
        code, error = worker.end()
        assert code == 0, error
    assert trials(tmp_path / "shared") == trials(tmp_path / "whole")
    assert load_model(str(tmp_path / "shared" / "best")).cap == 120
