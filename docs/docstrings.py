"""Docstrings for mkdocstrings: what they have of Sphinx's markup as Markdown, and the help of flags as docstrings of fields."""

from __future__ import annotations

import ast
import re
import textwrap
from contextlib import suppress
from typing import Any

from griffe import Attribute, Docstring, ExprCall, ExprKeyword, Extension, NameResolutionError, Object


def markdown(text: str, obj: Object) -> str:
    r"""A docstring's text with equations for l2m4m, references for autorefs, tables and examples as code.

    >>> from griffe import Module
    >>> print(markdown(".. math:: a\n    + b\n\nSee :func:`f`, :math:`\{x\}` and <P, D>.\n\nExample:\n    ...", Module("m")))
    $$
    a
    + b
    $$
    <BLANKLINE>
    See <autoref optional identifier="f"><code>f</code></autoref>, $\lbrace x\rbrace $ and &lt;P, D>.
    <BLANKLINE>
    Examples:
        ...
    """

    def equation(match: re.Match[str]) -> str:
        lines = "\n".join(line.strip() for line in match[1].strip().splitlines()).replace(r"\|", "‖")
        return f"\n$$\n\\begin{{align*}}\n{lines}\n\\end{{align*}}\n$$\n" if "&" in lines else f"\n$$\n{lines}\n$$\n"

    def reference(match: re.Match[str]) -> str:
        name = match[1].removeprefix("~")
        try:
            target = obj.resolve(name.removesuffix("()"))
        except NameResolutionError:
            target = name
        return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'

    text = re.sub(r"^\.\. math::((?:.*\n)(?: +.*\n)*)", equation, text + "\n", flags=re.M)
    # Markdown would take the backslash of an escaped bracket or bar, and what looks like a tag for one.
    words = {r"\{": r"\lbrace ", r"\}": r"\rbrace ", r"\|": "‖"}
    text = re.sub(r":math:`([^`]*)`", lambda m: "$" + re.sub(r"\\[{}|]", lambda c: words[c[0]], m[1]) + "$", text)
    code = r"`+[^`]*`+|\$+[^$]*\$+|^ *>>>.*$"
    text = re.sub(rf"{code}|<(?=\w)", lambda m: "&lt;" if m[0] == "<" else m[0], text, flags=re.M)
    text = re.sub(r":[a-z]+:`([^`]*)`", reference, text)
    text = re.sub(r"^=+ +=(?:.*\n)+?(?=\n)", r"```text\n\g<0>```\n", text, flags=re.M)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    bare = re.compile(r"^>>> (?:.*\n)+?(?=\n|\Z)", re.M)
    return bare.sub(lambda m: "Examples:\n" + textwrap.indent(m[0], "    "), text).strip()


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj)

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """``name: float = flag("what it is", 0.9)`` is a field with that docstring and that default."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "flag":
            help_text, *rest = attr.value.arguments
            with suppress(ValueError):  # if it is computed
                attr.docstring = Docstring(ast.literal_eval(str(help_text)), parent=attr)
            attr.value = next((value for value in rest if not isinstance(value, ExprKeyword)), None)
