"""What the GPU's script holds against each call: a wrong result, other bits, a wait, a stale graph are seen."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sslfast
from sslfast import _backends
from tools.device import correct, losses, sweep, timings, watch
from tools.device.losses import LOSSES, Loss, Problem
from tools.device.steps import Context
from tools.device.sweep import SWEEP

REHEARSAL = Context(Path("."), rehearse=True)


def squares(change: Callable[[Tensor], Tensor] = lambda y: y, waits: str = "") -> Loss:
    """A loss Σ x²/n, which ``change`` spoils where it is not the reference."""

    def function(x: Tensor) -> Tensor:
        y = x.square().sum() / len(x)
        return y if _backends._forced == "reference" else change(y)

    def make(n: int, d: int) -> Problem:
        return Problem(function, (losses.rows(n, d),))

    return Loss("squares", (), make, triton=False, waits=waits)


def faults() -> dict[str, tuple[Callable[[Tensor], Tensor], str]]:
    count = itertools.count(1)

    def reads(y: Tensor) -> Tensor:
        return y + 0 * y.item()

    def depends_on_the_host(y: Tensor) -> Tensor:
        # Of 7 calls in all the graph's are the 5th and the 6th: a replay would repeat the 5th.
        return y * (1 + 1e-7 * (next(count) >= 7))

    return {
        "right": (lambda y: y, ""),
        "wrong": (lambda y: 1.001 * y, "result 0: error"),
        "wrong gradient": (lambda y: y.detach() + 1.001 * (y - y.detach()), "result 1: error"),
        "NaN": (lambda y: y * float("nan"), "result 0: error nan"),
        "noise": (lambda y: y * (1 + 3e-7 * next(count)), "other bits in the second run"),
        "reads": (reads, "the host reads: _local_scalar_dense"),
        "unwritten": (lambda y: torch.empty(3, device=y.device).sum() * 0 + y, "result 0: error nan"),
        "graph": (depends_on_the_host, "a graph's replay has other bits"),
    }


@pytest.mark.parametrize("kind", faults())
def test_each_kind_of_fault_is_seen(kind: str) -> None:
    change, message = faults()[kind]
    loss = squares(change)
    if not message:
        assert correct.small(REHEARSAL, loss, torch.float32) == ""
        return
    with pytest.raises(AssertionError, match=message):
        correct.small(REHEARSAL, loss, torch.float32)


def test_a_replay_that_does_not_follow_its_inputs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    assert watch.graph_differs(REHEARSAL, lambda: [2 * x], [x]) is None
    monkeypatch.setattr(watch, "capture", lambda context, call: (call(), lambda: None))
    assert watch.graph_differs(REHEARSAL, lambda: [2 * x], [x]) is not None


def test_kernels_that_spill_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton keeps them: for each device the compiled kernels by their signature, and other things."""
    compiled = {"a": SimpleNamespace(name="forward", n_spills=0), "b": SimpleNamespace(name="backward", n_spills=8)}
    module = SimpleNamespace(kernel=SimpleNamespace(device_caches={0: (compiled, {}, "target")}), number=1)
    monkeypatch.setitem(sys.modules, "sslfast.kernels.some", module)
    assert watch.spilled() == ["backward spills 8 registers"]


def test_a_loss_that_waits_by_promise_is_not_captured() -> None:
    change, _ = faults()["reads"]
    assert "no graph: as documented" in correct.small(REHEARSAL, squares(change, "as documented"), torch.float32)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.waits and x.waits != losses.MADE_ANEW], ids=lambda x: x.name)
def test_what_is_said_to_wait_does(loss: Loss) -> None:
    """Else a graph could hold it, and should be asked to."""
    problem = loss.make(21, 13)
    leaves, given = correct.inputs(problem, "cpu", torch.float32, torch.float32)
    assert watch.waits(REHEARSAL, lambda: correct.results(problem.function, leaves, given)) is not None


def test_every_public_loss_is_checked() -> None:
    """A name that ``sslfast`` gains is in the list of losses, or here, from its first day."""
    covered = {name for loss in LOSSES for name in loss.names}
    no_losses = {"patch", "unpatch", "use_backend", "use_gradient_form", "contrastive_diagnostics", "grad_cache_step"}
    no_losses |= {"prototype_usage", "duplicate_prototypes"}
    for name in sslfast.__all__:
        public = getattr(sslfast, name)
        if inspect.isclass(public) and issubclass(public, nn.Module):
            if name in ("DINOHead", "SwAVPrototypes"):  # layers, and no loss
                continue
            assert (name in covered) != (name in losses.THIN), name
        elif callable(public) and not inspect.isclass(public):
            assert name in covered or name in no_losses or name.startswith("second_moment"), name


