"""similarity_lse on the CPU: value and every gradient against the reference in float64, and its contracts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import at_levels, roundings, within_budget
from sslfast import reference

pytestmark = pytest.mark.sanitize

module = sslfast.ops.similarity_lse

# (rows, columns, features): aligned, ragged, prime, tiny, one row, one column, one feature, several tiles both ways.
SHAPES = [(64, 64, 64), (100, 70, 48), (61, 127, 31), (3, 5, 7), (1, 9, 8), (9, 1, 8), (33, 20, 1), (500, 401, 20)]
OPTIONS: dict[str, dict[str, bool]] = {
    "rows": {},
    "columns": {"columns": True},
    "positives": {"positives": True},
    "everything": {"columns": True, "positives": True, "bias": True, "ids": True},
}


def inputs(m: int, n: int, d: int, dtype: torch.dtype, **options: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, scale[, bias] that learn, and the other arguments."""
    learn = [torch.randn(m, d), torch.randn(n, d), torch.tensor(1.5 / d**0.5)]
    if options.get("bias"):
        learn.append(torch.randn(n))
    rest: dict[str, Any] = {}
    if options.get("ids"):
        rest["row_ids"], rest["col_ids"] = torch.randint(0, 7, (m,)), torch.randint(0, 7, (n,), dtype=torch.int32)
        rest["row_ids"][0], rest["col_ids"][:] = 9, rest["col_ids"].clamp(max=6)
    if options.get("positives"):
        rest["positives"] = torch.randint(-1, n, (m,))
    if options.get("columns"):
        rest["columns"] = True
    cast = [t.to(dtype) if i < 2 else t.to(torch.float64 if dtype == torch.float64 else torch.float32) for i, t in
            enumerate(learn)]  # fmt: skip
    return [t.requires_grad_() for t in cast], rest


def outputs(learn: list[Tensor], rest: dict[str, Any]) -> list[Tensor]:
    q, k, scale, *bias = learn
    terms = sslfast.similarity_terms(q, k, scale, bias=bias[0] if bias else None, **rest)
    return [t for t in terms[:3] if t is not None]


