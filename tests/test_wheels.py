"""Each package, built as a wheel and installed alone in an empty environment, does what its README says first."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV") or shutil.which("uv")
FIRST_COMMANDS = {
    "eclstm": (["eclstm", "train", "--num_train_epochs", "1", "--every", "4"], "RMSE"),
    "sinkd": (["sinkd", "train", "--num_train_epochs", "1", "--max_train", "200"], "SinKD"),
    "disco": (["disco", "train", "--num_train_epochs", "1"], "knn_20"),
    "softclip": (["softclip", "train", "--num_train_epochs", "1"], "soft_re"),
    "dsan": (["dsan", "train", "--num_train_epochs", "1", "--max_train", "1000"], "500 test words"),
    "peg": (["peg", "train", "--num_train_epochs", "1"], "nDCG@10"),
}


def run(*command, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PAPERCORE_DATA")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for package in ("papercore", *FIRST_COMMANDS):
        run(UV, "build", "--package", package, "--wheel", "--out-dir", folder)
    return folder


@pytest.mark.parametrize("package", FIRST_COMMANDS)
def test_a_wheel_installed_alone_runs_the_first_command(package, wheels, tmp_path):
    run(UV, "venv", tmp_path / "venv")
    python, scripts = tmp_path / "venv/bin/python", tmp_path / "venv/bin"
    core, own = next(wheels.glob("papercore-*.whl")), next(wheels.glob(f"{package.replace('-', '_')}-*.whl"))
    run(UV, "pip", "install", "--python", python, f"papercore[lab] @ {core.as_uri()}", own)
    installed = run(UV, "pip", "list", "--python", python)
    assert not [other for other in FIRST_COMMANDS if other != package and f"\n{other} " in installed]
    (verb, *flags), shown = FIRST_COMMANDS[package]
    assert shown in run(scripts / verb, *flags, cwd=tmp_path)
    assert package in run(scripts / "papercore", "list", cwd=tmp_path)


@pytest.mark.parametrize("package", ["papercore", *FIRST_COMMANDS])
def test_a_wheel_carries_licence_and_types(package, wheels):
    import zipfile

    names = zipfile.ZipFile(next(wheels.glob(f"{package.replace('-', '_')}-*.whl"))).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("py.typed") for name in names)
    assert not [name for name in names if "/tests/" in name or "/results/" in name]
