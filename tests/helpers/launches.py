"""What a step would launch on a GPU, counted on a machine without one.

A launch costs a CPU about 20 µs of a Triton kernel and 6 µs of one of PyTorch's operators, whatever it computes: on
small batches that is what a step costs. The Triton launchers run as they would on a GPU, but for the kernels
themselves.
"""

from __future__ import annotations

import collections
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import sslfast.kernels

# Seconds of a launch, of one Triton kernel and of one operator.
TRITON, OPERATOR = 20e-6, 6e-6
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}

_running: list[Launches] = []


class Launches(TorchDispatchMode):
    """Counts by name, while it is the innermost mode. Views and allocations launch nothing.

    Attributes:
        triton: Triton kernels.
        operators: PyTorch's operators, products among them, and those of sslfast that are not made of Triton kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.triton: collections.Counter[str] = collections.Counter()
        self.operators: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "sslfast" and "triton" in name:
            with self:  # what the launcher does counts
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        if name not in ALLOCATIONS and not func.is_view and name not in ("detach", "alias", "_unsafe_view"):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        _running.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _running.pop()

    @property
    def seconds(self) -> float:
        """What they cost a CPU, by the predictions above."""
        return self.triton.total() * TRITON + self.operators.total() * OPERATOR


def _count_instead(executor: Any, *_: Any, **__: Any) -> None:
    _running[-1].triton[executor.fn.__name__] += 1


def _count_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """In place of a product of 16-bit numbers with a float32 result, which a CPU does not have."""
    _running[-1].operators["bmm"] += 1
    with _disable_current_modes():
        shape = (*left.shape[:2], right.shape[2])
        return left.new_empty(shape, dtype=torch.float32) if out is None else out


def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton launchers choose as on a GPU of compute capability 9.0, and their kernels are counted and not run."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", _count_instead)
    names = [module.name for module in pkgutil.iter_modules(sslfast.kernels.__path__)]
    # All before the first is changed: one imported later would keep what it imports from it.
    for kernels in [importlib.import_module(f"sslfast.kernels.{name}") for name in names]:
        for name, value in (("architecture", 90), ("upcast", False)):
            if hasattr(kernels, name):
                monkeypatch.setattr(kernels, name, lambda _, value=value: value)
    monkeypatch.setattr(importlib.import_module("sslfast.kernels.second_moment"), "multiply", _count_product)
