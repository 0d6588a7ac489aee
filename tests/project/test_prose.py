"""Prose in Markdown is filled to 100 columns by ``tools/prose.py``, and stays the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose

LONG = "word " * 30

EXEMPT = {
    "a fence": f"```python\n# {LONG}\n```\n",
    "indented code": f"Text:\n\n    {LONG}\n",
    "a table": f"| {LONG} |\n|---|\n| {LONG} |\n",
    "a heading": f"# {LONG}\n",
    "a comment": f"<!-- setup\n{LONG}\n-->\n",
    "a link with nothing beside it": f"- [name]({'x' * 120})\n",
    "one word": "x" * 120 + "\n",
}


@pytest.mark.parametrize("text", EXEMPT.values(), ids=EXEMPT)
def test_what_may_be_longer(text: str) -> None:
    assert prose.too_long(text) == []
    assert prose.rewritten(text) == text


@pytest.mark.parametrize("text", [LONG, f"- {LONG}", f"12. {LONG}", f"- a\n  - {LONG}", f"```\n```\n\n{LONG}"])
def test_prose_is_found_and_filled(text: str) -> None:
    assert len(prose.too_long(text)) == 1
    filled = prose.rewritten(text)
    assert prose.too_long(filled) == [] and max(map(len, filled.splitlines())) <= prose.WIDTH
    assert filled.split() == text.split() and prose.rewritten(filled) == filled


def test_code_is_not_divided_and_no_line_becomes_a_list() -> None:
    text = "x" * 90 + " `a b c d e f g h` y - z 1. w #7 v\n"
    assert prose.rewritten(text) == "x" * 90 + "\n`a b c d e f g h` y - z 1. w #7 v\n"
    for sign in ("-", "+", "*", "1.", "#7", ">", "|", "="):
        lines = prose.rewritten("x" * 98 + f" {sign} y\n").splitlines()
        assert not any(line.startswith(sign) for line in lines), sign


def test_the_command_names_lines_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{LONG}\n")
    assert prose.main([str(page)]) == 1
    assert f"{page}:3: " in capsys.readouterr().out
    assert prose.main(["--write", str(page)]) == 0 and prose.main([str(page)]) == 0
