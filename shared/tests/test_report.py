import json
import math
import re

import matplotlib.image
import pytest
from papercore.lab.report import (
    SUMMARY_COLUMNS,
    digits_for,
    figures,
    markdown_table,
    plot_gains,
    print_table,
    summary_rows,
)
from papercore.lab.study import Interval, ReproduceOptions


@pytest.fixture
def report(study, tmp_path, capsys):
    """A finished small study: its comparison, its folder, what was printed."""
    comparison = study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path)))
    return comparison, tmp_path, capsys.readouterr().out


def section(text, task):
    return re.search(rf"^## {task}: .*?(?=^## |^Mean over seeds)", text, re.M | re.S)[0]


class TestMarkdown:
    def test_has_a_table_for_each_task_with_every_arm_and_metric(self, report):
        comparison, folder, _ = report
        text = (folder / "report.md").read_text()
        for task in ("maps", "faces"):
            lines = [line for line in section(text, task).splitlines() if line.startswith("|")]
            assert lines[0].startswith("| arm | seeds | error (mm) | better by | accuracy |")
            assert [line.split(" | ")[0] for line in lines[2:]] == ["| old way", "| rival", "| **new way**"]
            assert all(line.count("|") == lines[0].count("|") for line in lines)
            assert all(line.split(" | ")[1] == "3" for line in lines[2:])
        values = comparison.values("old way", "maps", "error").values()
        assert f"| old way | 3 | {sum(values) / 3:.2f} [" in section(text, "maps")

    def test_gains_are_signed_and_the_verdict_heads_the_table(self, report):
        _, folder, _ = report
        text = (folder / "report.md").read_text()
        assert section(text, "maps").startswith("## maps: shown\n")
        cells = {line.split(" | ")[0]: line.split(" | ") for line in section(text, "maps").splitlines()}
        assert cells["| old way"][3] == ""
        assert re.match(r"-(2|3)\.\d\d \[-3\.\d\d, -2\.\d\d\]", cells["| rival"][3])
        assert re.match(r"\+(1|2)\.\d\d \[\+1\.\d\d, \+2\.\d\d\]", cells["| **new way**"][3])

    def test_the_papers_figures_stand_beside_ours_where_there_are_any(self, report):
        _, folder, _ = report
        text = (folder / "report.md").read_text()
        assert "| paper |" in section(text, "maps")
        assert re.search(r"\*\*new way\*\* .* \| 17\.5 \|$", section(text, "maps"), re.M)
        assert "paper" not in section(text, "faces")

    def test_says_what_was_claimed_and_how_it_was_measured(self, report):
        comparison, folder, _ = report
        text = (folder / "report.md").read_text()
        assert "Claim: The new way errs less." in text
        assert "Baseline: old way. Method: new way." in text
        assert comparison.rows[0]["machine"] in text
        assert "torch " in text
        assert "Command: `" in text
        assert "proves nothing" not in text

    def test_quick_says_that_it_proves_nothing(self, study, tmp_path):
        study.reproduce(ReproduceOptions("quick", output_dir=str(tmp_path)))
        assert "it proves nothing else" in (tmp_path / "report.md").read_text()


class TestFiles:
    def test_json_holds_every_value_and_gain(self, report):
        comparison, folder, _ = report
        content = json.loads((folder / "report.json").read_text())
        assert content["verdicts"] == {"maps": "shown", "faces": "shown"}
        assert len(content["cells"]) == 2 * 3 * 2
        cell = next(c for c in content["cells"] if (c["task"], c["arm"], c["metric"]) == ("maps", "new way", "error"))
        assert list(cell["values"].values()) == list(comparison.values("new way", "maps", "error").values())
        assert cell["gain"]["n"] == 3
        assert next(c for c in content["cells"] if c["arm"] == "old way")["gain"] is None

    def test_the_plot_is_a_picture(self, report):
        _, folder, _ = report
        assert matplotlib.image.imread(folder / "plot.png").std() > 0

    def test_what_has_not_run_is_left_out(self, study, tmp_path):
        study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path), arms=["old way"], tasks=["maps"]))
        text = (tmp_path / "report.md").read_text()
        assert "rival" not in text
        assert "## faces" not in text
        assert "## maps: not compared" in text
        assert (tmp_path / "plot.png").exists()

    def test_nothing_run_writes_nothing(self, study, tmp_path):
        study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path), arms=["old way"], tasks=["maps"]))
        for path in tmp_path.iterdir():
            if path.is_file() and path.name != "results.jsonl":
                path.unlink()
        (tmp_path / "results.jsonl").write_text("")
        study.run = None  # nothing to run for a filter that leaves no cell
        study.arms = {}
        study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path)))
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["results.jsonl"]


