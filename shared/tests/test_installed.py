import json

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
    """An installed distribution with a study, and tmp_path as the working directory."""
    (tmp_path / "demo.py").write_text(DEMO)
    info = tmp_path / "demo-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demo\nVersion: 1.5\nSummary: Shows how little is little\n"
    )
    (info / "entry_points.txt").write_text("[papercore.studies]\ndemo = demo:study\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_reproduce_without_a_name_runs_all(demo, monkeypatch):
    entry = studies()["demo"]
    monkeypatch.setattr("papercore.lab.installed.studies", lambda: {"demo": entry})
    assert app(["reproduce"]) == 0
    assert (demo / "runs" / "demo-quick" / "report.md").exists()


def test_an_unknown_study_is_refused_before_anything_runs(demo, capsys):
    assert app(["reproduce", "demo", "dmeo"]) == 2
    assert "papercore: no installed study 'dmeo': choose from demo" in capsys.readouterr().err
    assert not (demo / "runs").exists()
