"""Each package, built as a wheel and installed alone in an empty environment, does what its README says first."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV") or shutil.which("uv")
FIRST_COMMANDS = {  # cut short
    "eclstm": (["eclstm", "train", "--max_steps", "3", "--every", "20"], "RMSE"),
    "sinkd": (["sinkd", "train", "--max_steps", "3", "--max_train", "100"], "SinKD"),
    "disco": (["disco", "train", "--max_steps", "3"], "knn_20"),
    "softclip": (["softclip", "train", "--max_steps", "3"], "soft_re"),
    "dsan": (["dsan", "train", "--max_steps", "3", "--max_test", "50"], "50 test words"),
    "iqa-distill": (["iqa-distill", "train", "--max_steps", "3"], "50 test images"),
    "mmict": (["mmict", "train", "--max_steps", "3", "--max_test", "24"], "24 test samples"),
    "peg": (["peg", "train", "--max_steps", "3"], "nDCG@10"),
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


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Of one environment for all packages, since torch alone takes a while to copy and compile."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    run(UV, "venv", folder)
    return folder / "bin"


@pytest.mark.parametrize("package", FIRST_COMMANDS)
def test_a_wheel_installed_alone_runs_the_first_command(package, wheels, scripts, tmp_path):
    python = scripts / "python"
    core, own = next(wheels.glob("papercore-*.whl")), next(wheels.glob(f"{package.replace('-', '_')}-*.whl"))
    # --exact removes what another package needed.
    run(UV, "pip", "install", "--exact", "--python", python, f"papercore[lab] @ {core.as_uri()}", own)
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