def test_the_stage_checks_every_loss_in_every_dtype_and_triton_s_twice() -> None:
    gpu = Context(Path("."))
    names = [step.name for step in correct.steps(gpu)]
    assert len(names) == len(set(names))
    for loss, dtype in itertools.product(LOSSES, ("float32", "bfloat16", "float16")):
        assert f"loss {loss.name}, {dtype}" in names
    again = {step.name for step in correct.triton(gpu)}
    assert again < set(names) and f"loss {LOSSES[0].name}, bfloat16" in again and "s = sᵀ, float16" in again
    assert not any(name.startswith(("operators", "large")) for name in again)


def test_every_cuda_operator_is_checked() -> None:
    names = " ".join(step.name for step in correct.operators(Context(Path("."))))
    sources = (Path(correct.__file__).parents[2] / "csrc" / "cuda").glob("*.cu")
    from cuda_emulator import registered

    registered_names = {name for path in sources for name in registered(path)}
    assert len(registered_names) >= 20 and all(name in names for name in registered_names)


def test_times_are_those_of_the_cases_named() -> None:
    """Every headline is a case that its benchmark can set up: the sizes are those that it knows."""
    context = Context(Path("."))
    for headline in timings.HEADLINES:
        case = headline.case(context)
        assert case.device == "cuda" and case.dtype == headline.dtype
        known = timings.harness.discover()[headline.op].cases("cuda", False)[0].shape
        assert set(headline.shape) <= set(known) == set(case.shape), headline
    names = [step.name for step in timings.steps(context)]
    assert len(names) == len(set(names)) and names[0] == "peaks"
    sizes = {(h.op, *h.shape.values()) for h in timings.HEADLINES}
    assert {("clip", 65536, 768), ("sig_lip", 65536, 768), ("nt_xent", 32768, 128), ("moco", 4096, 65536, 128)} <= sizes


@pytest.mark.parametrize("entry", SWEEP, ids=lambda entry: entry.name)
def test_a_sweep_names_rows_that_fit_its_table(entry: sweep.Sweep) -> None:
    """On Hopper: the table has such a key, its rows are made of as many numbers, and none is tried twice."""
    table = getattr(importlib.import_module(f"sslfast.kernels.{entry.module}"), entry.table)
    own = table[(90, *entry.key)]
    rows: list[Any] = [type(own)(*row) for row in entry.rows]
    assert len({*rows}) == len(rows) and all((row.block_d > 0) == (own.block_d > 0) for row in rows)


@pytest.fixture
def fake_work(monkeypatch: pytest.MonkeyPatch) -> tuple[sweep.Sweep, list[Callable[[], tuple[Tensor, ...]]]]:
    """The first sweep, with a call in place of its benchmark's: what the table gives, and what others do."""
    entry = SWEEP[0]
    table = getattr(importlib.import_module(f"sslfast.kernels.{entry.module}"), entry.table)
    other: list[Callable[[], tuple[Tensor, ...]]] = []
    own = {**table}

    def run(_: None) -> tuple[Tensor, ...]:
        return (torch.ones(2),) if table == own else other[0]()

    work = timings.harness.Work(lambda: None, run)
    monkeypatch.setattr(sweep, "_call", lambda context, entry: lambda: work)
    yield entry, other
    assert table == own, "the table is left as it was"


def raising(error: Exception) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        raise error

    return run


TOO_LARGE = raising(RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"))


@pytest.mark.parametrize("other", [TOO_LARGE, lambda: (torch.full((2,), 1.2),)], ids=["does not fit", "is wrong"])
def test_a_configuration_that_does_not_do_is_noted_and_passed_over(
    other: Callable[[], tuple[Tensor, ...]], fake_work: Any, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    entry, others = fake_work
    others.append(other)
    context = Context(tmp_path, rehearse=True, emit=events.append)
    assert "out of resource" in sweep.run_sweep(context, entry) or "differs" in events[-1]["found"]["error"]
    found = [event["found"] for event in events]
    assert [(x["now"], x["ms"] is None) for x in found] == [(True, False), (False, True)]


def test_a_row_is_compiled_and_compared_before_it_is_timed(fake_work: Any) -> None:
    entry, others = fake_work
    row = entry.rows[0]
    others.append(lambda: (torch.ones(2),))
    assert sweep.compile_row(REHEARSAL, entry, row) == ""
    others[0] = TOO_LARGE
    assert sweep.compile_row(REHEARSAL, entry, row).startswith("does not fit: out of resource")
    others[0] = lambda: (torch.full((2,), float("nan")),)
    with pytest.raises(AssertionError, match="differs from the table's row"):
        sweep.compile_row(REHEARSAL, entry, row)
    others[0] = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sweep.run_sweep(REHEARSAL, entry)
    names = [step.name for step in sweep.warm(Context(Path(".")))]
    assert len(names) == len(set(names)) == sum(len(entry.rows) for entry in SWEEP)