class TestTerminal:
    def test_shows_the_same_table(self, report):
        _, _, printed = report
        assert "papercore, maps" in printed
        assert "papercore, faces" in printed
        assert "new way" in printed
        assert "report.md" in printed

    def test_tables_have_every_cell(self, capsys):
        print_table("a title", ["x", "y"], [["1", "2"], ["3", "[4, 5]"]])
        out = capsys.readouterr().out
        for word in ("a title", "x", "y", "1", "2", "3", "[4, 5]"):
            assert word in out

    def test_words_in_brackets_are_not_taken_for_markup(self, capsys):
        print_table("t", ["arm"], [["[bold] arm"], ["list [red]"]])
        out = capsys.readouterr().out
        assert "[bold] arm" in out
        assert "list [red]" in out


class TestSummary:
    def test_has_a_line_for_each_task(self, report):
        comparison, _, _ = report
        rows = summary_rows(comparison)
        assert [row[:3] for row in rows] == [["papercore", "maps", "error"], ["papercore", "faces", "error"]]
        assert all(len(row) == len(SUMMARY_COLUMNS) for row in rows)
        assert rows[0][5].startswith(("+1.", "+2."))
        assert rows[0][6] == "shown"

    def test_marks_what_has_not_run(self, study, tmp_path):
        comparison = study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path), arms=["old way"]))
        assert summary_rows(comparison)[0][4:] == ["-", "-", "not compared"]


@pytest.mark.parametrize(
    ("interval", "digits", "signed", "text"),
    [
        (Interval(2.0, 1.5, 2.5, 3), 2, False, "2.00 [1.50, 2.50]"),
        (Interval(2.0, 1.5, 2.5, 3), 2, True, "+2.00 [+1.50, +2.50]"),
        (Interval(-0.5, -1.0, 0.0, 3), 1, True, "-0.5 [-1.0, +0.0]"),
        (Interval(12345.6, 12000.0, 12700.0, 3), 0, False, "12346 [12000, 12700]"),
        (Interval(3.0, math.nan, math.nan, 1), 2, False, "3.00"),
    ],
)
def test_figures_show_the_interval_if_there_is_one(interval, digits, signed, text):
    assert figures(interval, digits, signed) == text


@pytest.mark.parametrize(
    ("values", "digits"),
    [([14.92, 15.1], 2), ([1800.0], 0), ([0.93], 4), ([0.0123, 0.2], 4), ([-250.0, 3.0], 1), ([0.0], 2), ([], 3)],
)
def test_figures_have_about_four_digits_whatever_their_size(values, digits):
    assert digits_for(values) == digits


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("failed", [math.nan, math.inf])
def test_an_arm_that_diverged_is_reported_as_such(study, tmp_path, failed):
    run = study.run
    study.run = lambda options, *rest: {
        **run(options, *rest),
        **({"error": failed} if options["arm"] == "rival" else {}),
    }
    comparison = study.reproduce(ReproduceOptions("small", output_dir=str(tmp_path)))
    text = (tmp_path / "report.md").read_text()
    assert re.search(rf"\| rival \| 3 \| {failed}", text)
    assert comparison.verdict("maps") == "shown"
    assert (tmp_path / "plot.png").exists()
    assert summary_rows(comparison)[0][6] == "shown"


def test_markdown_tables_have_a_rule_below_the_head():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", "4"]]).splitlines() == [
        "| a | b |",
        "|---|---|",
        "| 1 | 2 |",
        "| 3 | 4 |",
    ]


def test_a_row_like_the_rule_is_still_a_row():
    assert markdown_table(["a"], [["---"]]).splitlines()[2] == "| --- |"


def test_gains_are_drawn_one_below_the_other():
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    plot_gains(
        panel, {"first": Interval(0.02, 0.01, 0.03, 5), "missing": None, "last": Interval(-0.01, -0.02, 0.0, 5)}, 100
    )
    assert [line.get_xdata().tolist() for line in panel.lines[:2]] == [[1.0, 3.0], [-2.0, 0.0]]
    assert [dot.get_offsets().tolist() for dot in panel.collections] == [[[2.0, 0.0]], [[-1.0, 2.0]]]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["first", "missing", "last"]
    assert panel.yaxis_inverted()
