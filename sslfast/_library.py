"""The operator library ``torch.ops.sslfast``.

Schemas are defined here, from Python, so that fake kernels and autograd formulas exist without any binary; the compiled
libraries and the Triton launchers only add implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIB = torch.library.Library("sslfast", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Define ``sslfast::<schema>`` with its fake kernel (shapes, dtypes and devices, no data)."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"sslfast::{schema.split('(')[0]}", fake, lib=LIB)


def implement(name: str, function: Callable[..., Any], *dispatch_keys: str) -> None:
    """Register a Python implementation (a Triton launcher) of ``sslfast::<name>``."""
    for key in dispatch_keys:
        LIB.impl(name, function, key)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd formula of ``sslfast::<name>``."""
    torch.library.register_autograd(f"sslfast::{name}", backward, setup_context=setup_context, lib=LIB)
