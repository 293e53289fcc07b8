"""What the READMEs show, works: their Python runs, their commands parse, the files they link exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from papercore.lab.cli import load, parse

ROOT = Path(__file__).parents[1]
PAGES = [
    p for g in ("*.md", "*/README.md", "packages/*/README.md") for p in ROOT.glob(g) if p.name != "CONTRIBUTING.md"
]
SCRIPTS = {
    "papercore": "papercore.lab.__main__",
    "eclstm": "eclstm.cli",
    "sinkd": "sinkd.cli",
    "peg": "peg.cli",
    "disco": "disco.cli",
    "softclip": "softclip.cli",
    "softclip-train": "softclip.open_clip_run",
    "dsan": "dsan.cli",
    "iqa-distill": "iqa_distill.cli",
    "mmict": "mmict.cli",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "readme"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


def commands():
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    if word in SCRIPTS and (i == 0 or words[i - 1] in ("run", "&&") or "=" in words[i - 1]):
                        yield pytest.param(word, words[i + 1 :], id=f"{page.parent.name}: {line.strip()}")


@pytest.mark.parametrize(("script", "words"), commands())
def test_commands_parse(script, words):
    module = importlib.import_module(SCRIPTS[script])
    if script == "softclip-train":  # its flags are open_clip's, but for our own
        _, rest = module.parse(words)
        module.open_clip_program().parse_args(rest)
    elif words:
        target, _ = module.app.verbs[words[0]]
        parse(load(target), [w for w in words[1:] if not w.startswith("[") and w != "...]"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
