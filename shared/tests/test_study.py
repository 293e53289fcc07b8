import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papercore.lab.study import (
    Comparison,
    Metric,
    ReproduceOptions,
    Scale,
    Study,
    interval,
    machine,
    read_rows,
    versions,
)
from scipy import stats


def options(folder, **more):
    return ReproduceOptions(**{"scale": "small", "output_dir": str(folder), **more})


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


class TestReproduce:
    def test_runs_every_arm_on_every_task_from_every_seed(self, study, run, tmp_path):
        comparison = study.reproduce(options(tmp_path))
        expected = [(arm, task, seed) for seed in range(3) for task in ("maps", "faces") for arm in study.arms]
        assert run.ran == expected
        assert [(r["arm"], r["task"], r["seed"]) for r in comparison.rows] == expected
        assert {"report.md", "report.json", "plot.png", "results.jsonl"} <= {p.name for p in tmp_path.iterdir()}

    def test_a_row_says_what_ran_where_and_with_what(self, study, tmp_path):
        study.reproduce(options(tmp_path, seeds=1))
        row = rows(tmp_path)[2]
        assert (row["arm"], row["task"], row["seed"]) == ("new way", "maps", 0)
        assert row["options"] == {"epochs": 2, "task": "maps", "arm": "new way", "error": 18}
        assert row["metrics"].keys() == {"error", "accuracy"}
        assert row["machine"] == machine()
        assert row["versions"]["papercore"]
        assert row["run"].startswith("maps-new-way-0-")
        assert row["seconds"] >= 0

    def test_run_gets_the_options_of_scale_task_and_arm_and_a_folder_of_its_own(self, study, tmp_path):
        seen = []

        def run(options, seed, folder):
            seen.append((options, seed, folder))
            return {"error": 1, "accuracy": 1}

        scale = Scale({"maps": {"task": "maps", "epochs": 3}, "faces": {}}, seeds=3, options={"epochs": 2, "error": 7})
        dataclasses.replace(study, run=run, scales={"small": scale}).reproduce(options(tmp_path))
        assert seen[0][:2] == ({"epochs": 3, "task": "maps", "arm": "old way", "error": 20}, 0)
        assert seen[3][0] == {"epochs": 2, "arm": "old way", "error": 20}
        assert len({folder for *_, folder in seen}) == 18
        assert all(folder.is_relative_to(tmp_path / "work") for *_, folder in seen)

    def test_finished_cells_are_not_run_again(self, study, run, tmp_path):
        first = study.reproduce(options(tmp_path))
        run.ran.clear()
        assert study.reproduce(options(tmp_path)).rows == first.rows
        assert run.ran == []

    def test_more_seeds_run_the_new_ones_only(self, study, run, tmp_path):
        study.reproduce(options(tmp_path, seeds=1))
        run.ran.clear()
        assert len(study.reproduce(options(tmp_path, seeds=2)).rows) == 12
        assert {seed for *_, seed in run.ran} == {1}

    def test_results_known_before_an_interruption_are_kept(self, study, run, tmp_path):
        def interrupted(options, seed, folder):
            if len(run.ran) == 4:
                raise KeyboardInterrupt
            return run(options, seed, folder)

        with pytest.raises(KeyboardInterrupt):
            dataclasses.replace(study, run=interrupted).reproduce(options(tmp_path))
        assert len(rows(tmp_path)) == 4
        done = list(run.ran)
        study.reproduce(options(tmp_path))
        assert len(run.ran) == len(set(run.ran)) == 18
        assert run.ran[:4] == done

    def test_a_line_cut_short_by_a_kill_is_dropped_and_run_again(self, study, run, tmp_path):
        study.reproduce(options(tmp_path))
        log = tmp_path / "results.jsonl"
        log.write_text(log.read_text()[:-30])
        run.ran.clear()
        assert len(study.reproduce(options(tmp_path)).rows) == 18
        assert run.ran == [("new way", "faces", 2)]
        assert len(rows(tmp_path)) == 18

    def test_other_options_of_an_arm_are_run_anew(self, study, run, tmp_path):
        study.reproduce(options(tmp_path))
        run.ran.clear()
        changed = dataclasses.replace(study, arms={**study.arms, "rival": {"arm": "rival", "error": 21}})
        comparison = changed.reproduce(options(tmp_path))
        assert {arm for arm, *_ in run.ran} == {"rival"}
        assert len(comparison.rows) == 18  # the old rows are in the file, not in the report
        assert len(rows(tmp_path)) == 24
        assert max(comparison.values("rival", "maps", "error").values()) < max(
            row["metrics"]["error"] for row in rows(tmp_path) if row["arm"] == "rival" and row["task"] == "maps"
        )

    def test_other_options_of_the_scale_are_run_anew(self, study, run, tmp_path):
        study.reproduce(options(tmp_path))
        run.ran.clear()
        longer = dataclasses.replace(study.scales["small"], options={"epochs": 3})
        dataclasses.replace(study, scales={"small": longer}).reproduce(options(tmp_path))
        assert len(run.ran) == 18

    def test_arms_and_tasks_may_be_run_apart(self, study, run, tmp_path):
        comparison = study.reproduce(options(tmp_path, arms=["new way"], tasks=["faces"]))
        assert run.ran == [("new way", "faces", seed) for seed in range(3)]
        assert comparison.verdict("maps") == comparison.verdict("faces") == "not compared"
        comparison = study.reproduce(options(tmp_path, arms=["old way"]))
        assert len(run.ran) == 9
        assert comparison.verdict("faces") == "shown"  # with what had run before

    def test_progress_counts_what_was_asked_for_and_names_it(self, study, tmp_path, capsys):
        study.reproduce(options(tmp_path, arms=["new way"], seeds=1))
        shown = capsys.readouterr().err
        assert "0/2" in shown
        assert "papercore: faces, new way, seed 0" in shown
        study.reproduce(options(tmp_path, arms=["new way"], seeds=2))
        assert "2/4" in capsys.readouterr().err

    def test_the_default_folder_is_named_after_study_and_scale(self, study, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        study.reproduce(ReproduceOptions())
        assert (tmp_path / "runs" / "papercore-quick" / "report.md").exists()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"scale": "huge"}, "no scale 'huge': choose from quick, small"),
            ({"arms": ["newer way"]}, "no arm 'newer way': choose from old way, rival, new way"),
            ({"tasks": ["maps", "hands"]}, "no task 'hands': choose from maps, faces"),
            ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ],
    )
    def test_unknown_names_are_refused_before_anything_runs(self, study, run, tmp_path, wrong, message):
        with pytest.raises(ValueError, match=message):
            study.reproduce(options(tmp_path / "out", **wrong))
        assert run.ran == []
        assert not (tmp_path / "out").exists()