def by_reference(learn: list[Tensor], rest: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Values, and the gradients of their weighted sum."""
    cast = [t.detach().to(dtype).requires_grad_() for t in learn]
    q, k, scale, *bias = cast
    arguments = {name: value for name, value in rest.items() if name != "columns"}
    row, col, positive, _ = reference.similarity_terms(q, k, scale, bias=bias[0] if bias else None, **arguments)
    values = [row] + [col] * ("columns" in rest) + [positive] * ("positives" in rest)
    return values, list(torch.autograd.grad(weighted(values), cast))


def weighted(values: list[Tensor]) -> Tensor:
    """A loss with another weight for every finite output, so that no two gradients can be mistaken."""
    total = torch.zeros((), dtype=values[0].dtype)
    for step, value in enumerate(values):
        finite = value.isfinite()
        weight = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype) * (-0.7) ** step
        total = total + (value.masked_fill(~finite, 0.0) * weight).sum() / len(value)
    return total


def check(learn: list[Tensor], rest: dict[str, Any], dtype: torch.dtype) -> None:
    values = outputs(learn, rest)
    weighted(values).backward()
    truth, exact = by_reference(learn, rest, torch.float64)
    plain, rough = roundings(by_reference, learn, rest, dtype)
    for name, value, right, own in zip(("value", "col", "positive"), values, truth, plain, strict=False):
        finite = right.isfinite()
        assert torch.equal(value.isfinite(), finite), name
        within_budget(name, value[finite], own[finite], right[finite], dtype, floor=1.0)
    for name, t, right, own in zip(("q", "k", "scale", "bias"), learn, exact, rough, strict=False):
        assert t.grad is not None
        within_budget(f"d{name}", t.grad, own, right, dtype, floor=0.1 if name == "scale" else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", at_levels(OPTIONS.values(), [OPTIONS["everything"]]), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, int, int], options: dict[str, bool], dtype: torch.dtype) -> None:
    check(*inputs(*shape, dtype, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(100, 70, 48), (3, 5, 7), (200, 210, 30)], ids=str)
def test_sixteen_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*inputs(*shape, dtype, **OPTIONS["everything"]), dtype)


@pytest.mark.parametrize("factor", [100.0, -100.0, 1000.0])
def test_large_and_negative_scales(factor: float) -> None:
    """Logits beyond what needs no maximum: the running one takes over."""
    (q, k, _), rest = inputs(130, 201, 20, torch.float32, columns=True, positives=True)
    q, k = (torch.nn.functional.normalize(t.detach()).requires_grad_() for t in (q, k))
    check([q, k, torch.tensor(factor, requires_grad=True)], rest, torch.float32)


def test_bias_as_large_as_distances() -> None:
    """bias_j = −scale/2·‖k_j‖² makes logits of distances: the bias counts when the maximum is judged unnecessary."""
    (q, k, _, _), rest = inputs(50, 300, 4, torch.float32, bias=True, columns=True)
    bias = (-200.0 * (k.detach() ** 2).sum(1)).requires_grad_()
    check([q, k, torch.tensor(2.0, requires_grad=True), bias], rest, torch.float32)


# ---------------------------------------------------------------------------------------------- z against itself


SQUARE = [(101, 30), (64, 64), (3, 5), (600, 20), (2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", ["none", "itself", "pairs"])
@pytest.mark.parametrize("shape", at_levels(SQUARE, SQUARE[:1]), ids=str)
def test_against_itself(shape: tuple[int, int], ids: str, dtype: torch.dtype) -> None:
    """The symmetric path: no columns of their own, half the work."""
    m, d = shape
    z = torch.randn(m, d).to(dtype).requires_grad_()
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(1.5 / d**0.5, dtype=kind, requires_grad=True)
    row = {"none": None, "itself": torch.arange(m), "pairs": torch.arange(m) // 2}[ids]
    positives = torch.randint(-1, m, (m,))
    terms = sslfast.similarity_terms(z, None, scale, row_ids=row, positives=positives)
    weighted([terms.row_lse, terms.positive]).backward()

    def plain_terms(kind: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        x, s = z.detach().to(kind).requires_grad_(), scale.detach().to(kind).requires_grad_()
        lse, _, positive, _ = reference.similarity_terms(x, x, s, row_ids=row, col_ids=row, positives=positives)
        return [lse, positive], list(torch.autograd.grad(weighted([lse, positive]), (x, s)))

    truth, exact = plain_terms(torch.float64)
    plain, rough = roundings(plain_terms, dtype)
    for name, value, right, own in zip(("lse", "positive"), (terms.row_lse, terms.positive), truth, plain, strict=True):
        finite = right.isfinite()
        assert torch.equal(value.isfinite(), finite)
        if finite.any():
            within_budget(name, value[finite], own[finite], right[finite], dtype, floor=1.0)
    for name, grad, right, own in zip(("z", "scale"), (z.grad, scale.grad), exact, rough, strict=True):
        within_budget(f"d{name}", grad, own, right, dtype, floor=0.1 if name == "scale" else 1e-3)


def test_well_separated_positives_do_not_cancel() -> None:
    """At τ = 0.01 and a loss near zero, lse − positive keeps its relative precision, and so does its gradient."""
    q = torch.nn.functional.normalize(torch.randn(150, 40))
    k = torch.nn.functional.normalize(q + 0.05 * torch.randn(150, 40))
    label = torch.arange(150)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        terms = sslfast.similarity_terms(x, y, 100.0, positives=label)
        return terms.row_lse - terms.positive

    def plain(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(100.0 * x @ y.T, label, reduction="none")

    def run(function: Callable[[Tensor, Tensor], Tensor], kind: torch.dtype) -> list[Tensor]:
        x = q.detach().to(kind, copy=True).requires_grad_()
        loss = function(x, k.to(kind))
        return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]

    results = run(kernel, torch.float32), roundings(run, plain, torch.float32), run(plain, torch.float64)
    for name, mine, own, right, floor in zip(("loss", "gradient"), *results, (1e-1, 1e-3), strict=True):
        within_budget(name, mine, own, right, torch.float32, floor=floor)


# ------------------------------------------------------------------------------------------------- only q learns


ROWS_ALONE = [(90, 2500, 17), (5, 700, 30), (200, 3, 8), (1, 1, 1)]


@pytest.mark.parametrize("scale", [2.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", at_levels(ROWS_ALONE, ROWS_ALONE[:1]), ids=str)
def test_only_rows_learn(shape: tuple[int, int, int], dtype: torch.dtype, scale: float) -> None:
    """The path of queues and frozen towers: the gradient comes along in the forward."""
    m, n, d = shape
    q = torch.nn.functional.normalize(torch.randn(m, d)).to(dtype).requires_grad_()
    k = torch.nn.functional.normalize(torch.randn(n, d)).to(dtype)
    bias, ids = torch.randn(n), (torch.arange(m) % 5, torch.arange(n) % 6 - 1)

    def run(by: ModuleType, kind: torch.dtype) -> tuple[Tensor, ...]:
        x = q.detach().to(kind).requires_grad_()
        wide = torch.float64 if kind == torch.float64 else torch.float32
        s = torch.tensor(scale, dtype=wide if by is sslfast else kind, requires_grad=True)
        b = bias.to(kind)
        row = by.similarity_lse(x, k.to(kind), s, bias=b, row_ids=ids[0], col_ids=ids[1])
        return (row.detach(), *torch.autograd.grad(weighted([row]), (x, s)))

    results = run(sslfast, dtype), run(reference, torch.float64), roundings(run, reference, dtype)
    finite = results[1][0].isfinite()
    assert torch.equal(results[0][0].isfinite(), finite)
    for name, value, right, own in zip(("row", "dq", "dscale"), *results, strict=True):
        if name == "row":
            value, right, own = value[finite], right[finite], own[finite]
        if right.numel():
            within_budget(name, value, own, right, dtype, floor=1e-2)


# --------------------------------------------------------------------------------------------- exclusions and more


def test_row_without_columns() -> None:
    """Everything excluded: −inf and no gradient, never NaN, in all three paths."""
    q, k = torch.randn(6, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    row_ids, col_ids = torch.tensor([0, 1, 2, 3, 4, 5]), torch.zeros(7, dtype=torch.long)
    for keys in (k, k.detach()):
        q.grad = k.grad = None
        row = sslfast.similarity_lse(q, keys, 3.0, row_ids=row_ids, col_ids=col_ids)
        assert isinstance(row, Tensor) and row[0] == float("-inf") and row[1:].isfinite().all()
        row.sum().backward()
        assert q.grad[0].eq(0).all() and q.grad[1:].ne(0).all() and q.grad.isfinite().all()
    same = torch.zeros(6, dtype=torch.long)
    q.grad = None
    row = sslfast.similarity_lse(q, None, 300.0, row_ids=same)
    row.sum().backward()
    assert row.eq(float("-inf")).all() and q.grad.eq(0).all()
    columns = sslfast.similarity_lse(q, k, 300.0, row_ids=same, col_ids=torch.arange(7), columns=True)[1]
    assert columns[0] == float("-inf") and columns[1:].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 60.0])
@pytest.mark.parametrize("with_itself", [False, True])
def test_hardest(with_itself: bool, scale: float) -> None:
    q = torch.nn.functional.normalize(torch.randn(250, 16))
    k = q if with_itself else torch.nn.functional.normalize(torch.randn(300, 16))
    ids = torch.arange(len(q)) if with_itself else torch.randint(0, 20, (len(q),))
    other = ids if with_itself else torch.randint(0, 20, (len(k),))
    positives = (torch.arange(len(q)) + 7) % len(q)
    terms = sslfast.similarity_terms(q, k, scale, row_ids=ids, col_ids=other, positives=positives, hardest=True)
    right = reference.similarity_terms(q, k, scale, row_ids=ids, col_ids=other, positives=positives)[3]
    torch.testing.assert_close(terms.hardest, right, rtol=1e-5, atol=1e-5)
    only = sslfast.similarity_terms(q[:1], k[:1], scale, positives=torch.zeros(1, dtype=torch.long), hardest=True)
    assert only.hardest == float("-inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_rows_flow_through(bad: float) -> None:
    q, k = torch.randn(40, 8), torch.randn(50, 8)
    q[3, 2] = bad
    row, col = sslfast.similarity_lse(q, k, 1.0, columns=True)
    right, right_col = reference.similarity_lse(q, k, 1.0, columns=True)
    assert not row[3].isfinite() and torch.equal(row.isfinite(), right.isfinite())
    assert not col.isfinite().all() and torch.equal(col.isnan(), right_col.isnan())


def test_any_strides() -> None:
    q, k = torch.randn(30, 40).T, torch.randn(35, 60)[:, ::2]
    row = sslfast.similarity_lse(q, k, 0.5, bias=torch.randn(70)[::2], row_ids=torch.arange(80)[::2],
                                 col_ids=torch.arange(70)[::2])  # fmt: skip
    assert row.shape == (40,) and row.isfinite().all()
    torch.testing.assert_close(sslfast.similarity_lse(q, k, 0.5), torch.logsumexp(0.5 * q @ k.T, 1))


@pytest.mark.parametrize("cache", [0, 5 * 192 * 192, 10**7])
@pytest.mark.parametrize("scale", [0.2, 30.0])
def test_tile_cache(cache: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile kept, some, all: the same gradients."""
    monkeypatch.setattr(module, "_tile_cache", lambda q, k: cache)
    monkeypatch.setattr(module, "_self_tile_cache", lambda z: cache)
    learn, rest = inputs(700, 500, 20, torch.float32, columns=True, positives=True, ids=True)
    learn[2] = torch.tensor(scale, requires_grad=True)
    check(learn, rest, torch.float32)
    z = torch.randn(700, 20, requires_grad=True)
    sslfast.similarity_lse(z, None, scale).sum().backward()
    exact = z.detach().double().requires_grad_()
    torch.logsumexp(scale * exact @ exact.T, 1).sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=2e-5 * exact.grad.abs().max().item())


