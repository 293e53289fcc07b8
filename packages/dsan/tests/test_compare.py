"""McNemar's test between the arms of a study, from records made by hand."""

import json

import numpy as np
import pytest
from dsan.cli import app
from dsan.compare import CompareOptions, compare, read_records, record

BASE = np.array([True] * 8 + [False] * 5)
FULL = np.array([False] * 7 + [True] * 3 + [False] * 3)  # 7 words lost, 2 won
DIGIT = np.array([False] * 8 + [True] * 5)


@pytest.fixture
def folder(tmp_path):
    """Two arms of seed 0, one of them again, and another of seed 1 alone."""
    for run, bits in (
        ("iiit5k-A:-base-0-0a1b2c3d", ~BASE),
        ("iiit5k-D:-full-0-0a1b2c3d", FULL),
        ("iiit5k-B:-+-text-attention-1-0a1b2c3d", FULL),
        ("iiit5k-A:-base-0-0a1b2c3d", BASE),  # a run that was stopped behind its record writes another
    ):
        record(tmp_path / "correct.jsonl", run, {"ctx": bits, "enh": ~bits}, DIGIT)
    return tmp_path


def test_records_are_read_as_they_were_written(folder):
    runs = read_records(folder / "correct.jsonl")
    assert len(runs) == 3
    kept = runs["iiit5k-A:-base-0-0a1b2c3d"]
    assert [kept[name].tolist() for name in ("ctx", "enh", "digit")] == [x.tolist() for x in (BASE, ~BASE, DIGIT)]


def test_words_that_one_arm_alone_has_right_are_counted(folder, capsys):
    rows = compare(CompareOptions(str(folder)))
    assert rows == [
        {"arm": "D: full", "seed": 0, "words": "all", "only_baseline": 7, "only_arm": 2, "p": pytest.approx(0.1796875)},
        {"arm": "D: full", "seed": 0, "words": "with a digit", "only_baseline": 0, "only_arm": 2, "p": 0.5},
    ]
    assert json.loads((folder / "mcnemar.json").read_text()) == rows
    assert "0.18" in capsys.readouterr().out


def test_another_baseline(folder):
    rows = compare(CompareOptions(str(folder), "D: full"))
    assert [(row["arm"], row["only_baseline"], row["only_arm"]) for row in rows] == [
        ("A: base", 2, 7), ("A: base", 2, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "line", "message"),
    [
        (["--baseline", "E"], "", "no arm 'E'; the arms are A: base, B: + text attention"),
        (["--baseline", "B: + text attention"], "", "no seed has both 'B: + text attention' and another arm"),
        ([], "not JSON\n", "correct.jsonl: not a record of `dsan reproduce`"),
        ([], '{"run": "x"}\n', "correct.jsonl: not a record of `dsan reproduce`"),
        ([], "[1]\n", "correct.jsonl: not a record of `dsan reproduce`"),
        ([], '{"run": "x", "words": 8, "ctx": 1}\n', "correct.jsonl: not a record of `dsan reproduce`"),
    ],
)
def test_wrong_input_is_one_line(flags, line, message, folder, capsys):
    with (folder / "correct.jsonl").open("a") as stream:
        stream.write(line)
    assert app(["compare", str(folder), *flags]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said


def test_a_folder_without_a_study_is_named(tmp_path, capsys):
    assert app(["compare", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
