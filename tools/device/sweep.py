"""The sweep of configurations: rows of the Triton tables, tried in place of the one that stands there.

To try more, add configurations to an entry of ``SWEEP``, or an entry: the table's module and name, the key without the
architecture, and the case whose time decides. Each is compared with what the table's own row computes, then timed; the
summary names the quickest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sslfast
from benchmarks import harness, machine
from benchmarks.equality import AGREEMENT, disagreement

from . import watch
from .steps import Context, NotRun, Step, with_tests_on_path

with_tests_on_path()

Row = tuple[int, ...]  # block_m, block_n, block_k, num_warps, num_stages[, block_d[, resident]]
ROUNDS = 9
REHEARSED = {"N": 40, "K": 72, "D": 160}  # at most
FEW = 1024  # rows, and keys, of a call that is only to compile


@dataclass(frozen=True)
class Sweep:
    """``rows`` for ``key`` of ``table`` in ``sslfast.kernels.<module>``, timed on ``op`` of ``shape`` in ``mode``."""

    name: str
    module: str
    table: str
    key: tuple[Any, ...]
    op: str
    shape: dict[str, int]
    mode: str
    rows: Sequence[Row]
    dtype: str = "bfloat16"
    form: str = ""  # of the gradient: the table serves one of them


SWEEP: list[Sweep] = [
    Sweep(
        "nt_xent backward, D ≤ 128",
        "_configs", "NT_XENT_BACKWARD", (2, False), "nt_xent", {"N": 32768, "D": 128}, "backward",
        [(64, 64, 128, 4, 2, 128), (64, 128, 128, 4, 2, 128), (128, 64, 128, 4, 2, 128), (128, 64, 128, 8, 3, 128),
         (64, 64, 128, 4, 3, 128), (128, 128, 128, 8, 2, 128), (64, 32, 128, 4, 2, 128), (128, 64, 128, 8, 2, 128)],
        form="streamed",
    ),
    Sweep(
        "nt_xent forward, D ≤ 128",
        "_configs", "NT_XENT_FORWARD", (2, False), "nt_xent", {"N": 32768, "D": 128}, "forward",
        [(128, 64, 128, 8, 2), (128, 128, 128, 8, 2), (128, 128, 128, 8, 3), (64, 64, 128, 4, 2), (64, 64, 128, 4, 3),
         (128, 64, 128, 4, 3), (128, 32, 128, 4, 3)],
    ),
    Sweep(
        "similarity forward, D > 128",
        "_configs", "SIMILARITY_FORWARD", (2, True), "clip", {"N": 32768, "D": 512}, "forward",
        [(128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4),
         (128, 128, 32, 4, 4)],
    ),
    Sweep(
        "similarity gradients, D > 128, streamed",
        "_configs", "SIMILARITY_OWNER", (2, True), "clip", {"N": 8192, "D": 512}, "backward",
        [(64, 64, 64, 8, 2, 256), (64, 32, 64, 8, 3, 256), (64, 64, 64, 4, 3, 128), (128, 64, 64, 8, 3, 128),
         (64, 64, 128, 8, 2, 256)],
        form="streamed",
    ),
    Sweep(
        "similarity gradients, D ≤ 128",
        "_configs", "SIMILARITY_OWNER", (2, False), "moco", {"N": 4096, "K": 65536, "D": 128}, "both",
        [(64, 64, 128, 4, 2, 128), (128, 64, 128, 8, 3, 128), (64, 128, 128, 4, 2, 128), (128, 128, 128, 8, 2, 128)],
        form="streamed",
    ),
    Sweep(
        "weights of a band, D > 128",
        "_configs", "SIMILARITY_WEIGHTS", (2, True), "clip", {"N": 32768, "D": 512}, "backward",
        [(128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 4, 4),
         (128, 256, 32, 8, 4)],
        form="banded",
    ),
    Sweep(
        "similarity gradients, float32, D > 32, streamed",
        "_configs", "SIMILARITY_OWNER", (4, True), "clip", {"N": 8192, "D": 512}, "backward",
        [(64, 32, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128), (64, 32, 32, 4, 3, 64), (64, 32, 32, 8, 2, 128)],
        "float32", "streamed",
    ),
]  # fmt: skip


def text(config: Any) -> str:
    sizes = [config.block_m, config.block_n, config.block_k, *([config.block_d] if config.block_d else [])]
    resident = getattr(config, "resident", 1)
    more = f", {resident} programs a multiprocessor" if resident > 1 else ""
    return f"{'×'.join(map(str, sizes))}, {config.num_warps} warps, {config.num_stages} stages{more}"


def warm(context: Context) -> list[Step]:
    """Each configuration once, on few rows: compiled by several processes side by side, the kernels lie in Triton's
    cache when their time is taken; and one that computes something else is red."""
    return [
        Step(
            f"row of {sweep.name}: {'×'.join(map(str, row))}",
            functools.partial(compile_row, context, sweep, row),
            120.0,
        )
        for sweep in SWEEP
        for row in (sweep.rows[:1] if context.rehearse else sweep.rows)
    ]


def compile_row(context: Context, sweep: Sweep, row: Row) -> str:
    """Raises where ``row`` disagrees with the table's own; one that does not fit the device is a note."""
    few = replace(sweep, shape={**sweep.shape, **{size: FEW for size in ("N", "K") if size in sweep.shape}})
    call = _call(context, few)
    with _table(context, sweep) as (table, at, own):
        expected = call()()
        table[at] = type(own)(*row)
        try:
            got = call()()
        except Exception as error:
            if not _does_not_fit(error):
                raise
            return f"does not fit: {str(error).splitlines()[0]}"
    _agree(sweep, got, expected)
    return ""