def test_every_subset_of_gradients() -> None:
    learn, rest = inputs(40, 30, 8, torch.float32, bias=True, positives=True, columns=True)
    full = torch.autograd.grad(weighted(outputs(learn, rest)), learn)
    for chosen in range(1, 16):
        some = [t.detach().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(learn)]
        weighted(outputs(some, rest)).backward()
        for i, (t, right) in enumerate(zip(some, full, strict=True)):
            if chosen >> i & 1:
                torch.testing.assert_close(t.grad, right, rtol=1e-4, atol=1e-6)
            else:
                assert t.grad is None


def test_repeats_bit_for_bit() -> None:
    learn, rest = inputs(400, 900, 33, torch.float32, **OPTIONS["everything"])
    first = torch.autograd.grad(weighted(outputs(learn, rest)), learn)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(weighted(outputs(learn, rest)), learn),
                                                     strict=True))  # fmt: skip


def test_second_order() -> None:
    learn, rest = inputs(7, 6, 5, torch.float64, **OPTIONS["everything"])
    rest["col_ids"][:] = 8  # no row without columns: finite differences of −inf are nothing
    positions = [t.detach().clone().requires_grad_() for t in learn]
    torch.autograd.gradcheck(lambda *x: weighted(outputs(list(x), rest)), positions)
    torch.autograd.gradgradcheck(lambda *x: weighted(outputs(list(x), rest)), positions)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(6)
    torch.autograd.gradgradcheck(lambda z: sslfast.similarity_lse(z, None, 0.7, row_ids=ids), z)
    k = torch.randn(9, 4, dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda z: sslfast.similarity_lse(z, k, 0.7), z)


