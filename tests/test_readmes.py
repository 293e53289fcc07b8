"""What the READMEs show, works: their Python runs, their commands parse, what they link exists. The packages' are alike."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from commands import blocks
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
# The template of a package's README; * marks what not every package has.
SECTIONS = [
    "In your own code",
    "On your own data",
    "Results",
    "What to know",
    "*Beside other programs",
    "What the sources do not tell",
    "*Limits",
    "Citation",
]


def headings(page):
    """Level and text of each."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"^(#+) (.*)", prose, flags=re.M)


def anchors(page):
    """As GitHub and the site make them."""
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in headings(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "readme"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


def commands():
    modules = {module: script for script, module in SCRIPTS.items()}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    before, script = words[i - 1] if i else "&&", modules.get(word, word)
                    if script in SCRIPTS and (before in ("run", "&&", "-m") or "=" in before):
                        yield pytest.param(script, words[i + 1 :], id=f"{page.parent.name}: {line.strip()}")


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
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" not in target:
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("packages/*/README.md")), ids=lambda p: p.parent.name)
def test_package_readmes_are_alike(page):
    text, name = page.read_text(), page.parent.name
    here = [heading for level, heading in headings(page) if level == "##"]
    assert here == [section.strip("*") for section in SECTIONS if section[0] != "*" or section[1:] in here]
    top, rest = text.split("\n## In your own code\n")
    assert f"uv run {name} train" in top
    assert re.search(rf'`pip install ./shared "?./packages/{name}[`[]', top)
    assert len(text.split("\n## Results\n")[0].splitlines()) <= 110  # two screens
    assert f"uv run torchrun --nproc-per-node 2 -m {SCRIPTS[name]} train" in rest
