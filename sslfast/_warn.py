"""Warnings that name the user's line, however many frames of PyTorch's and sslfast's lie between."""

from __future__ import annotations

import sys
import warnings


def warn_user(message: str, *packages: str) -> None:
    """Warn with the file and line of the innermost frame that is neither PyTorch's nor sslfast's.

    Args:
        packages: further top-level packages whose frames are not the user's.
    """
    skipped = {"torch", "sslfast", *packages}
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in skipped:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
