"""Prose in Markdown stands in lines of at most 100 columns; code, tables, headings and comments may be longer.

python -m tools.prose                  names every line that is too long; of all pages, or of the files named
python -m tools.prose --write [FILE…]  fills the paragraphs anew
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100
FENCE = re.compile(r"\s*(```+|~~~+)")
ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
# Not to be filled: tables, headings, raw HTML, directives of mkdocstrings, definitions of links.
FIXED = re.compile(r"\s*(?:\||#{1,6} |<|:::|\[[^\]]+\]: |!\[[^\]]*\]\([^)]*\)$)")
CODE = re.compile(r"(`+).+?(?<!`)\1(?!`)")
GAP = "\0"  # in place of a space at which no line may end
# A line that begins with one of these would be a list, a heading or a quotation.
NO_FIRST = re.compile(r"(?:[-+*=~]+|\d+[.)]|[|>#].*)$")


def blocks(lines: Sequence[str]) -> Iterator[tuple[bool, list[tuple[int, str]]]]:
    """Runs of numbered lines: (prose?, lines). An item of a list is a run of its own; code and tables are not prose."""
    run: list[tuple[int, str]] = []
    closing = ""  # what ends the fence or the comment that is open
    after_item = False
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if closing:
            yield False, [(number, line)]
            if closing == "-->" and "-->" in line or fence is not None and fence[1] == closing:
                closing = ""
            continue
        indented = line.startswith("    ") and not run and not (after_item and ITEM.match(line))
        prose = bool(line.strip()) and not fence and not FIXED.match(line) and not indented
        if run and (not prose or ITEM.match(line)):
            yield True, run
            run = []
        if prose:
            after_item = bool(ITEM.match(line)) or (after_item and bool(run))
            run.append((number, line))
            continue
        if line.strip() and not line.startswith(" "):
            after_item = False
        if fence:
            closing = fence[1]
        elif line.lstrip().startswith("<!--") and "-->" not in line:
            closing = "-->"
        yield False, [(number, line)]
    if run:
        yield True, run


def words(text: str) -> list[str]:
    """The words of a paragraph; code between backticks is one, and what may not begin a line joins its neighbour."""
    found: list[str] = []
    for word in CODE.sub(lambda code: code[0].replace(" ", GAP), text).split():
        if found and NO_FIRST.match(word):
            found[-1] += GAP + word
        else:
            found.append(word)
    return found


def filled(run: Sequence[str]) -> list[str]:
    """A paragraph or an item of a list in lines of ``WIDTH`` columns."""
    item = ITEM.match(run[0])
    first = item[0] if item else run[0][: len(run[0]) - len(run[0].lstrip())]
    rest = " " * len(first)
    lines, line, empty = [], first, True
    for word in words(" ".join(line.strip() for line in [run[0][len(first) :], *run[1:]])):
        if not empty and len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line, empty = rest, True
        line += word if empty else f" {word}"
        empty = False
    return [text.replace(GAP, " ") for text in [*lines, line]]


def too_long(text: str) -> list[tuple[int, str]]:
    """Lines of prose over ``WIDTH`` columns that could end earlier."""
    found = []
    for prose, run in blocks(text.splitlines()):
        for number, line in run if prose else ():
            body = line[ITEM.match(line).end() :] if ITEM.match(line) else line  # type: ignore[union-attr]
            if len(line) > WIDTH and len(words(body)) > 1:
                found.append((number, line))
    return found


def rewritten(text: str) -> str:
    """``text`` with every paragraph filled anew; one whose lines end in two spaces or a backslash stays."""
    lines: list[str] = []
    for prose, run in blocks(text.splitlines()):
        plain = [line for _, line in run]
        broken = any(line.endswith(("  ", "\\")) for line in plain[:-1])
        lines += filled(plain) if prose and not broken else plain
    return "\n".join(lines) + "\n"


def pages() -> list[Path]:
    """Every Markdown file of the repository, but for what was built or installed."""

    def made(path: Path) -> bool:
        return any(part.startswith(".") or part in ("build", "dist", "out") for part in path.relative_to(ROOT).parts)

    return sorted(path for path in ROOT.rglob("*.md") if not made(path))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.prose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all Markdown of the repository")
    parser.add_argument("--write", action="store_true", help="fill the paragraphs anew")
    options = parser.parse_args(arguments)
    faults = 0
    for page in options.files or pages():
        text = page.read_text("utf-8")
        if options.write and rewritten(text) != text:
            page.write_text(rewritten(text), "utf-8")
        for number, line in too_long(page.read_text("utf-8")):
            print(f"{page}:{number}: {len(line)} columns of prose, more than {WIDTH}")
            faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
