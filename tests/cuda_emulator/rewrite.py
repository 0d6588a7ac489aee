"""CUDA sources as C++: launches, shared arrays and the name under which operators register, line by line in place."""

from __future__ import annotations

import re
from pathlib import Path

NAMESPACE = "sslfast_emulated"

_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w: ]+?)\s+(\w+)\[\];")
_STATIC = re.compile(r"(?<!extern )__shared__\s+([^;]+);")
_DECLARATOR = re.compile(r"(.*?)\s*(\w+)\s*((?:\[.*\])?)", flags=re.DOTALL)
_LIBRARY = re.compile(r"STABLE_TORCH_LIBRARY_IMPL\(\s*sslfast\s*,\s*CUDA\s*,")
_OPERATORS = re.compile(r"SSLFAST_REGISTER\(\s*CUDA\s*,([^)]*)\)")


def rewritten(source: Path, text: str) -> str:
    """``text`` of a .cu file or of a header it includes; messages of the compiler and of sanitizers name ``source``.

    Raises:
        ValueError: something is left that C++ cannot say.
    """
    text = without_comments(text)
    text = _DYNAMIC.sub(r"auto* \2 = ::emulator::dynamic_shared<\1>();", text)
    text = _STATIC.sub(lambda match: static_arrays(match[1]), text)
    text = launches(text)
    library = f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU,"
    text = _LIBRARY.sub(library, text)
    text = _OPERATORS.sub(rf"{library} m) {{ SSLFAST_EACH(SSLFAST_IMPL_CUDA,\1) }}", text)
    for left in ("__shared__", "<<<", "asm", "CUDA,"):
        if re.search(rf"(?<!\w){re.escape(left)}(?!\w)", text):
            raise ValueError(f"{source}: {left!r} in a form that the emulator does not know")
    return f'#line 1 "{source}"\n{text}'


def without_comments(text: str) -> str:
    """Comments become blanks, and lines stay where they are; strings are left alone."""

    def blank(match: re.Match[str]) -> str:
        return match[0] if match[0][0] in "\"'" else re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.DOTALL)


def static_arrays(declared: str) -> str:
    """``__shared__ kind a[2][3], b;``: each a reference into the block's memory, owned by a variable of this place."""
    statements, kind = [], ""
    for declarator in split(declared):
        match = _DECLARATOR.fullmatch(declarator.strip())
        if match is None:
            raise ValueError(f"__shared__ {declared}: not understood")
        kind = kind or match[1]
        name, sizes = match[2], match[3]
        statements.append(f"static char {name}_owner; auto& {name} = ::emulator::shared<{kind}{sizes}>(&{name}_owner);")
    return " ".join(statements)


def launches(text: str) -> str:
    """``kernel<...><<<grid, block, shared, stream>>>(arguments)`` everywhere."""
    while (at := text.find("<<<")) >= 0:
        begin = start_of_name(text, at)
        close = text.index(">>>", at)
        opening = text.index("(", close)
        end = closing(text, opening)
        kernel, configuration = text[begin:at].strip(), text[at + 3 : close]
        arguments = text[opening + 1 : end].strip()
        call = (
            f'::emulator::launch("{" ".join(kernel.split())}", ::emulator::configured({configuration}), '
            f"[&](auto&... given) {{ {kernel}(given...); }}{',' if arguments else ''} {arguments})"
        )
        missing = text[begin : end + 1].count("\n") - call.count("\n")
        text = text[:begin] + call + "\n" * missing + text[end + 1 :]
    return text


def start_of_name(text: str, at: int) -> int:
    """Where the kernel's name before ``at`` begins, its template arguments included."""
    begin, depth, inside = len(text[:at].rstrip()), 0, 0  # angles that are open, and brackets
    while depth or text[begin - 1] == ">" or re.match(r"[\w:]", text[begin - 1]):
        begin -= 1
        inside += (text[begin] in ")]}") - (text[begin] in "([{")
        if not inside:
            depth += (text[begin] == ">") - (text[begin] == "<")
    return begin


def closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError("a bracket is not closed")


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]
