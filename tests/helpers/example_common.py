"""What the tests of the examples share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def numbers(content: Any) -> Iterator[float]:
    """All numbers of what was read from a JSON file, at any depth."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from numbers(each)
    elif isinstance(content, (int, float)):
        yield content
