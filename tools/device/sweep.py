"""The sweep of configurations: rows of the Triton tables, tried in place of the one that stands there.

To try more, add configurations to an entry of ``SWEEP``, or an entry: the table's module and name, the key without the
architecture, and the case whose time decides. Each is compared with what the table's own row computes, then timed; the
summary names the quickest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sslfast
from benchmarks import harness, machine
from benchmarks.equality import AGREEMENT, disagreement

from .steps import Context, NotRun

Row = tuple[int, ...]  # block_m, block_n, block_k, num_warps, num_stages[, block_d]
ROUNDS = 9


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
        "_nt_xent_configs", "BACKWARD", (2, False), "nt_xent", {"N": 32768, "D": 128}, "backward",
        [(64, 64, 128, 4, 2, 128), (64, 128, 128, 4, 2, 128), (128, 64, 128, 4, 2, 128), (128, 64, 128, 8, 3, 128),
         (64, 64, 128, 4, 3, 128), (128, 128, 128, 8, 2, 128), (64, 32, 128, 4, 2, 128)],
    ),
    Sweep(
        "nt_xent forward, D ≤ 128",
        "_nt_xent_configs", "FORWARD", (2, False), "nt_xent", {"N": 32768, "D": 128}, "forward",
        [(128, 64, 128, 8, 2), (128, 128, 128, 8, 2), (128, 128, 128, 8, 3), (64, 64, 128, 4, 2), (64, 64, 128, 4, 3),
         (128, 64, 128, 4, 3), (128, 32, 128, 4, 3)],
    ),
    Sweep(
        "similarity forward, D > 128",
        "_similarity_lse_configs", "FORWARD", (2, True), "clip", {"N": 32768, "D": 512}, "forward",
        [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 64, 64, 8, 4), (64, 128, 64, 4, 4),
         (128, 128, 32, 4, 4)],
    ),
    Sweep(
        "similarity gradients, D > 128, streamed",
        "_similarity_lse_configs", "OWNER", (2, True), "clip", {"N": 8192, "D": 512}, "backward",
        [(64, 64, 64, 8, 2, 256), (64, 32, 64, 8, 3, 256), (64, 64, 64, 4, 3, 128), (128, 64, 64, 8, 3, 128),
         (64, 64, 128, 8, 2, 256)],
        form="streamed",
    ),
    Sweep(
        "similarity gradients, D ≤ 128",
        "_similarity_lse_configs", "OWNER", (2, False), "moco", {"N": 4096, "K": 65536, "D": 128}, "both",
        [(64, 64, 128, 4, 2, 128), (128, 64, 128, 8, 3, 128), (64, 128, 128, 4, 2, 128), (128, 128, 128, 8, 2, 128)],
    ),
    Sweep(
        "similarity gradients, float32, D > 32, streamed",
        "_similarity_lse_configs", "OWNER", (4, True), "clip", {"N": 8192, "D": 512}, "backward",
        [(64, 32, 32, 4, 2, 128), (64, 16, 32, 4, 2, 128), (64, 32, 32, 4, 3, 64), (64, 32, 32, 8, 2, 128)],
        "float32", "streamed",
    ),
]  # fmt: skip


def text(config: Any) -> str:
    sizes = [config.block_m, config.block_n, config.block_k, *([config.block_d] if config.block_d else [])]
    return f"{'×'.join(map(str, sizes))}, {config.num_warps} warps, {config.num_stages} stages"


def run_sweep(context: Context, sweep: Sweep) -> str:
    """Every row of one entry, the table's own first; what is wrong or does not compile is noted and passed over."""
    module = importlib.import_module(f"sslfast.kernels.{sweep.module}")
    table: dict[Any, Any] = getattr(module, sweep.table, {})
    at, own = _own_row(context, table, sweep)
    notes = []
    configs = [own, *(row for row in (type(own)(*sizes) for sizes in sweep.rows) if row != own)]
    if context.rehearse:
        configs = configs[:2]
    call, clock = _call(context, sweep), machine.Clock(context.device, flush=not context.rehearse)
    expected = None
    try:
        for config in configs:
            if context.left() < 5:
                notes.append("the time was up")
                break
            table[at] = config
            found: dict[str, Any] = {"sweep": sweep.name, "config": text(config), "now": config == own}
            try:
                work = call()
                got = work()
                expected = got if expected is None else expected
                wrong = disagreement(got, [t.double() for t in expected])
                if not wrong <= AGREEMENT[sweep.dtype]:
                    raise AssertionError(f"differs from the table's row by {wrong:.1e}")
                found["ms"] = _median(context, clock, work)
            except (AssertionError, RuntimeError, ValueError) as error:  # a configuration that does not fit is one less
                if not _usable(context):
                    raise
                found["ms"], found["error"] = None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
                notes.append(f"{found['config']}: {found['error']}")
            context.sweep(**found)
    finally:
        table[at] = own
    return "; ".join(notes)


def _own_row(context: Context, table: dict[Any, Any], sweep: Sweep) -> tuple[Any, Any]:
    """The key of the table's row for this machine, and the row."""
    from sslfast.kernels._common import architecture

    at = (architecture(torch.empty(1, device=context.device)), *sweep.key)
    if at not in table:
        raise NotRun(f"{sweep.module}.{sweep.table} has no row {at}")
    return at, table[at]


def _call(context: Context, sweep: Sweep) -> Callable[[], harness.Work]:
    """Makes the work that is timed: anew for each configuration, for the forward's tiles are the backward's too."""
    bench = harness.discover()[sweep.op]
    shape = {**sweep.shape, **(bench.TINY if context.rehearse else {})}
    dtype = "float32" if context.rehearse else sweep.dtype
    case = harness.Case(sweep.op, shape, dtype, sweep.mode, context.device)
    forced = sweep.form and hasattr(sslfast, "use_gradient_form")
    return lambda: bench.setup(case, f"sslfast-{sweep.form}" if forced else "sslfast")


def _median(context: Context, clock: machine.Clock, work: harness.Work) -> float:
    clock(work.run, work.prepare())
    times = sorted(clock(work.run, work.prepare()) for _ in range(1 if context.rehearse else ROUNDS))
    return times[len(times) // 2]


def _usable(context: Context) -> bool:
    if context.rehearse:
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
