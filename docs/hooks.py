"""What the site takes from the repository: sections of its Markdown, its reports and plots.

A line ``<!-- include README.md -->`` in a page, with a path from the repository's root, is replaced by that file without its
title; ``README.md: Results`` is one section of it, ``README.md: top`` what stands before the first section, and ``README.md:
sections`` the rest.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"^<!-- include ([^:\n]+)(?:: (.+))? -->$", re.M)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
# The target of a link, or code, which has none.
LINK = re.compile(
    rf"{FENCE.pattern}|`[^`]*`|(?<=\]\()(?![a-z]+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))", re.M | re.S
)


def relink(text: str, change: Callable[[str], str]) -> str:
    """``text``, where the paths of links are changed."""
    return LINK.sub(lambda m: change(m["path"]) + (m["anchor"] or "") if m["path"] else m[0], text)


def section(path: str, name: str | None = None) -> str:
    """A part of a Markdown file of the repository, its links rewritten to be paths from the root, with a leading slash.

    Raises:
        ValueError: if there is no such section.
    """
    _, text = re.split(r"^# .*\n", (ROOT / path).read_text(), maxsplit=1, flags=re.M)
    text = FENCE.sub(lambda m: m[0].replace("\n#", "\n\0#"), text)  # a comment in a block is no heading
    top, *rest = re.split(r"^(?=## )", text, flags=re.M)
    chosen = {None: text, "top": top, "sections": "".join(rest)} | {s.split("\n")[0][3:]: s for s in rest}
    if name not in chosen:
        raise ValueError(f"{path} has no section {name!r}")
    folder = posixpath.dirname(path)
    return relink(
        chosen[name].replace("\0", ""), lambda target: "/" + posixpath.normpath(posixpath.join(folder, target))
    )


def place(path: str) -> str:
    """Where the site has a file of the repository, given by its path from the root; a folder stands for the nearest README.

    >>> place("packages/eclstm"), place("packages/eclstm/results/small/report.md"), place("docs/index.md")
    ('methods/eclstm.md', 'packages/eclstm/results/small/report.md', 'index.md')
    """
    while (ROOT / path).is_dir():
        path = f"{path}/README.md" if (ROOT / path / "README.md").exists() else posixpath.dirname(path)
    pages = {"README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "guides/add-a-method.md"}
    path = re.sub(r"^packages/([^/]+)/README\.md$", r"methods/\1.md", path)
    return pages.get(path, path.removeprefix("docs/"))


def expand(markdown: str, page: str) -> str:
    """The Markdown of a page of the site: parts included, links to files of the repository led to their places."""
    folder = posixpath.dirname(page)
    # Pages that are files of the repository themselves link as they do there.
    own = folder if page.startswith("packages/") else posixpath.join("docs", folder)

    def lead(target: str) -> str:
        target = target[1:] if target.startswith("/") else posixpath.normpath(posixpath.join(own, target))
        return posixpath.relpath(place(target), folder or ".")

    return relink(INCLUDE.sub(lambda m: section(m[1], m[2]), markdown), lead)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    return expand(markdown, page.file.src_uri)


def on_files(files: Files, *, config: Any) -> Files:
    """Reports, plots and sources that are linked, at the paths that they have in the repository."""
    from mkdocs.structure.files import File

    for pattern in ("results/**/*", "benchmarks/*", "src/*/*"):
        for path in sorted(ROOT.glob(f"packages/*/{pattern}")):
            if path.suffix in (".md", ".png", ".json", ".jsonl", ".py"):
                name = str(path.relative_to(ROOT))
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
