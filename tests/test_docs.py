"""The documentation site, without building it: pages, pictures, public names, includes, links and the guides' code."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from papercore.lab.cli import load, parse

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
STUBS = {path.parts[-4]: path for path in ROOT.glob("packages/*/src/*/__init__.pyi")}


spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


def names(path):
    return re.findall(r" as (\w+)$", path.read_text(), flags=re.M)


def identifiers(page):
    return set(re.findall(r"^::: (\S+)$", (DOCS / page).read_text(), flags=re.M))


def in_nav(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for item in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(item)]


def test_nav_lists_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(in_nav(config["nav"])) == PAGES


@pytest.mark.parametrize("name", STUBS)
def test_every_method_has_picture_and_public_names(name):
    page = DOCS / "methods" / f"{name}.md"
    assert f"]({name}.svg)" in page.read_text()
    picture = page.with_suffix(".svg").read_text()
    assert "<text" in picture
    assert len(picture) < 40_000
    package = STUBS[name].parent.name
    assert identifiers(f"methods/{name}.md") == {f"{package}.{public}" for public in names(STUBS[name])}


def test_papercore_page_has_public_names():
    public = names(ROOT / "shared/src/papercore/ops/__init__.py")
    assert identifiers("papercore.md") == {f"papercore.ops.{name}" for name in public}


@pytest.mark.parametrize("page", PAGES)
def test_includes_and_links(page):
    """After inclusion each link leads to a page or a file that the site has."""
    text = hooks.expand((DOCS / page).read_text(), page)
    assert "<!-- include" not in text
    for link in hooks.LINK.finditer(text):
        if link["path"]:
            path = (DOCS / page).parent.joinpath(link["path"]).resolve()
            assert path.exists() or (ROOT / path.relative_to(DOCS)).exists(), link["path"]


def test_section_takes_one_section_and_leads_its_links(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/README.md").write_text(
        "# A\n\ntop\n\n## One\n\n```sh\n# no\n## heading\n```\n\n[r](r.md#x) `a[0](b)`\n\n## Two\n\nend\n"
    )
    assert hooks.section("a/README.md", "top").strip() == "top"
    assert (
        hooks.section("a/README.md", "One") == "## One\n\n```sh\n# no\n## heading\n```\n\n[r](/a/r.md#x) `a[0](b)`\n\n"
    )
    assert hooks.expand("<!-- include a/README.md: Two -->\n", "index.md").strip() == "## Two\n\nend"
    with pytest.raises(ValueError, match="no section 'Three'"):
        hooks.section("a/README.md", "Three")


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("guides/")])
def test_guides_code_parses_and_imports_public_names(page):
    packages = {path.parent.name: names(path) for path in STUBS.values()}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in packages:
                assert {alias.name for alias in node.names} <= set(packages[node.module])


def commands():
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S):
            for line in re.sub(r"\\\n|--config \S+", " ", block).splitlines():
                if found := re.search(r"(?:^|-m |--wrap +\")([a-z_-]+)(?:\.cli)? ((?:train|tune|eval) [^\"]*)", line):
                    yield pytest.param(found[1], found[2].split(), id=found[0])


@pytest.mark.parametrize(("name", "words"), commands())
def test_guides_commands_parse(name, words):
    app = importlib.import_module(f"{name.replace('-', '_')}.cli").app
    parse(load(app.verbs[words[0]][0]), words[1:])