class TestReadRows:
    def test_a_missing_file_has_none(self, tmp_path):
        assert list(read_rows(tmp_path / "none")) == []

    def test_a_last_line_without_its_end_is_cut_from_the_file(self, tmp_path):
        path = tmp_path / "r.jsonl"
        path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3')
        assert list(read_rows(path)) == [{"a": 1}, {"a": 2}]
        assert path.read_text() == '{"a": 1}\n{"a": 2}\n'

    def test_any_other_line_that_is_not_json_is_named(self, tmp_path):
        path = tmp_path / "r.jsonl"
        path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
        with pytest.raises(ValueError, match=r"r\.jsonl, line 2: not JSON; mend or remove that line"):
            list(read_rows(path))


class TestInterval:
    @given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-6))
    @settings(max_examples=30, deadline=None)
    def test_is_scipys(self, values):
        result = interval(values)
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert result.low == pytest.approx(expected.low, abs=1e-9)
        assert result.high == pytest.approx(expected.high, abs=1e-9)
        assert result.mean == pytest.approx(np.mean(values))
        assert result.n == len(values)

    def test_one_value_has_none(self):
        result = interval([3.0])
        assert (result.mean, result.n) == (3, 1)
        assert math.isnan(result.low)
        assert math.isnan(result.high)

    def test_equal_values_have_one_of_no_width(self):
        assert interval([2.0, 2.0, 2.0])[:3] == (2, 2, 2)


def comparison(base, ours, scale="small", lower=True):
    """Of two arms on one task, from their value by seed."""
    study = Study("papercore", "", [Metric("m", lower)], "base", "ours", {"base": {}, "ours": {}}, {}, lambda *_: {})
    values = [("base", base), ("ours", ours)]
    rows = [{"arm": a, "task": "t", "seed": s, "metrics": {"m": v}} for a, by in values for s, v in by.items()]
    return Comparison(study, scale, ["t"], rows)


class TestComparison:
    @pytest.mark.parametrize("lower", [True, False])
    def test_gain_is_paired_by_seed_and_positive_where_better(self, lower):
        base, ours = {0: 10.0, 1: 20.0, 2: 30.0}, {2: 27.0, 0: 9.0, 1: 18.0}
        result = comparison(base, ours, lower=lower)
        gain = result.gain("ours", "t", result.study.metrics[0])
        expected = stats.ttest_rel([10, 20, 30], [9, 18, 27]).confidence_interval(0.95)
        sign = 1 if lower else -1
        assert gain.mean == pytest.approx(2 * sign)
        assert sorted([gain.low, gain.high]) == pytest.approx(sorted([sign * expected.low, sign * expected.high]))

    def test_seeds_that_only_one_arm_has_do_not_count(self):
        result = comparison({0: 10.0, 1: 20.0, 5: 99.0}, {0: 9.0, 1: 18.0, 7: 0.0})
        gain = result.gain("ours", "t", result.study.metrics[0])
        assert (gain.mean, gain.n) == (1.5, 2)

    def test_no_pair_no_gain(self):
        result = comparison({0: 10.0}, {1: 9.0})
        assert result.gain("ours", "t", result.study.metrics[0]) is None
        assert result.verdict("t") == "not compared"

    @pytest.mark.parametrize(
        ("ours", "verdict"),
        [
            ({0: 9.0, 1: 18.9, 2: 29.1}, "shown"),
            ({0: 11.0, 1: 21.1, 2: 30.9}, "contrary"),
            ({0: 11.0, 1: 18.0, 2: 29.0}, "not shown"),
            ({0: 9.0}, "ran"),  # one seed shows nothing
        ],
    )
    def test_verdict_is_whether_the_interval_leaves_zero(self, ours, verdict):
        assert comparison({0: 10.0, 1: 20.0, 2: 30.0}, ours).verdict("t") == verdict

    def test_quick_shows_nothing_but_that_it_ran(self):
        assert comparison({0: 10.0, 1: 20.0, 2: 30.0}, {0: 9.0, 1: 18.9, 2: 29.1}, "quick").verdict("t") == "ran"

    def test_values_are_by_seed(self, study, tmp_path):
        result = study.reproduce(options(tmp_path))
        values = result.values("rival", "faces", "error")
        assert list(values) == [0, 1, 2]
        assert result.values("rival", "nowhere", "error") == {}


def test_versions_name_the_package_and_what_decides_a_result():
    assert versions("papercore").keys() == {"python", "papercore", "torch", "transformers"}


def test_the_machine_is_told_in_words():
    assert len(machine()) > 3
    assert "\n" not in machine()
