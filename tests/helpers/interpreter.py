"""Triton's interpreter made strict, for every launch of the test run: what it is silent about is an error.

It runs the programs of a launch one after the other, on a GPU they run at the same time. Here they run in random order,
and every address is recorded: a launch raises :class:`Race` where its result could depend on the order of its programs,
or of the threads of one. Products are exact. Memory that nobody has written holds NaN.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import torch

Addresses = np.ndarray[Any, np.dtype[np.uint64]]


class Race(AssertionError):
    """A launch whose result depends on an order that a GPU does not keep."""


class Launch:
    """One launch: the order of its programs, and the addresses of elements that each has read and written so far."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.grid = (0, 0, 0)
        self._order: Iterator[int] = iter(())
        self._program = -1
        self._reads: list[tuple[int, Addresses]] = []
        self._writes: list[tuple[int, Addresses]] = []

    def start(self, grid: tuple[int, int, int], random: Random) -> None:
        self.grid, programs = grid, math.prod(grid)
        self._order = iter(random.sample(range(programs), programs))

    def next_program(self) -> tuple[int, int, int]:
        self._program = next(self._order)
        _, ny, nz = self.grid
        return self._program // (ny * nz), self._program // nz % ny, self._program % nz

    def read(self, addresses: Addresses) -> None:
        for program, written in reversed(self._writes):
            if program != self._program:
                break
            if np.isin(addresses, written).any():
                raise Race(f"{self}: program {program} reads what it has written, from another thread perhaps")
        self._reads.append((self._program, addresses))

    def write(self, addresses: Addresses) -> None:
        if len(np.unique(addresses)) != len(addresses):
            raise Race(f"{self}: program {self._program} writes one address twice in one store")
        self._writes.append((self._program, addresses))

    def check(self) -> None:
        """After the last program."""
        if not self._writes:
            return
        written, writer = _sorted(self._writes)
        same = written[1:] == written[:-1]
        if (same & (writer[1:] != writer[:-1])).any():
            at = np.flatnonzero(same & (writer[1:] != writer[:-1]))[0]
            raise Race(f"{self}: programs {writer[at]} and {writer[at + 1]} write one address")
        for reader, addresses in self._reads:
            at = np.minimum(np.searchsorted(written, addresses), len(written) - 1)
            found = (written[at] == addresses) & (writer[at] != reader)
            if found.any():
                raise Race(f"{self}: program {reader} reads what program {writer[at[found]][0]} writes")

    def __str__(self) -> str:
        return f"{self.kernel}{list(self.grid)}"


def _sorted(accesses: list[tuple[int, Addresses]]) -> tuple[Addresses, np.ndarray[Any, np.dtype[np.int64]]]:
    """All addresses, in order, and the program of each."""
    addresses = np.concatenate([a for _, a in accesses])
    programs = np.repeat([program for program, _ in accesses], [len(a) for _, a in accesses])
    order = np.argsort(addresses, kind="stable")
    return addresses[order], programs[order]


_launch: Launch | None = None
_patched: set[frozenset[int]] = set()  # the sets of Triton's modules that have been patched for the launch
_scope: Callable[[], Any] = type(None)  # what the interpreter takes its patches back by
_random = Random(0)


def seed(value: str) -> None:
    """The orders of the launches that follow."""
    _random.seed(value)


@functools.cache
def hasten() -> None:
    """A launch patches Triton's language once, not at every call of a device function: half of the time."""
    from triton.runtime import interpreter

    patch, modules_of = interpreter._patch_lang, functools.cache(_modules_of)

    def patch_lang(fn: Any) -> Any:
        global _scope
        modules = modules_of(fn)
        if modules in _patched:
            return _scope()
        made = patch(fn)
        _scope = type(made)
        _patched.add(modules)
        return made

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        try:
            run(self, *args, **kwargs)
        finally:
            _patched.clear()

    run = interpreter.GridExecutor.__call__
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
    numpy_type = interpreter._get_np_dtype  # which makes a table in every call
    of_scalar, pointer = functools.cache(numpy_type), interpreter.tl.pointer_type
    interpreter._get_np_dtype = lambda t: (numpy_type if isinstance(t.scalar, pointer) else of_scalar)(t.scalar)


def install() -> None:
    """For the rest of this process."""
    from triton.runtime import interpreter

    hasten()
    _run_in_any_order(interpreter)
    _record_addresses(interpreter.InterpreterBuilder)
    _multiply_exactly(interpreter)


def _modules_of(fn: Any) -> frozenset[int]:
    """Of Triton, among the names that a function sees."""
    seen = (value for value in fn.__globals__.values() if inspect.ismodule(value))
    return frozenset(id(module) for module in seen if module.__name__.partition(".")[0] == "triton")


def _run_in_any_order(interpreter: Any) -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, set_grid, set_program = executor.__call__, builder.set_grid_dim, builder.set_grid_idx

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        _launch = Launch(self.fn.__name__)
        try:
            run(self, *args, **kwargs)
            _launch.check()
        except interpreter.InterpreterError as error:  # which has only the text of what was raised in a program
            if isinstance(error.__cause__, Race):
                raise error.__cause__ from None
            raise
        finally:
            _launch = None

    def set_grid_dim(self: Any, *grid: int) -> None:
        _launch.start(grid, _random)
        set_grid(self, *grid)

    def set_grid_idx(self: Any, *_: int) -> None:
        set_program(self, *_launch.next_program())

    executor.__call__, builder.set_grid_dim, builder.set_grid_idx = call, set_grid_dim, set_grid_idx


def _record_addresses(builder: Any) -> None:
    """Loads and stores; what is added up by atomics would depend on the order, so these count as stores."""
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _launch.read(_selected(pointers, mask))
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _launch.write(_selected(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _launch.write(_selected(pointers, mask))
        return update(self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        _launch.write(pointers.data.ravel())
        return exchange(self, pointers, *rest)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas


def _selected(pointers: Any, mask: Any) -> Addresses:
    return pointers.data[np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)]


def _multiply_exactly(interpreter: Any) -> None:
    """Products are made in float64 and rounded once, in place of NumPy's float32 product.

    That one rounds as the processor's BLAS does, for one shape otherwise than for another; where a backward recomputes
    what a forward has seen, at a temperature of 0.01, a test then passes on one processor and fails on the next.
    """
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32 or a.data.dtype not in (np.float16, np.float32):
            return multiply(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def fresh_memory_is_nan(yes: bool) -> None:
    """Whether ``torch.empty`` and its kin give NaN, or the largest integer: they do beside deterministic algorithms."""
    if yes != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(yes, warn_only=True)
