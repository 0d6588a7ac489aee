"""Cases of test_distributed.py: second moments over all ranks' rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_common import STRATEGIES, case, raises
from distributed_contract import needs_counter, recorded_calls, written
from helpers import reference_moment, roundings, within_budget
from sslfast.distributed import scope_of
from sslfast.ops.second_moment import by_reference
from sslfast.ops.types import MomentOptions, SecondMoment
from sslfast.reference.second_moment import prepared

# Rows of each rank: uneven, one row.
SIZES = {1: [(9,), (4,)], 2: [(5, 3), (4, 1)], 4: [(4, 2, 3, 7), (2, 1, 1, 5)]}
Batches = tuple[Tensor, Tensor]


def batches(sizes: Sequence[int], width: int, dtype: torch.dtype = torch.float64) -> tuple[Batches, list[Batches]]:
    """The global a, b [N, D], correlated and off centre, and the ranks' parts of them."""
    generator = torch.Generator().manual_seed(width)
    a, b = torch.randn(2, sum(sizes), width, generator=generator, dtype=torch.float64)
    whole = ((1.5 * a + 0.7).to(dtype), (a + 0.5 * b - 0.2).to(dtype))
    return whole, [tuple(t.split(list(sizes))[rank] for t in whole) for rank in range(len(sizes))]


def scalar(found: SecondMoment, factor: float = 1.0) -> Tensor:
    """A function of all outputs in which no two entries count alike."""
    weights = torch.linspace(-1, 2, found.diagonal.shape[1], dtype=found.diagonal.dtype)
    shares = torch.linspace(1, 2, len(found.off_diagonal), dtype=found.diagonal.dtype)
    off = (shares * (1 + found.off_diagonal).log()).sum()
    return factor * (off + (weights * found.diagonal.sin()).sum() + 0.3 * (1 + found.distance).log())


def value_and_gradients(function: Callable[..., SecondMoment], inputs: Sequence[Tensor], factor: float) -> list[Tensor]:
    """off, diagonal, distance, and the gradients of ``scalar``."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    found = function(*inputs)
    grads = torch.autograd.grad(scalar(found, factor), inputs)
    return [*(t.detach() for t in found), *grads]


def of_all_rows(sizes: Sequence[int], statistics: str, cross: bool, **how: object) -> Callable[..., SecondMoment]:
    """One process that has all rows; ``"local"`` standardises each rank's rows by themselves."""

    def function(*inputs: Tensor) -> SecondMoment:
        if statistics == "global":
            return reference_moment(*inputs, cross=cross, **how)
        blocks = [torch.cat([prepared(rows, **how) for rows in t.split(list(sizes))]) for t in inputs]
        found = reference_moment(*blocks, cross=cross, center=False)
        pair = len(inputs) == 2 and not cross
        return found._replace(distance=(inputs[0] - inputs[1]).square().sum() if pair else found.distance)

    return function


@case
def second_moments_of_all_rows(rank: int, world: int) -> None:
    """Every option, in both forms, with another weight of the loss on each rank."""
    factors = [1.0 + r for r in range(world)]
    for sizes, width in (*zip(SIZES[world], (11, 6), strict=True), (SIZES[world][0], 1)):
        whole, parts = batches(sizes, width)
        for views, cross in ((1, False), (2, False), (2, True)):
            for center, scale, statistics in itertools.product(
                (True, False), ("none", "variance", "norm"), ("global", "local")
            ):
                if width == 1 and scale != "norm":
                    continue
                if min(sizes) == 1 and center and statistics == "local":
                    continue
                how = {"center": center, "scale": scale, "eps": 1e-5}
                truth = value_and_gradients(of_all_rows(sizes, statistics, cross, **how), whole[:views], sum(factors))
                # In primal form nothing depends on whose statistics they were.
                for form in ("primal", "dual") if statistics == "global" else ("dual",):
                    found = value_and_gradients(
                        lambda *inputs, how=how, statistics=statistics, form=form, cross=cross: scope_of(
                            True
                        ).second_moment(*inputs, cross=cross, statistics=statistics, form=form, **how),
                        parts[rank][:views],
                        factors[rank],
                    )
                    told = f"{sizes}, {width}, {views}, {cross}, {how}, {statistics}, {form}: "
                    for place, (mine, true) in enumerate(zip(found, truth, strict=True)):
                        if place >= 3:
                            true = true.split(list(sizes))[rank]
                        torch.testing.assert_close(
                            mine, true, rtol=1e-9, atol=1e-9, msg=lambda m, t=told, p=place: f"{t}{p}: {m}"
                        )


