"""Stage A: every CUDA operator, Triton launch and public loss against float64, and what else a GPU alone can show.

Of each call: the results by the error budget of the tests (``tests/helpers``); the same bits twice; memory that the
allocator hands out filled with NaN, so that an entry nobody writes is seen; no wait of the host for the device; and one
CUDA graph, replayed on other inputs, whose results have the bits of a plain call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import sslfast

from . import watch
from .losses import LOSSES, Loss, Problem
from .steps import Context, NotRun, Step, with_tests_on_path

with_tests_on_path()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, features): ragged in both, one product; wider than one product takes, and than one program owns.
SHAPES = ((101, 61), (67, 300))
# Large ones by the benchmarks' own inputs and truths: each a benchmark's name, its sizes, its dtypes.
BOTH = ("bfloat16", "float32")
LARGE: Sequence[tuple[str, dict[str, int], Sequence[str]]] = (
    ("nt_xent", {"N": 20001, "D": 128}, BOTH),
    ("nt_xent", {"N": 4001, "D": 512}, BOTH),
    ("clip", {"N": 16001, "D": 512}, BOTH),
    ("clip", {"N": 8001, "D": 768}, BOTH),
    ("sig_lip", {"N": 16001, "D": 512}, BOTH),
    ("sup_con", {"N": 30001, "D": 128}, BOTH),
    ("dcl", {"N": 8001, "D": 128}, BOTH),
    ("moco", {"N": 2049, "K": 65536, "D": 128}, BOTH),
    ("barlow_twins", {"N": 257, "D": 8192}, BOTH),
    ("barlow_twins", {"N": 3001, "D": 2048}, BOTH),
    ("vicreg", {"N": 1025, "D": 4096}, BOTH),
    ("second_moment", {"N": 4097, "D": 1024}, BOTH),
    ("l2_normalize", {"M": 100001, "D": 768}, ("float32",)),
    ("gather_tokens", {"B": 256, "L": 196, "D": 768, "K": 49, "learned": 1}, BOTH),
    ("scatter_tokens", {"B": 256, "L": 196, "D": 512, "K": 49, "learned": 1}, BOTH),
    ("gather_patches", {}, ("float32",)),
    ("masked_patch_loss", {"B": 128, "side": 224, "patch": 16, "K": 49}, BOTH),
    ("masked_feature_loss", {}, BOTH),
    ("augment_views", {"images": 64, "batch": 64, "views": 2}, ("bfloat16",)),
)


def steps(context: Context) -> list[Step]:
    """All of the stage, long ones first: the processes that share them then end together."""
    return [*large(context), *losses(context, LOSSES), *symmetric(context), *operators(context)]


def triton(context: Context) -> list[Step]:
    """What runs Triton kernels on small shapes: checked under a second ptxas too."""
    return [*losses(context, [loss for loss in LOSSES if loss.triton]), *symmetric(context)]


def losses(context: Context, chosen: Sequence[Loss]) -> list[Step]:
    """Every loss in every dtype; in a rehearsal, which is about the calls, in float32 and one form."""
    if context.rehearse:
        chosen = [loss for loss in chosen if not loss.form or loss.name == "clip, banded"]
    return [
        Step(f"loss {loss.name}, {name(dtype)}", functools.partial(small, context, loss, dtype), 90.0)
        for loss, dtype in itertools.product(chosen, DTYPES[: 1 if context.rehearse else None])
    ]


def symmetric(context: Context) -> list[Step]:
    from .symmetry import check

    return [Step(f"s = sᵀ, {name(dtype)}", functools.partial(check, context, dtype)) for dtype in DTYPES]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------- CUDA operators


def operators(context: Context) -> list[Step]:
    """One step for each group of operators that are called together, on the small cases of the tests."""
    from cuda_cases import cases

    groups: dict[tuple[str, ...], list[Any]] = {}
    for case in cases():
        groups.setdefault(case.operators, []).append(case)
    if context.rehearse:
        groups = {names: found[:1] for names, found in groups.items()}
    return [
        Step(f"operators {', '.join(names)}", functools.partial(small_cases, context, found), 60.0)
        for names, found in groups.items()
    ]


def small_cases(context: Context, cases: Sequence[Any]) -> str:
    from cuda_cases import difference, same_bits

    wrong = []
    for case in cases:
        with emulated(context):
            call = case.prepare(context.device)
            first, second = call(), call()
            fault = difference(case, first, case.run("cpu"))
            if fault is None and not same_bits(first, second):
                fault = "other bits in the second run"
            if fault is None:
                fault = watch.waits(context, call) or watch.graph_differs(context, call, [])
        if fault is not None:
            wrong.append(f"{case.name}: {fault}")
    if wrong:
        raise AssertionError(f"{len(wrong)} of {len(cases)} cases: " + "; ".join(wrong[:8]))
    return f"{len(cases)} cases"


@contextlib.contextmanager
def emulated(context: Context) -> Iterator[None]:
    """In a rehearsal CUDA kernels run on the CPU, if their emulator was named; else the CPU's own kernels run."""
    if not context.rehearse or not watch.is_emulated():
        yield
        return
    from cuda_emulator import Emulated

    with Emulated():
        yield


# ------------------------------------------------------------------------------------------------------------- losses


