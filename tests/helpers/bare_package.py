"""A module of another package without what the package's own ``__init__`` imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

from benchmarks import Unavailable


def bare(module: str) -> Any:
    """``package.module``, below a stand-in for ``package`` that has its path alone.

    Raises:
        Unavailable: the package is not installed.
    """
    name = module.partition(".")[0]
    found = importlib.util.find_spec(name)
    if found is None:
        raise Unavailable(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules[name] = package
    return importlib.import_module(module)