@case
def second_moments_in_other_dtypes(rank: int, world: int) -> None:
    """Sums of 16-bit rows are float32, in an autocast region too, forward and backward."""
    if world == 1:
        return  # the operator itself
    sizes = SIZES[world][0]
    for dtype, width, cross in itertools.product((torch.float32, torch.bfloat16), (6, 40), (False, True)):
        (a, b), parts = batches(sizes, width, dtype)
        how = {"cross": cross, "center": True, "scale": "variance", "eps": 1e-5}

        def plain_step(*inputs: Tensor, how: dict[str, object] = how) -> list[Tensor]:
            return value_and_gradients(lambda *given: by_reference(*given, MomentOptions(**how)), inputs, world)

        every = plain_step(a.double(), b.double()), roundings(plain_step, a, b)
        for strategy in STRATEGIES:
            with torch.autocast("cpu"):
                found = value_and_gradients(
                    lambda *inputs, how=how, strategy=strategy: scope_of(True, strategy).second_moment(*inputs, **how),
                    parts[rank],
                    1.0,
                )
            for place, (mine, true, plain) in enumerate(zip(found, *every, strict=True)):
                if place >= 3:
                    assert mine.dtype == dtype
                    true, plain = (t.split(list(sizes))[rank] for t in (true, plain))
                else:
                    assert mine.dtype == torch.float32
                kind = dtype if place >= 3 else torch.float32
                within_budget(f"{dtype}, {width}, {cross}, {place}", mine, plain, true, kind)


@case
def constant_columns_and_rows_that_are_not_numbers(rank: int, world: int) -> None:
    sizes = SIZES[world][0]
    (a, b), _ = batches(sizes, 6)
    for center, scale, form in itertools.product((True, False), ("variance", "norm"), ("primal", "dual")):
        how = {"center": center, "scale": scale, "eps": 1e-5}
        for bad in (0.0, float("nan")):
            x = a.clone()
            x[:, 2] = 0.0
            x[0, 4] += bad
            truth = value_and_gradients(of_all_rows(sizes, "global", True, **how), (x, b), world)
            found = value_and_gradients(
                lambda *inputs, how=how, form=form: scope_of(True).second_moment(*inputs, cross=True, form=form, **how),
                [t.split(list(sizes))[rank] for t in (x, b)],
                1.0,
            )
            assert not (bad == 0.0 and any(t.isnan().any() for t in found)), how
            assert found[0].isnan().any() == truth[0].isnan().any() and found[3].isnan().any() == (bad != 0.0)
            if bad == 0.0:
                for mine, true in zip(found[3:], truth[3:], strict=True):
                    torch.testing.assert_close(mine, true.split(list(sizes))[rank], rtol=1e-9, atol=1e-9)


@case
def second_moments_differentiated_twice(rank: int, world: int) -> None:
    sizes = SIZES[world][0]
    for cross, form in itertools.product((False, True), ("primal", "dual")):
        whole, parts = batches(sizes, 5)

        def penalty(function: Callable[..., SecondMoment], inputs: Batches) -> tuple[Tensor, ...]:
            inputs = tuple(t.clone().requires_grad_() for t in inputs)
            grads = torch.autograd.grad(scalar(function(*inputs)), inputs, create_graph=True)
            return torch.autograd.grad(sum((g**3).sum() for g in grads), inputs)

        how = {"center": True, "scale": "variance"}
        truth = penalty(of_all_rows(sizes, "global", cross, **how, eps=1e-5), whole)
        found = penalty(
            lambda *inputs, cross=cross, form=form, how=how: scope_of(True).second_moment(
                *inputs, cross=cross, form=form, **how
            ),
            parts[rank],
        )
        for mine, true in zip(found, truth, strict=True):  # gradients W times as large, cubed
            torch.testing.assert_close(mine, world**3 * true.split(list(sizes))[rank], rtol=1e-8, atol=1e-8)


