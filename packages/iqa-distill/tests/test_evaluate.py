import json

import numpy as np
import pandas as pd
import pytest
from iqa_distill.data import DataOptions, split
from iqa_distill.evaluate import EvalOptions, evaluate, trained_on
from iqa_distill.metrics import correlations, srcc
from iqa_distill.readers import read_ratings
from iqa_distill.scoring import score_images
from matplotlib.image import imread
from papercore.lab.cli import App
from papercore.lab.training import resumable
from PIL import Image
from tiny_rkiqt import tiny_rkiqt

app = App("iqa-distill", "test")
app.command("eval", "iqa_distill.evaluate:evaluate", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of 8 references and 2 kinds of distortion, whose scores are the tiny network's with noise."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(24)]
    for i, path in enumerate(paths):
        Image.fromarray(random.integers(0, 256 // (1 + i % 3), (36, 40, 3), np.uint8)).save(path)
    scores = score_images(tiny_rkiqt(), paths) + random.normal(size=24)
    table = pd.DataFrame({"image": [path.name for path in paths], "mos": scores})
    table["reference"] = [f"r{i // 3}" for i in range(24)]
    table["distortion"] = ["blur" if i % 2 else "noise" for i in range(24)]
    table.to_csv(folder / "scores.csv", index=False)
    return folder / "scores.csv"


@pytest.fixture
def model(tmp_path, data):
    """As `train` leaves it."""
    folder = tmp_path / "model"
    resumable(folder, DataOptions(data=str(data), test_share=0.5, split_seed=3))
    tiny_rkiqt().save_pretrained(folder)
    return folder


def test_the_runs_own_test_part(model, data, capsys):
    results = evaluate(EvalOptions(str(model)))
    rated = read_ratings(data)
    rated = rated.select(split(rated, DataOptions(data=str(data), test_share=0.5, split_seed=3))[2])
    found = score_images(tiny_rkiqt(), [data.parent / name for name in rated.names])
    assert len(found) == 12
    assert results == pytest.approx(correlations(found, rated.scores), abs=1e-4)
    printed = " ".join(capsys.readouterr().out.split())
    assert "12 images (the run's test part), 3 crops each" in printed
    record = json.loads((model / "eval-scores.json").read_text())
    assert record["correlations"] == results
    assert [row["image"] for row in record["predictions"]] == rated.names
    assert [row["reference"] for row in record["predictions"]] == rated.references
    assert [row["prediction"] for row in record["predictions"]] == pytest.approx(found, abs=1e-3)
    blur = np.array([kind == "blur" for kind in rated.distortions])
    assert record["by_distortion"]["blur"]["srcc"] == pytest.approx(srcc(found[blur], rated.scores[blur]))
    assert record["by_distortion"]["blur"]["images"] == blur.sum()
    assert imread(model / "eval-scores.png").std() > 0.02


def test_naming_the_data_it_was_trained_on_does_not_judge_what_it_saw(model, data, monkeypatch, capsys):
    expected = evaluate(EvalOptions(str(model)))
    monkeypatch.chdir(data.parent)
    assert evaluate(EvalOptions(str(model), data="scores.csv")) == expected


def test_other_data_is_judged_as_a_whole_or_by_its_split(model, data, tmp_path, capsys):
    table = pd.read_csv(data)
    table["image"] = [str(data.parent / name) for name in table["image"]]
    table.to_csv(tmp_path / "other.csv", index=False)
    assert (
        app(
            [
                "eval",
                "--model",
                str(model),
                "--data",
                str(tmp_path / "other.csv"),
                "--output",
                str(tmp_path / "new" / "e.json"),
            ]
        )
        == 0
    )
    assert "24 images (all)" in " ".join(capsys.readouterr().out.split())
    assert len(json.loads((tmp_path / "new" / "e.json").read_text())["predictions"]) == 24
    table["split"] = ["test" if i < 6 else "train" for i in range(24)]
    table.to_csv(tmp_path / "other.csv", index=False)
    evaluate(EvalOptions(str(model), data=str(tmp_path / "other.csv"), logistic=5))
    printed = " ".join(capsys.readouterr().out.split())
    assert "6 images (its test part)" in printed
    table["split"] = "train"
    table.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"other\.csv: its test part has no images"):
        evaluate(EvalOptions(str(model), data=str(tmp_path / "other.csv")))


def test_an_inverted_scale_is_told(model, data, tmp_path, capsys):
    table = pd.read_csv(data)
    table["image"] = [str(data.parent / name) for name in table["image"]]
    table["mos"] = -table["mos"]
    table.to_csv(tmp_path / "dmos.csv", index=False)
    with pytest.warns(UserWarning, match="is lower better in one of them"):
        evaluate(EvalOptions(str(model), data=str(tmp_path / "dmos.csv")))
    turned = evaluate(EvalOptions(str(model), data=str(tmp_path / "dmos.csv"), lower_better=True))
    assert turned["srcc"] > 0.8


def test_an_image_that_cannot_be_read(model, data, tmp_path, capsys):
    table = pd.read_csv(data)
    table["image"] = [str(data.parent / name) for name in table["image"]]
    (tmp_path / "cut.png").write_bytes((data.parent / "0.png").read_bytes()[:99])
    table.loc[5, "image"] = str(tmp_path / "cut.png")
    table.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match=r"cut\.png.*--skip_bad true leaves such images out"):
        evaluate(EvalOptions(str(model), data=str(tmp_path / "other.csv")))
    evaluate(EvalOptions(str(model), data=str(tmp_path / "other.csv"), skip_bad=True))
    printed = capsys.readouterr()
    assert "23 images (all)" in " ".join(printed.out.split())
    (line,) = printed.err.splitlines()
    assert "left out" in line
    assert "cut.png" in line


def test_a_model_without_a_record(model):
    (model / "options.json").unlink()
    assert trained_on(model) is None
    with pytest.raises(ValueError, match="says what it was trained on: give --data"):
        evaluate(EvalOptions(str(model)))