def test_operators_are_citizens() -> None:
    (q, k, scale, bias), _ = inputs(20, 30, 8, torch.float32, bias=True)
    ids, cols, positives = torch.arange(20), torch.arange(30), torch.arange(20)
    ops = torch.ops.sslfast
    arguments = (q, k, scale, bias, ids, cols, positives, True, True, 0)
    torch.library.opcheck(ops.similarity_lse.default, arguments)
    torch.library.opcheck(ops.similarity_lse.default, (q, k, scale, None, None, None, None, False, False, 0))
    torch.library.opcheck(ops.similarity_lse_self.default, (q, scale, ids, positives, True, 0))
    torch.library.opcheck(ops.similarity_lse_attend.default, (q, k.detach(), scale, None, ids, cols))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    def step(q: Tensor, k: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
        row, col = sslfast.similarity_lse(q, k, scale, columns=True)
        own = sslfast.similarity_lse(q, None, scale, row_ids=ids)
        return row.mean() + col.mean() + own.mean() + sslfast.similarity_lse(q, k.detach(), scale).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for m in (16, 24):
        (q, k, scale), _ = inputs(m, 30, 8, torch.float32)
        ids = torch.arange(m)
        one = torch.autograd.grad(step(q, k, scale, ids), (q, k, scale))
        two = torch.autograd.grad(compiled(q, k, scale, ids), (q, k, scale))
        torch.testing.assert_close(one, two)


def test_autocast_keeps_the_sums_wide() -> None:
    q, k = torch.randn(40, 8), torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = sslfast.similarity_lse(q, k, 2.0)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, torch.logsumexp(2.0 * q @ k.T, 1))


PEAK = """
import resource, torch, sslfast
n, d = 8192, 64
q, k = torch.randn(n, d).mul_(0.1).requires_grad_(), torch.randn(n, d).mul_(0.1).requires_grad_()
def step(n):
    a, b = q[:n].detach().requires_grad_(), k[:n].detach().requires_grad_()
    row, col = sslfast.similarity_lse(a, b, 1.0, columns=True)
    (row.sum() + col.sum()).backward()
    sslfast.similarity_lse(a, None, 1.0).sum().backward()
    sslfast.similarity_lse(a, b.detach(), 1.0).sum().backward()
    sslfast.similarity_logsigmoid(a, b, 1.0).backward()
step(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_extra_memory() -> None:
    """The matrix would be 256 MiB; a step of any path stays below 64 MiB and the gradients (4 MiB)."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 72
