"""The rules of ARCHITECTURE.md that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {p.name: p for p in [*(ROOT / "packages").glob("*/src/*"), ROOT / "shared/src/papercore"]}
METHODS = sorted(SOURCES.keys() - {"papercore"})


def imported(path):
    """Top-level names a file imports, anywhere in it."""
    tree = ast.parse(path.read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    ]
    return names


@pytest.mark.parametrize("name", SOURCES)
def test_no_package_imports_another(name):
    others = {other for other in METHODS if other != name}
    for path in SOURCES[name].rglob("*.py"):
        assert not others & {module.split(".")[0] for module in imported(path)}, path


def test_ops_need_torch_alone():
    for path in (SOURCES["papercore"] / "ops").glob("*.py"):
        assert not [
            m for m in imported(path) if m.startswith(("papercore.lab", "transformers", "scipy", "matplotlib"))
        ], path


@pytest.mark.parametrize("name", METHODS)
def test_what_people_copy_reads_no_files_and_parses_no_flags(name):
    for path in (SOURCES[name] / f for f in ("loss.py", "cell.py", "model.py")):
        if path.exists():
            assert not [m for m in imported(path) if m.startswith("papercore.lab")], path
            assert not re.search(r"\b(open|print)\(", path.read_text()), path


def code_lines(path):
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text()
    prose = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(text.splitlines(), 1)
    return sum(n not in prose and bool(line.strip()) and not line.lstrip().startswith("#") for n, line in lines)


def test_papercore_stays_thin():
    assert sum(map(code_lines, SOURCES["papercore"].rglob("*.py"))) <= 2000


@pytest.mark.parametrize(
    "path", [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "runs" not in p.parts], ids=str
)
def test_nothing_unpickles(path):
    if path == Path(__file__):
        return
    text = path.read_text()
    assert not re.search(r"pickle\.load|yaml\.load\(|weights_only=False|allow_pickle=True|extractall", text)
