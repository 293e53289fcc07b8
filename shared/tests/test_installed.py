import json
import re
import sys

import pytest
from papercore.lab.__main__ import app
from papercore.lab.installed import studies

DEMO = """
from papercore.lab.study import Metric, Scale, Study

def run(options, seed, folder):
    return {"error": options["error"] + seed}

study = Study(
    name="demo", claim="Less is less.", metrics=[Metric("error", lower_is_better=True)], baseline="a", method="b", run=run,
    arms={"a": {"error": 3.0}, "b": {"error": 1.5}},
    scales={"quick": Scale({"t": {}}, 2), "small": Scale({"t": {}, "u": {}}, 2)},
)
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Two installed distributions with a study each, the only ones, and tmp_path as the working directory."""
    for name in ("demo", "sketch"):
        (tmp_path / f"{name}.py").write_text(DEMO.replace("demo", name))
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\nSummary: Shows how little is little\n"
        (info / "METADATA").write_text(about)
        (info / "entry_points.txt").write_text(f"[papercore.studies]\n{name} = {name}:study\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = {name: entry for name, entry in studies().items() if name in ("demo", "sketch")}
    monkeypatch.setattr("papercore.lab.installed.studies", lambda: ours)
    yield tmp_path
    for name in ours:
        sys.modules.pop(name, None)


def test_studies_are_found_by_their_entry_points(demo):
    assert studies()["demo"].value == "demo:study"
    assert list(studies()) == sorted(studies())


def test_list_shows_name_version_and_summary(demo, capsys):
    assert app(["list"]) == 0
    out = capsys.readouterr().out
    assert "demo" in out
    assert "1.5" in out
    assert "Shows how little is little" in out


def test_reproduce_runs_the_named_studies_and_ends_with_one_table(demo, capsys):
    assert app(["reproduce", "demo", "--scale", "small", "--output_dir", "out"]) == 0
    assert (demo / "out" / "demo-small" / "report.md").exists()
    rows = [json.loads(line) for line in (demo / "out" / "demo-small" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert rows[0]["versions"]["demo"] == "1.5"
    table = capsys.readouterr().out.rpartition("scale small")[2]
    assert table.count("demo") == 2
    assert table.count("shown") == 2
    assert "+1.50" in table


def test_reproduce_takes_a_number_of_seeds(demo):
    assert app(["reproduce", "demo", "--seeds", "5"]) == 0
    assert len((demo / "runs" / "demo-quick" / "results.jsonl").read_text().splitlines()) == 10


def test_reproduce_without_a_name_runs_all_under_one_bar(demo, capsys):
    assert app(["reproduce"]) == 0
    shown = capsys.readouterr()
    assert (demo / "runs" / "demo-quick" / "report.md").exists()
    assert (demo / "runs" / "sketch-quick" / "report.md").exists()
    assert "0/8" in shown.err
    assert shown.err.rstrip().endswith("sketch: t, b, seed 1]")
    assert shown.out.count("┏") == 1  # one table


def test_one_report_has_the_table_the_claims_and_the_plots(demo):
    assert app(["reproduce", "--scale", "small"]) == 0
    report = demo / "runs" / "report-small.md"
    text = report.read_text()
    assert text.count("| +1.500 [+1.500, +1.500] | shown |") == 4
    assert text.count("Less is less.") == 2
    links = re.findall(r"\]\((.*?)\)", text)
    assert len(links) == 4
    assert all((report.parent / link).exists() for link in links)


def test_a_study_that_cannot_run_does_not_keep_the_others_from_it(demo, capsys):
    (demo / "demo.py").write_text(DEMO.replace("    return", "    raise ValueError('no data here')\n    return"))
    assert app(["reproduce"]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "papercore: not run: demo: no data here"
    assert "sketch" in shown.out
    assert "![sketch]" in (demo / "runs" / "report-quick.md").read_text()


def test_the_same_command_goes_on(demo):
    assert app(["reproduce", "sketch"]) == 0
    log = demo / "runs" / "sketch-quick" / "results.jsonl"
    before = log.read_text()
    assert app(["reproduce"]) == 0
    assert log.read_text() == before


def test_an_unknown_study_is_refused_before_anything_runs(demo, capsys):
    assert app(["reproduce", "demo", "dmeo"]) == 2
    assert "papercore: no installed study 'dmeo': choose from demo, sketch" in capsys.readouterr().err
    assert not (demo / "runs").exists()
