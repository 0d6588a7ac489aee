"""Calls that many losses have in common."""

from __future__ import annotations

from typing import Any

from .inputs import Case, Inputs


def of_module(kind: Any, *options: Any, **named: Any) -> Case:
    """A module of two matrices."""
    return lambda x: x.made(lambda: kind(*options, **named))(x.z(), x.z())


def of_function(function: Any, **named: Any) -> Case:
    return lambda x: function(x.z(), x.z(), **named)


def of_mixed(function: Any, *options: Any) -> Case:
    """Of two dtypes, as an autocast region makes them."""

    def call(x: Inputs) -> Any:
        with x.autocast():
            return function(x.z(), x.z().float(), *options)

    return call
