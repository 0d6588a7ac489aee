"""The package's docstrings as Markdown, for mkdocstrings: sections, reST roles and examples; formulas stay code.

The docstrings have the sections of :data:`SECTIONS`, whose names need not match the signature one by one ("z0, z1: …",
"The others are those of …"); parsers of the Google style drop such lines or warn. So mkdocstrings gets plain Markdown.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object

SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Example": "Example",
    "Raises": "Raises",
    "Returns": "Returns",
    "Shapes": "Shapes",
    "Yields": "Yields",
}
HEADING = re.compile(rf"({'|'.join(SECTIONS)}):\s*$")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): ")
ROLE = re.compile(r":(attr|class|data|exc|func|meth|mod):`~?([\w.]+)`")
LISTED = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def documented(pages: Path) -> dict[str, str]:
    """The last name of everything that the pages list (``::: sslfast.nt_xent``), and its full name."""
    found = [name for page in sorted(pages.glob("*.md")) for name in LISTED.findall(page.read_text("utf-8"))]
    return {name.rpartition(".")[2]: name for name in found}


def markdown(docstring: str, links: Mapping[str, str]) -> str:
    """A docstring, dedented, as Markdown; roles that name one of ``links`` become links, the others code."""

    def link(role: re.Match[str]) -> str:
        name = role[2].rpartition(".")[2]
        return f"[`{name}`][{links[name]}]" if name in links and role[1] != "mod" else f"`{role[2]}`"

    lines = ROLE.sub(link, docstring).splitlines()
    out: list[str] = []
    at = 0
    while at < len(lines):
        heading = HEADING.match(lines[at])
        if heading is None:
            out.append(re.sub(r"^Source: ", "**Source.** ", lines[at]))
            at += 1
            continue
        end = at + 1
        while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
            end += 1
        body = textwrap.dedent("\n".join(lines[at + 1 : end])).strip("\n").splitlines()
        listed = entries(body) if heading[1] in ("Args", "Attributes", "Raises") else body
        out += ["", f"**{SECTIONS[heading[1]]}**", "", *listed, ""]
        at = end
    return "\n".join(fenced(out)).replace("::\n", ":\n")


def entries(body: list[str]) -> list[str]:
    """``name: text`` as a list's items; what is no entry as a paragraph."""
    out: list[str] = []
    in_list = False
    for line in body:
        entry = ENTRY.match(line)
        if entry:
            out += [] if in_list else [""]
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            out.append(f"- {names}: {line[entry.end() :]}")
        elif line.startswith(" "):
            out.append(line)
        else:
            out += [""] if in_list else []
            out.append(line)
        in_list = entry is not None or (in_list and line.startswith(" "))
    return out


def fenced(lines: list[str]) -> list[str]:
    """Examples, from ``>>>`` to the next empty line, between fences."""
    out: list[str] = []
    inside = False
    for line in [*lines, ""]:
        if inside and not line.strip():
            out.append("```")
            inside = False
        elif not inside and line.startswith(">>> "):
            out += ["", "```pycon"]
            inside = True
        out.append(line)
    return out


def functions_over_modules(package: Module) -> None:
    """``pretext.rotation`` is the function that ``pretext`` imports from its module ``rotation``, as for Python.

    Griffe takes the module; its aliases have to be resolved already, since their paths lead through the module.
    """
    inside = [package]
    for module in inside:
        inside += [m for m in module.members.values() if isinstance(m, Module)]
    hidden = {
        m.path: m.members[name]
        for module in inside
        for name, m in module.members.items()
        if isinstance(m, Module) and module.imports.get(name) == f"{m.path}.{name}"
    }
    for module in inside:
        for name, member in list(module.members.items()):
            leads_to = member.target_path if member.is_alias and member.resolved else member.path
            if leads_to in hidden:
                module.members[name] = Alias(name, hidden[leads_to], parent=module)


class AsMarkdown(Extension):
    """Every docstring, once the package is loaded."""

    def __init__(self) -> None:
        self.links = documented(Path(__file__).parent / "api")

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        self.convert(pkg)
        loader.resolve_aliases(implicit=True, external=False)
        functions_over_modules(pkg)

    def convert(self, obj: Object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, self.links)
        for member in obj.members.values():
            if isinstance(member, Object):  # no alias: those lead to objects elsewhere
                self.convert(member)
