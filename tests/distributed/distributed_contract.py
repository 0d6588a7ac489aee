"""Cases of test_distributed.py: what is sent, what is refused, and what happens when a rank is missing."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import Unavailable
from distributed_common import (
    SIZES,
    STRATEGIES,
    Formula,
    batch,
    case,
    clip,
    compare,
    raises,
    sig_lip,
    value_and_gradients,
)
from sslfast import sup_con
from sslfast.distributed import Scope, scope_of
from sslfast.distributed.collectives import Ranks


@case
def the_strategies_are_two(rank: int, world: int) -> None:
    """The ring does not gather, and the other way round."""
    names = {strategy: type(scope_of(True, strategy)).__name__ for strategy in STRATEGIES}
    assert names == ({s: "Scope" for s in STRATEGIES} if world == 1 else {"gather": "GatherScope", "ring": "RingScope"})
    for strategy in STRATEGIES:
        inputs = batch([3] * world, torch.float32)[1][rank]
        calls: list[str] = []
        with recorded_calls(calls):
            value_and_gradients(clip, scope_of(True, strategy), inputs)
        kinds = {"all_gather", "all_to_all"} if strategy == "gather" else {"all_gather", "post"}
        assert set(calls) == (kinds if world > 1 else set()), calls


@contextlib.contextmanager
def recorded_calls(calls: list[str]) -> Iterator[None]:
    originals = {name: getattr(Ranks, name) for name in ("all_gather", "all_to_all", "all_reduce", "post")}

    def recording(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls.append(name)
            return originals[name](*arguments)

        return call

    for name in originals:
        setattr(Ranks, name, recording(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Ranks, name, original)


@case
def twice_differentiable_by_gather_alone(rank: int, world: int) -> None:
    sizes = SIZES[world][0]
    whole, parts = batch(sizes, torch.float64)

    def penalty(scope: Scope, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss = clip(scope, x, y, scale, bias)
        grads = torch.autograd.grad(loss, (x, y), create_graph=True)
        return sum((grad**2).sum() for grad in grads)

    truth = value_and_gradients(penalty, Scope(), whole)
    if world == 1:
        return
    found = value_and_gradients(penalty, scope_of(True, "gather"), parts[rank])
    for mine, true in zip(found[1:3], truth[1:3], strict=True):  # the penalty's gradients are W times as large each
        torch.testing.assert_close(mine, world**2 * true.split(list(sizes))[rank], rtol=1e-8, atol=1e-10)
    for formula in (clip, sig_lip):

        def by_ring(scope: Scope, x: Tensor, *rest: Tensor, formula: Formula = formula) -> Tensor:
            loss = formula(scope, x, *rest)
            return loss + (torch.autograd.grad(loss, x, create_graph=True)[0] ** 2).sum()

        told = "strategy='ring' can be differentiated once only"
        raises(RuntimeError, told, lambda f=by_ring: value_and_gradients(f, scope_of(True, "ring"), parts[rank]))


@case
def ranks_that_disagree_all_raise(rank: int, world: int) -> None:
    if world == 1:
        return
    x = torch.randn(3, 4)
    last = rank == world - 1
    others = "rank 0" if world == 2 else "ranks 0, 1, 2"
    for strategy in STRATEGIES:
        scope = scope_of(True, strategy)
        wide = torch.randn(3, 5) if last else x
        told_width = f"the ranks disagree on the width: 4 on {others}; 5 on rank {world - 1}"
        raises(ValueError, told_width, lambda scope=scope, wide=wide: scope.shard(wide))
        raises(ValueError, told_width, lambda scope=scope, wide=wide: scope.similarity_terms(wide, wide, 1.0))
        half = x.bfloat16() if last else x
        told_dtype = f"dtype: torch.float32 on {others}; torch.bfloat16 on rank {world - 1}"
        raises(ValueError, told_dtype, lambda scope=scope, half=half: scope.similarity_terms(half, half, 1.0))
        learns = x.clone().requires_grad_(last)
        told_learns = f"whether k needs a gradient: False on {others}; True on rank {world - 1}"
        raises(ValueError, told_learns, lambda scope=scope, learns=learns: scope.similarity_terms(x, learns, 1.0))
        # One rank's bad input: it says what is wrong there, the others that it was refused.
        ids = torch.zeros(3 + last, dtype=torch.int64)
        kind, told = (
            (ValueError, "row_ids must have shape (3,)") if last else (RuntimeError, f"of rank {world - 1} were")
        )
        raises(kind, told, lambda scope=scope, ids=ids: scope.similarity_terms(x, x, 1.0, row_ids=ids, col_ids=ids))
        none = x[:0] if last else x
        kind, told = (ValueError, "at least one row") if last else (RuntimeError, f"of rank {world - 1} were")
        raises(kind, told, lambda scope=scope, none=none: scope.similarity_terms(none, none, 1.0))
    call = (lambda: scope_of(True).shard(x)) if last else (lambda: scope_of(True).gather(x))
    raises(ValueError, f"the call: gather on {others}; shard on rank {world - 1}", call)
    mixed = scope_of(True, "ring" if last else "gather")
    raises(ValueError, "disagree on the strategy", lambda: mixed.similarity_terms(x, x, 1.0))


@case
def masks_that_disagree_all_raise(rank: int, world: int) -> None:
    """A mask of one rank with too few columns, or rows; a mask with too few on every rank."""
    if world == 1:
        return
    last, total = rank == world - 1, 3 * world

    def loss(*shape: int) -> Callable[[], Tensor]:
        return lambda: sup_con(torch.eye(3)[:, None], mask=torch.ones(shape), gather_distributed=True)

    raises(ValueError, f"columns mask has: {total} on ", loss(3, total - last))
    kind, told = (ValueError, "mask must have shape (3, ") if last else (RuntimeError, f"of rank {world - 1} were")
    raises(kind, told, loss(3 - last, total))
    raises(ValueError, f"mask must have shape (3, {total}), got (3, 3)", loss(3, 3))


@case
def a_part_of_the_processes(rank: int, world: int) -> None:
    """A group of some processes; the others are refused."""
    if world == 1:
        return
    members = list(range(1, world))
    group = dist.new_group(members)
    if rank == 0:
        raises(RuntimeError, "is not in the group", lambda: scope_of(True, "ring", group))
        return
    sizes = tuple(range(2, world + 1))
    whole, parts = batch(sizes, torch.float64)
    truth = value_and_gradients(clip, Scope(), whole)
    for strategy in STRATEGIES:
        found = value_and_gradients(clip, scope_of(True, strategy, group), parts[rank - 1])
        mine = truth[1].split(list(sizes))[rank - 1]
        torch.testing.assert_close(found[1] / len(sizes), mine, rtol=1e-9, atol=1e-12)


@case
def falls_back_where_messages_are_not_safe(rank: int, world: int) -> None:
    if world == 1:
        return
    whole, parts = batch(SIZES[world][0], torch.float64)
    scope = scope_of(True, "ring")
    scope.ranks.backends["cpu"] = "ucc"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for formula in (clip, clip, sig_lip):
            found = value_and_gradients(formula, scope, parts[rank])
            compare("fallback", found, rank, SIZES[world][0], formula, torch.float64)
    told = [str(w.message) for w in caught if "strategy='ring'" in str(w.message)]
    assert len(told) == 1 and "'ucc'" in told[0] and "'gather'" in told[0], told
    assert scope.ranks.why_no_ring(torch.device("cuda")) is not None  # gloo with tensors of a GPU


@case
def under_compile(rank: int, world: int) -> None:
    """The calls stand outside the graph; what is around them is compiled."""
    if world != 2:
        return  # importing the compiler takes longer than all the rest
    sizes = SIZES[world][0]
    inputs = batch(sizes, torch.float64)[1][rank]

    @torch.compile(backend="eager")
    def formula(scope: Scope, *inputs: Tensor) -> Tensor:
        return clip(scope, *inputs)

    for strategy in STRATEGIES:
        found = value_and_gradients(formula, scope_of(True, strategy), inputs)
        compare(strategy, found, rank, sizes, clip, torch.float64)


COUNTER = Path("/proc/self/io")


def needs_counter() -> None:
    if not COUNTER.exists():
        raise Unavailable(f"counts bytes by {COUNTER}, which this system does not have")


def written() -> int:
    """Bytes that this process has written, to sockets and files."""
    return int(next(line for line in COUNTER.read_text().splitlines() if line.startswith("wchar")).split()[1])


@case
def bytes_sent(rank: int, world: int) -> None:
    """What this process writes to its sockets in a step, against the formulas of docs/scaling.md."""
    if world == 1:
        return
    needs_counter()
    n, width = 256, 256
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        rows, total = n * width, n * world
        keys = (world - 1) * rows * size
        statistics = 4 * n  # one float32 number a column
        expected = {
            ("gather", False): (keys, keys),
            ("gather", True): (keys + (world - 1) * statistics, keys + (world - 1) * statistics),
            ("ring", False): (keys, keys + world * rows * 4),
            ("ring", True): (keys + world * 2 * statistics, keys + 3 * (world - 1) * statistics + world * rows * 4),
        }
        assert total == sum((n,) * world)
        for (strategy, columns), both in expected.items():
            x, y = (torch.randn(n, width).to(dtype).requires_grad_() for _ in range(2))
            found = []
            dist.barrier()
            before = written()
            terms = scope_of(True, strategy).similarity_terms(x, y, 0.1, columns=columns)
            dist.barrier()
            found.append(written() - before)
            before = written()
            (terms.row_lse.sum() + (terms.col_lse.sum() if columns else 0)).backward()
            dist.barrier()
            found.append(written() - before)
            for name, mine, formula in zip(("forward", "backward"), found, both, strict=True):
                assert abs(mine - formula) <= 0.03 * formula, (strategy, columns, dtype, name, mine, formula)


def one_rank_away(rank: int, world: int, report: dict[str, object]) -> None:
    """Rank 1 stays away from a backward, and later dies; rank 0 must be told. Not in CASES: it ends the group."""
    patience = timedelta(seconds=3)
    groups = {strategy: dist.new_group(timeout=patience) for strategy in STRATEGIES}
    x = torch.randn(4, 3).requires_grad_()
    for strategy, group in groups.items():
        scope = scope_of(True, strategy, group)
        terms = scope.similarity_terms(x, x, 1.0, columns=True)
        if rank == 0:  # rank 1 does without its backward
            start = time.monotonic()
            try:
                terms.row_lse.sum().backward()
            except RuntimeError as error:
                report[f"away, {strategy}"] = [time.monotonic() - start, str(error)]
        dist.barrier()
    last = dist.new_group(timeout=patience)
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        scope_of(True, "ring", last).similarity_terms(x, x, 1.0)
    except RuntimeError as error:
        report["dead"] = [time.monotonic() - start, str(error)]