def inputs(
    problem: Problem, device: str, dtype: torch.dtype, rounded: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """(leaves that learn, what is given) in ``dtype``, of numbers that ``rounded`` can hold."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    learn = [x.to(rounded).to(device, dtype).requires_grad_() for x in problem.learn]
    numbers = [torch.tensor(x, dtype=torch.float32).to(device, wide).requires_grad_() for x in problem.scalars]
    given = [x.to(rounded).to(device, dtype) if x.dtype == torch.float64 else x.to(device) for x in problem.given]
    return [*learn, *numbers], given


def results(function: Callable[..., Any], leaves: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """What the call returns and its gradients, through weights that are not 1."""
    found = function(*leaves, *given)
    outs = [t for t in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(t, Tensor)]
    through = [t for t in outs if t.requires_grad]
    waves = [torch.cos(torch.arange(t.numel(), device=t.device, dtype=t.dtype)).view(t.shape) + 0.5 for t in through]
    grads = torch.autograd.grad(through, leaves, waves, materialize_grads=True)
    return [*(t.detach() for t in outs), *grads]


def small(context: Context, loss: Loss, dtype: torch.dtype) -> str:
    """One loss at every shape in one dtype; in a rehearsal, smaller, in the interpreter."""
    notes: list[str] = []
    for n, d in ((21, 13),) if context.rehearse else SHAPES:
        problem = loss.make(n, d)
        with backend(context, loss):
            one_shape(context, loss, problem, dtype, f"{n} × {d}")
    notes += watch.spilled()
    if loss.waits:
        notes.append(f"no graph: {loss.waits}")
    return "; ".join(notes)


@contextlib.contextmanager
def backend(context: Context, loss: Loss) -> Iterator[None]:
    """In a rehearsal losses on Triton kernels run them, in the interpreter."""
    if context.rehearse and loss.triton:
        with watch.triton_on_cpu():
            yield
    else:
        yield


def one_shape(context: Context, loss: Loss, problem: Problem, dtype: torch.dtype, where: str) -> None:
    from cuda_cases.case import filled_memory
    from helpers import within_budget

    with sslfast.use_backend("reference"):
        truth = results(problem.function, *inputs(problem, "cpu", torch.float64, dtype))
        plain = results(problem.function, *inputs(problem, "cpu", dtype, dtype))
    leaves, given = inputs(problem, context.device, dtype, dtype)

    def call() -> list[Tensor]:
        with sslfast.use_gradient_form(loss.form) if loss.form else contextlib.nullcontext():
            return results(problem.function, leaves, given)

    with filled_memory():
        poisoned = call()
    first, second = call(), call()
    terms = problem.learn[0].numel()
    for i, (kernel, reference, exact) in enumerate(zip(poisoned, plain, truth, strict=True)):
        floor = 1.0 if i < len(truth) - len(leaves) else 1.5 / terms
        within_budget(f"{where}, result {i}", kernel, reference, exact, dtype, floor)
    faults = [] if watch.same(first, second) else ["other bits in the second run"]
    if not loss.waits:
        faults += [watch.waits(context, call) or "", watch.graph_differs(context, call, leaves) or ""]
    if faults := [fault for fault in faults if fault]:
        raise AssertionError(f"{where}: " + "; ".join(faults))


# ----------------------------------------------------------------------------------------------------------- large ones


def large(context: Context) -> list[Step]:
    """All of them; in a rehearsal each operation once."""
    chosen = list({op: (op, sizes, dtypes[:1]) for op, sizes, dtypes in LARGE}.values()) if context.rehearse else LARGE
    return [
        Step(f"large {' '.join([op, *(f'{k}={v}' for k, v in sizes.items()), dtype])}",
             functools.partial(against_truth, context, op, sizes, dtype), 90.0)
        for op, sizes, dtypes in chosen for dtype in dtypes
    ]  # fmt: skip


def against_truth(context: Context, op: str, sizes: dict[str, int], dtype: str) -> str:
    """A benchmark's case: its truth, plain PyTorch's error as the measure of rounding, then sslfast."""
    from benchmarks.equality import allowance, errors, excess
    from benchmarks.harness import discover

    bench = discover()[op]
    some = bench.cases(context.device, True)[0]
    dtype = "float32" if context.rehearse else dtype
    case = replace(some, shape={**some.shape, **sizes}, dtype=dtype, device=context.device)
    if context.rehearse:
        case = replace(case, shape={**case.shape, **bench.TINY})
    missing = bench.why_skip(case, "sslfast", "time_ms")
    if missing:
        raise NotRun(missing)
    truth = bench.truth(case)
    work = bench.setup(case, "sslfast")
    prove = work.proof or work
    first, second = prove(), prove()
    if not watch.same(first, second):
        raise AssertionError("other bits in the second run")
    wrong = errors(first, truth)
    allowed = (
        [work.tolerance] * len(wrong) if work.tolerance else allowance(dtype, _plain(bench, case, truth), len(wrong))
    )
    over = excess(wrong, allowed)
    if over:
        raise AssertionError(f"differs from float64 by {over[0]:.1e}, allowed {over[1]:.1e}")
    return f"largest error {max(wrong):.1e}"


def _plain(bench: Any, case: Any, truth: Sequence[Tensor]) -> list[float]:
    """Errors of plain PyTorch, where it fits."""
    from benchmarks.equality import errors

    provider = "chunked" if "chunked" in bench.PROVIDERS else "eager" if "eager" in bench.PROVIDERS else ""
    if not provider:
        return []
    try:
        return errors(bench.setup(case, provider)(), truth)
    except torch.OutOfMemoryError:
        return []
