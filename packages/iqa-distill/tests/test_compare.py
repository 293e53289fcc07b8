import json
from functools import partial

import numpy as np
import pytest
from iqa_distill import compare as module
from iqa_distill.compare import CompareOptions, compare, read_records, record
from iqa_distill.metrics import bootstrap_gain, srcc
from iqa_distill.study import study
from matplotlib.image import imread
from tiny_sample import rated

RATED = rated(slice(30))
NOISE = {"a: base": 60, "b: + Reg": 30, "e: MCD + Reg": 5}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results of three arms and two seeds; the last arm is the best by far."""
    monkeypatch.setattr(module, "bootstrap_gain", partial(bootstrap_gain, n=100))
    random = np.random.default_rng(0)
    for seed in (1, 0):
        for arm, noise in NOISE.items():
            run = f"{arm[0]}-{seed}"
            curve = [[10, 0.9], [20, 0.7 + seed / 10]] if arm[0] in "ab" else []
            record(tmp_path / "predictions.jsonl", run, RATED.scores + random.normal(0, noise, 30), RATED, curve)
            row = {"arm": arm, "task": "6 references", "seed": seed, "run": run, "metrics": {}}
            with (tmp_path / "results.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    return tmp_path


def test_gains_are_on_the_same_images(folder, capsys):
    rows = compare(CompareOptions(str(folder)))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, s) for arm in ("b: + Reg", "e: MCD + Reg") for s in (0, 1)
    ]
    runs = read_records(folder / "predictions.jsonl")
    for row in rows:
        ours, base = (runs[f"{arm}-{row['seed']}"]["predictions"] for arm in (row["arm"][0], "a"))
        assert row["gain"] == pytest.approx(srcc(ours, RATED.scores) - srcc(base, RATED.scores), abs=1e-4)
        assert row["low"] < row["gain"] < row["high"]
    assert rows[-1]["low"] > 0
    assert json.loads((folder / "gains.json").read_text()) == rows
    assert f"{rows[-1]['gain']:+.3f}" in capsys.readouterr().out
    assert imread(folder / "test-loss.png").std() > 0.02


def test_another_baseline(folder):
    rows = compare(CompareOptions(str(folder), baseline="e: MCD + Reg"))
    assert [row["arm"] for row in rows] == ["a: base"] * 2 + ["b: + Reg"] * 2
    assert rows[0]["high"] < 0
    with pytest.raises(ValueError, match="baseline must be one of PSNR, full reference"):
        compare(CompareOptions(str(folder), baseline="base"))
    with pytest.raises(ValueError, match="no run of another arm to compare with 'c: \\+ DRD'"):
        compare(CompareOptions(str(folder), baseline="c: + DRD"))
    assert study.baseline == "a: base"


def test_of_a_run_that_is_there_twice_the_last_counts(folder):
    record(folder / "predictions.jsonl", "a-0", RATED.scores, RATED, [])
    assert srcc(read_records(folder / "predictions.jsonl")["a-0"]["predictions"], RATED.scores) == pytest.approx(1)


@pytest.mark.parametrize("line", ["{}", "[1]"])
def test_a_damaged_record_is_named(folder, line):
    with (folder / "predictions.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl: not the record"):
        read_records(folder / "predictions.jsonl")


def test_a_line_that_a_kill_cut_short_is_dropped(folder):
    path = folder / "predictions.jsonl"
    before = read_records(path)
    with path.open("a") as stream:
        stream.write('{"run": "a-0", "pre')
    assert read_records(path).keys() == before.keys()


def test_a_result_without_a_record_is_named(folder):
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"predictions\.jsonl: nothing of the run 'e-0'"):
        compare(CompareOptions(str(folder)))