@case
def moments_or_rows_travel(rank: int, world: int) -> None:
    """Rows are gathered where the global batch is smaller than the width; nothing large is sent in the backward."""
    if world == 1:
        return
    n = 4
    for width, gathered in ((8 * world, True), (4 * world, False)):
        for cross in (False, True):
            _, parts = batches([n] * world, width)
            inputs = [t.clone().requires_grad_() for t in parts[rank]]
            calls: list[str] = []
            with recorded_calls(calls):
                found = scope_of(True).second_moment(*inputs, cross=cross)
            # The agreement, column sums, diagonals; then M, or the rows and ‖M‖².
            kinds = ["all_gather", *["all_reduce"] * 2, *(["all_gather", "all_reduce"] if gathered else ["all_reduce"])]
            assert calls == kinds, (width, calls)
            calls.clear()
            with recorded_calls(calls):
                scalar(found).backward()
            assert calls == ["all_reduce"] * 3, calls


@case
def bytes_of_moments(rank: int, world: int) -> None:
    """What this process writes to its sockets, against the formulas of docs/scaling.md."""
    if world == 1:
        return
    needs_counter()
    shares = 2 * (world - 1) / world  # sent of a number that is all-reduced
    for n, width, cross, dtype in itertools.product((16, 256), (512,), (False, True), (torch.float32, torch.bfloat16)):
        a, b = (torch.randn(n, width).to(dtype).requires_grad_() for _ in range(2))
        columns = shares * 4 * width * (2 + (1 if cross else 2))  # means and diagonals; 6 kB of gloo's own
        rows, moments = (world - 1) * 2 * n * width * a.element_size(), shares * 4 * width**2
        moved = rows if world * n < width else moments
        sent = []
        dist.barrier()
        before = written()
        found = scope_of(True).second_moment(a, b, cross=cross)
        dist.barrier()
        sent.append(written() - before)
        before = written()
        scalar(found).backward()
        dist.barrier()
        sent.append(written() - before)
        for name, mine, formula in zip(("forward", "backward"), sent, (columns + moved, columns), strict=True):
            assert abs(mine - formula) <= 0.03 * formula + 6000, (n, cross, dtype, name, mine, formula)


@case
def ranks_that_disagree_on_moments_all_raise(rank: int, world: int) -> None:
    x = torch.randn(3, 4)
    for name, value in (("scale", "std"), ("form", "both")):
        raises(ValueError, f"{name} must be one of", lambda n=name, v=value: scope_of(True).second_moment(x, **{n: v}))
    if world == 1:
        return
    raises(
        ValueError,
        "statistics must be one of 'global', 'local', got 'mine'",
        lambda: scope_of(True).second_moment(x, statistics="mine"),
    )
    last = rank == world - 1
    others = "rank 0" if world == 2 else "ranks 0, 1, 2"

    def told(name: str, usual: object, value: object) -> str:
        return f"second_moment: the ranks disagree on {name}: {usual} on {others}; {value} on rank {world - 1}"

    for strategy in STRATEGIES:
        scope = scope_of(True, strategy)
        for name, usual, value in (
            ("form", "primal", "dual"),
            ("scale", "none", "norm"),
            ("statistics", "global", "local"),
            ("center", True, False),
            ("eps", 1e-5, 1e-6),
        ):
            how = {name: value if last else usual}
            raises(
                ValueError,
                told(name, repr(usual), repr(value)),
                lambda scope=scope, how=how: scope.second_moment(x, **how),
            )
        wide = torch.randn(3, 5) if last else x
        raises(ValueError, told("the width", 4, 5), lambda s=scope, wide=wide: s.second_moment(wide, wide, cross=True))
        half = x.bfloat16() if last else x
        raises(
            ValueError,
            told("the dtype", "torch.float32", "torch.bfloat16"),
            lambda s=scope, half=half: s.second_moment(half),
        )
        pair = x if last else None
        batches = told("the batches", "'one'", "'pair'")
        raises(ValueError, batches, lambda s=scope, pair=pair: s.second_moment(x, pair))
        learns = x.clone().requires_grad_(last)
        raises(
            ValueError,
            told("whether a or b needs a gradient", False, True),
            lambda s=scope, learns=learns: s.second_moment(learns),
        )
        other = x[:2] if last else x
        kind, why = (ValueError, "the same shape") if last else (RuntimeError, f"of rank {world - 1} were refused")
        raises(kind, why, lambda s=scope, other=other: s.second_moment(x, other, cross=True))
        row = x[:1] if last else x
        why = f"needs at least two rows on every rank, got one on rank {world - 1}"
        raises(ValueError, why, lambda s=scope, row=row: s.second_moment(row, statistics="local"))
        none = x[:0] if last else x
        kind, why = (ValueError, "at least one row") if last else (RuntimeError, f"of rank {world - 1} were refused")
        raises(kind, why, lambda s=scope, none=none: s.second_moment(none))