def run_sweep(context: Context, sweep: Sweep) -> str:
    """Times of every row of one entry, the table's own first; what does not fit, or is wrong, is passed over."""
    call, clock = _call(context, sweep), machine.Clock(context.device, flush=not context.rehearse)
    notes, expected = [], None
    with _table(context, sweep) as (table, at, own):
        configs = [own, *(config for config in (type(own)(*row) for row in sweep.rows) if config != own)]
        for config in configs[: 2 if context.rehearse else None]:
            if context.left() < 5:
                notes.append("the time was up")
                break
            table[at] = config
            found: dict[str, Any] = {"sweep": sweep.name, "config": text(config), "now": config == own, "ms": None}
            try:
                work = call()
                got = work()
                expected = got if expected is None else expected
                _agree(sweep, got, expected)
                found["ms"] = _median(context, clock, work)
            except Exception as error:
                if not isinstance(error, AssertionError) and not _does_not_fit(error):
                    raise
                found["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                notes.append(f"{found['config']}: {found['error']}")
            context.sweep(**found)
    return "; ".join(notes)


def _agree(sweep: Sweep, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    wrong = disagreement(got, [t.double() for t in expected])
    if not wrong <= AGREEMENT[sweep.dtype]:
        raise AssertionError(f"differs from the table's row by {wrong:.1e}")


def _does_not_fit(error: Exception) -> bool:
    """A configuration that needs more shared memory, registers or tensor memory than there is; not a lost device."""
    words = f"{type(error).__name__} {error}".lower()
    return any(word in words for word in ("out of resource", "outofresources", "shared memory", "ptxas"))


@contextlib.contextmanager
def _table(context: Context, sweep: Sweep) -> Iterator[tuple[dict[Any, Any], Any, Any]]:
    """(the table, the key of its row for this machine, the row), which is put back in the end."""
    module = importlib.import_module(f"sslfast.kernels.{sweep.module}")
    table: dict[Any, Any] = getattr(module, sweep.table, {})
    architecture = importlib.import_module("sslfast.kernels._common").architecture
    at = (architecture(torch.empty(1, device=context.device)), *sweep.key)
    if at not in table:
        raise NotRun(f"{sweep.module}.{sweep.table} has no row {at}")
    own = table[at]
    with watch.triton_on_cpu() if context.rehearse else contextlib.nullcontext():
        try:
            yield table, at, own
        finally:
            table[at] = own


def _call(context: Context, sweep: Sweep) -> Callable[[], harness.Work]:
    """Makes the work that is timed: anew for each configuration, for the forward's tiles are the backward's too."""
    bench = harness.discover()[sweep.op]
    shape = (
        {name: min(size, REHEARSED[name]) for name, size in sweep.shape.items()} if context.rehearse else sweep.shape
    )
    case = harness.Case(sweep.op, shape, sweep.dtype, sweep.mode, context.device)
    forced = sweep.form and hasattr(sslfast, "use_gradient_form")
    return lambda: bench.setup(case, f"sslfast-{sweep.form}" if forced else "sslfast")


def _median(context: Context, clock: machine.Clock, work: harness.Work) -> float:
    clock(work.run, work.prepare())
    times = sorted(clock(work.run, work.prepare()) for _ in range(1 if context.rehearse else ROUNDS))
    return times[len(times) // 2]
