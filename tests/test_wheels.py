"""Each package, built as a wheel and installed alone in an empty environment, does what its README says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import SHORT, blocks

ROOT = Path(__file__).parents[1]
UV = os.environ.get("UV") or shutil.which("uv")
SHOWN = {  # by the first command, in the end
    "eclstm": "RMSE",
    "sinkd": "SinKD",
    "peg": "nDCG@10",
    "disco": "knn_20",
    "softclip": "soft_re",
    "dsan": "50 test words",
    "iqa-distill": "50 test images",
    "mmict": "24 test samples",
}


def run(*command, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PAPERCORE_DATA")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for package in ("papercore", *SHORT):
        run(UV, "build", "--package", package, "--wheel", "--out-dir", folder)
    return folder


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Of one environment for all packages, since torch alone takes a while to copy and compile."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    run(UV, "venv", folder)
    return folder / "bin"


@pytest.mark.parametrize("package", SHORT)
def test_a_wheel_installed_alone_runs_its_readme_and_the_first_command(package, wheels, scripts, tmp_path):
    python, module = scripts / "python", package.replace("-", "_")
    core, own = next(wheels.glob("papercore-*.whl")), next(wheels.glob(f"{module}-*.whl"))
    # --exact removes what another package needed.
    run(UV, "pip", "install", "--exact", "--python", python, f"papercore[lab] @ {core.as_uri()}", own)
    installed = run(UV, "pip", "list", "--python", python)
    assert not [other for other in SHORT if other != package and f"\n{other} " in installed]
    assert "train" in run(scripts / package, "--help", cwd=tmp_path)
    assert package in run(scripts / "papercore", "list", cwd=tmp_path)
    words = ["train", *SHORT[package], "--max_steps", "3"]
    examples = blocks(ROOT / "packages" / package / "README.md", "python")
    program = [*examples, f"from {module}.cli import app", f"raise SystemExit(app({words}))"]
    (tmp_path / "readme.py").write_text("\n".join(program))
    assert SHOWN[package] in run(python, "readme.py", cwd=tmp_path)  # one process, since imports take seconds


@pytest.mark.parametrize("package", ["papercore", *SHORT])
def test_a_wheel_carries_licence_and_types(package, wheels):
    import zipfile

    names = zipfile.ZipFile(next(wheels.glob(f"{package.replace('-', '_')}-*.whl"))).namelist()
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("py.typed") for name in names)
    assert not [name for name in names if "/tests/" in name or "/results/" in name]
