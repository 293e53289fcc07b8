"""What all command lines have in common."""

import importlib
import signal
import subprocess
import sys

import pytest
from commands import SHORT

APPS = {
    "papercore": "papercore.lab.__main__",
    "eclstm": "eclstm.cli",
    "sinkd": "sinkd.cli",
    "peg": "peg.cli",
    "disco": "disco.cli",
    "softclip": "softclip.cli",
    "dsan": "dsan.cli",
    "iqa-distill": "iqa_distill.cli",
    "mmict": "mmict.cli",
}
METHODS = [name for name in APPS if name != "papercore"]


def app(name):
    return importlib.import_module(APPS[name]).app


@pytest.mark.parametrize("name", APPS)
def test_help_imports_nothing_heavy(name):
    code = f"import sys; from {APPS[name]} import app; app(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not {"torch", "transformers"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", APPS)
def test_every_verb_has_help_and_loads(name, capsys):
    for verb in app(name).verbs:
        with pytest.raises(SystemExit) as stop:
            app(name)([verb, "--help"])
        assert stop.value.code == 0
        assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", APPS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "no verb 'tarin'"),
        (["reproduce", "--sacle", "quick"], "did you mean '--scale'"),
        (["reproduce", "--scale", "x"], "'x'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(name, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert app(name)(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_file_is_named(name, capsys):
    assert app(name)(["eval", "--model", "no/such/folder"]) == 2
    assert "no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_ctrl_c_says_how_to_go_on(name, launch, tmp_path):
    words = ["train", *SHORT[name], "--output_dir", tmp_path / "run"]
    sooner = {  # a first checkpoint
        "dsan": ["--data", "none", "--synthetic", 300, "--validation", 20],  # than with all words of the sample
        "iqa-distill": ["--arm", "base"],
        "mmict": ["--max_steps", 20],  # halfway through the making of its encoder
    }
    words += sooner.get(name, [])
    if name != "eclstm":  # which keeps its best epoch, and so saves by the epoch
        words += ["--save_strategy", "steps", "--save_steps", 1]
    code, error = launch(APPS[name], words).wait_for(tmp_path / "run", "checkpoint-*").end(signal.SIGINT)
    assert code == 130
    assert "the same command goes on" in error.splitlines()[-1]
    assert "Traceback" not in error
