"""CUDA kernels on the CPU: ``csrc/cuda/*.cu`` compiled by g++, threads as fibres in any order (``emulator.h``).

    with Emulated("random", seed=1) as kernels:
        sslfast.l2_normalize(x)  # a tensor on the CPU
    assert kernels.calls["l2_normalize"]

What it does not see: instructions that only nvcc makes (``__CUDA_ARCH__``, products and sums as one operation),
registers, coalescing, and how warps run at the same time.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sslfast  # noqa: F401  (whose schemas the operators have)
from cuda_cases import Case, difference, same_bits

from .build import HERE, ROOT, SANITIZERS, build, compiler
from .rewrite import NAMESPACE

__all__ = ["ORDERS", "SANITIZERS", "Emulated", "build", "compiler", "fault_of", "load", "operators", "selftest"]

ORDERS = ("forward", "reverse", "random")
LIBRARY = "SSLFAST_EMULATED"  # environment variable: a library that is built already, such as one with a sanitizer

_defined: list[torch.library.Library] = []  # schemas last as long as these objects


@functools.cache
def operators() -> frozenset[str]:
    """The names that the CUDA sources register."""
    return frozenset(name for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for name in registered(path))


def registered(path: Path) -> list[str]:
    text = path.read_text()
    listed = re.findall(r"SSLFAST_REGISTER\(\s*CUDA\s*,([^)]*)\)", text)
    return re.findall(r"\w+", " ".join(listed)) + re.findall(r'\bm\.impl\(\s*"(\w+)"', text)


@functools.cache
def load() -> ctypes.CDLL:
    """Builds and loads the library; its operators are those of ``torch.ops.sslfast_emulated``."""
    path = os.environ.get(LIBRARY) or str(build())
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in sorted(operators()):
        library.define(str(getattr(torch.ops.sslfast, name).default._schema).partition("::")[2])
    for name in registered(HERE / "selftest.cu"):
        library.define(f"{name}(Tensor x) -> Tensor")
    _defined.append(library)
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


class Emulated(TorchDispatchMode):
    """While it is entered, CUDA kernels serve the operators of ``sslfast`` on CPU tensors.

    Args:
        order: in which blocks, and the threads of a block between two barriers, run: one of ``ORDERS``.
        seed: of a random order.

    Attributes:
        calls: how often each operator was called.
    """

    def __init__(self, order: str = "forward", seed: int = 0) -> None:
        super().__init__()
        self.order, self.seed = ORDERS.index(order), seed
        self.calls: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Emulated:
        load().emulator_set_order(self.order, ctypes.c_uint(self.seed))
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "sslfast" and name in operators():
            self.calls[name] += 1
            func = getattr(getattr(torch.ops, NAMESPACE), name).default
        return func(*args, **(kwargs or {}))


# Order and seed: of the run that is compared with the CPU, and of those that must give its bits.
RUNS = (("forward", 0), ("random", 1), ("reverse", 0), ("random", 2), ("random", 3))


def fault_of(case: Case, runs: int = len(RUNS)) -> str | None:
    """What is wrong with a case's results in the first ``runs`` of ``RUNS``, or ``None``."""
    expected, call = case.run("cpu"), case.prepare("cpu")
    with Emulated(*RUNS[0]) as kernels:
        first = call()
    if set(kernels.calls) != set(case.operators):
        return f"the operators called are {', '.join(sorted(kernels.calls))}"
    if wrong := difference(case, first, expected):
        return wrong
    for order, seed in RUNS[1:runs]:
        with Emulated(order, seed):
            if not same_bits(call(), first):
                return f"other bits in {order} order, seed {seed}"
    return None


def selftest(name: str, x: torch.Tensor, order: str = "forward", seed: int = 0) -> torch.Tensor:
    """A kernel of ``selftest.cu``."""
    load().emulator_set_order(ORDERS.index(order), ctypes.c_uint(seed))
    result: torch.Tensor = getattr(getattr(torch.ops, NAMESPACE), f"selftest_{name}")(x)
    return result
