import subprocess
import sys
from importlib.metadata import entry_points, version

import eclstm
import pytest
from eclstm.cli import app
from papercore.lab.cli import load


def test_overview_lists_every_verb(capsys):
    assert app(["--help"]) == 0
    out = capsys.readouterr().out
    for verb in ("train", "eval", "predict", "tune", "export", "reproduce"):
        assert f"\n  {verb} " in out


def test_version_is_the_distributions(capsys):
    assert app(["--version"]) == 0
    assert capsys.readouterr().out == f"eclstm {version('eclstm')}\n"


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (
            "train",
            ["--data str", "--sequence_length int", "(authors' naive: 5) [5]", "--learning_rate float", "--seed int"],
        ),
        ("eval", ["--model str", "--every_window true|false", "--data str"]),
        ("predict", ["--model str", "--unit str"]),
        ("tune", ["--max_epochs int", "--eta int", "--data str"]),
        ("export", ["--model str"]),
        ("reproduce", ["--scale str", "--seeds int", "--arms str ..."]),
    ],
)
def test_every_verb_explains_its_flags(capsys, verb, flags):
    with pytest.raises(SystemExit) as end:
        app([verb, "--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"usage: eclstm {verb}" in out
    for flag in flags:
        assert flag in out
    assert "--fsdp" not in out


@pytest.mark.parametrize("verb", ["train", "eval", "predict", "tune", "export", "reproduce"])
def test_a_mistyped_flag_ends_in_one_line(capsys, verb):
    assert app([verb, "--modle", "x", "--sede", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eclstm: ")
    assert err.count("\n") == 1


def test_the_study_is_registered():
    (entry,) = entry_points(group="papercore.studies", name="eclstm")
    assert load(app.verbs["reproduce"][0]) == load(entry.value).reproduce


@pytest.mark.parametrize("name", eclstm.__all__)
def test_every_public_name_is_there(name):
    assert getattr(eclstm, name) is not None


def test_importing_the_package_does_not_import_torch():
    program = "import sys, eclstm; print('torch' in sys.modules); eclstm.ECLSTM; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]
