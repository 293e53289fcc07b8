import numpy as np
import pandas as pd
import pytest
import torch
from eclstm import ECLSTMRegressor, RunToFailure, remaining_life
from eclstm.cli import app
from eclstm.evaluate import predict_segments


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = ECLSTMRegressor(["oil", "heat"], sequence_length=3, window_size=10)
    model.save_pretrained(tmp_path / "model")
    return model.eval()


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    rows = {"engine 9": 30, "a/b": 4, "z": 14}
    frame = pd.concat(
        pd.DataFrame(
            {"id": unit, "hour": np.arange(n) * 2.0, "heat": rng.normal(size=n), "oil": rng.normal(size=n), "note": "x"}
        )
        for unit, n in rows.items()
    )
    frame.sample(frac=1, random_state=0).to_csv(tmp_path / "table.csv", index=False)
    return frame


def test_predictions_are_the_models_on_each_units_last_rows(model, table):
    out = remaining_life(model, RunToFailure(table, "id", "hour", model.columns)).set_index("unit")
    for unit in ("engine 9", "z"):
        rows = torch.tensor(table[table["id"] == unit][["oil", "heat"]].to_numpy(np.float32)[-model.rows :])
        assert out.loc[unit, "rul"] == pytest.approx(model(rows[None]).item(), abs=1e-5)
    short = torch.tensor(table[table["id"] == "a/b"][["oil", "heat"]].to_numpy(np.float32))
    padded = torch.cat([short[:1].expand(model.rows - 4, -1), short])
    assert out.loc["a/b", "rul"] == pytest.approx(model(padded[None]).item(), abs=1e-5)
    assert out["padded"].to_dict() == {"a/b": True, "engine 9": False, "z": False}
    assert out["time"].to_dict() == {"a/b": 6.0, "engine 9": 58.0, "z": 26.0}


def test_the_verb_writes_a_table_and_a_picture_of_each_unit(model, table, tmp_path):
    flags = ["--unit", "id", "--time", "hour", "--model", str(tmp_path / "model"), "--plots", str(tmp_path / "plots")]
    assert app(["predict", str(tmp_path / "table.csv"), *flags]) == 0
    out = pd.read_csv(tmp_path / "table.rul.csv")
    assert list(out.columns) == ["id", "hour", "rul", "padded"]
    assert len(out) == 3
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3


def test_a_missing_column_is_one_line(model, table, tmp_path, capsys):
    table.drop(columns="heat").to_csv(tmp_path / "less.csv", index=False)
    flags = ["--unit", "id", "--time", "hour", "--model", str(tmp_path / "model")]
    assert app(["predict", str(tmp_path / "less.csv"), *flags]) == 2
    error = capsys.readouterr().err
    assert "column 'heat' is missing" in error
    assert len(error.splitlines()) == 1


def test_batches_do_not_change_predictions(model, table):
    from eclstm import Segments

    fleet = RunToFailure(table, "id", "hour", model.columns)
    segments = Segments(fleet, model.columns, model.rows, np.zeros(len(fleet.values)))
    np.testing.assert_allclose(predict_segments(model, segments, 1), predict_segments(model, segments, 100), atol=1e-5)
