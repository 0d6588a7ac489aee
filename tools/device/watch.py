"""What a call did besides computing: whether the host waited, whether a graph can hold it, what its kernels spilled.

Without a GPU there is no such thing to see; a rehearsal has the same calls in its place, and knows of operations whose
result the host needs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .steps import Context

# Operations that read a number from the device, or whose result has a size that the host must know; and lift_fresh, the
# second half of torch.tensor(numbers, device=...), whose first half is a copy that waits.
READS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero"),
    *("bincount", "histc", "_linalg_eigh", "_linalg_check_errors", "lift_fresh"),
}
TO_THE_HOST = ("tolist", "numpy", "cpu")  # methods of tensors
Call = Callable[[], Sequence[Tensor]]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit by bit: NaN equals itself, 0 does not equal −0."""

    def bits(t: Tensor) -> Tensor:
        return t.detach().contiguous().flatten().view(torch.uint8)

    return len(a) == len(b) and all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


class _Reads(TorchDispatchMode):
    """Notes what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> _Reads:
        self.own = {name: getattr(Tensor, name) for name in TO_THE_HOST}
        for name in TO_THE_HOST:
            setattr(Tensor, name, self.noting(name))
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for name, method in self.own.items():
            setattr(Tensor, name, method)

    def noting(self, name: str) -> Callable[..., Any]:
        def method(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found.append(name)
            return self.own[name](x, *args, **kwargs)

        return method

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func._schema.name.partition("::")[2]
        by_mask = operation in ("index", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if operation in READS or by_mask:
            self.found.append(operation)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Checks of values, which are made where they cost no wait, are left out, as they are on a GPU."""
    from sslfast import _checks

    own = _checks.readable
    modules = [m for m in list(sys.modules.values()) if getattr(m, "readable", None) is own]
    for module in modules:
        module.readable = lambda x: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.readable = own  # type: ignore[attr-defined]


def waits(context: Context, call: Call) -> str | None:
    """What made the host wait for the device in ``call``, which was called before, or ``None``."""
    if context.rehearse:
        reads = _Reads()
        with as_on_a_gpu(), reads:
            call()
        return f"the host reads: {', '.join(dict.fromkeys(reads.found))}" if reads.found else None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error).lower():
            raise
        return f"the host waits: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def capture(context: Context, call: Call) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """(results, replay): one graph of ``call``; ``replay`` computes the results anew, in place."""
    if context.rehearse:
        held = [t.clone() for t in call()]

        def again() -> None:
            for old, new in zip(held, call(), strict=True):
                old.copy_(new)

        return held, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return found, graph.replay


def graph_differs(context: Context, call: Call, leaves: Sequence[Tensor]) -> str | None:
    """Capture ``call``, give its leaves other numbers, replay: the results must have a plain call's bits."""
    found, replay = capture(context, call)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.875)  # exact in any dtype but for the smallest numbers; other products all the same
    replay()
    got = [t.clone() for t in found]
    expected = call()
    return None if same(got, expected) else "a graph's replay has other bits than a call"


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """The Triton kernels in the interpreter serve CPU tensors, where an operation has any."""
    import interpreter
    from sslfast import _backends

    with contextlib.suppress(ImportError):  # without Triton nothing is interpreted
        interpreter.hasten()
    choose = _backends.select

    def select(op: str, preferred: str, why_not: Callable[[str], str | None]) -> str:
        if _backends._forced is None and "triton" in _backends_of(op) and why_not("triton") is None:
            return "triton"
        return choose(op, preferred, why_not)

    _backends.select = select
    try:
        yield
    finally:
        _backends.select = choose


def _backends_of(op: str) -> Sequence[str]:
    with contextlib.suppress(ImportError, AttributeError):
        from sslfast import ops

        found: Sequence[str] = getattr(ops, op).BACKENDS
        return found
    return ()


def is_emulated() -> bool:
    """Whether a library of ``tests/cuda_emulator`` was named, to run CUDA kernels without a GPU."""
    return bool(os.environ.get("SSLFAST_EMULATED"))


def spilled() -> list[str]:
    """Kernels of sslfast compiled in this process whose registers did not suffice, with how many were spilled."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.startswith("sslfast.kernels."):
            with contextlib.suppress(Exception):  # Triton's own caches, which are not for others to read
                for kernel in vars(module).values():
                    found += [f"{k.name} spills {k.n_spills} registers" for k in _compiled(kernel) if k.n_spills]
    return sorted(set(found))


def _compiled(kernel: Any) -> Iterator[Any]:
    """Of a function under ``triton.jit``, what has been compiled; the interpreter compiles nothing."""
    for caches in getattr(kernel, "device_caches", {}).values():
        yield from caches[0].values()
