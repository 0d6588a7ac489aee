"""The Triton kernels of similarity_lse: values and gradients, through the interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, same_nonfinite, within_budget
from sslfast import reference
from sslfast.ops.similarity_lse import similarity_terms
from triton_common import DEVICE, MARKS

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, columns, features): one row; one column; one feature; ragged; several blocks and tiles; two products (more than
# 128 features); more than one chunk of the gradient (more than 256).
SHAPES = [(1, 40, 8), (70, 1, 5), (33, 20, 1), (67, 97, 13), (40, 70, 130), (20, 35, 300)]
OUTPUTS = ("row_lse", "col_lse", "positive", "hardest")
INPUTS = ("dq", "dk", "dscale", "dbias")


def make(m: int, n: int, d: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, Any]:
    """Arguments with everything on: rows that resemble a column each, bias, ids in common, rows without positive."""
    random = torch.Generator().manual_seed(seed)
    k = torch.randn(n, d, generator=random)
    positives = torch.randint(0, n, (m,), generator=random)
    q = 0.5 * k[positives] + torch.randn(m, d, generator=random)
    positives[::4] = -1
    tensors = {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "bias": torch.randn(n, generator=random),
        "row_ids": torch.randint(0, 9, (m,), generator=random) - 4,
        "col_ids": torch.randint(0, 9, (n,), generator=random) - 4,
        "positives": positives,
    }
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def run(
    function: Any, arguments: dict[str, Any], scale: float, wide: torch.dtype, weights: list[Tensor], **flags: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs [4] and the gradients of their weighted sum in q, k, scale and bias, computed in ``wide``."""
    kind = torch.float64 if wide == torch.float64 else torch.float32
    given = dict(arguments)
    q = given.pop("q").to(wide, copy=True).requires_grad_()
    k = given.pop("k").to(wide, copy=True).requires_grad_()
    tau = torch.tensor(scale, dtype=kind, device=DEVICE, requires_grad=True)
    leaves = [q, k, tau]
    if given.get("bias") is not None:
        given["bias"] = given["bias"].to(kind, copy=True).requires_grad_()
        leaves.append(given["bias"])
    outputs = [t for t in function(q, k, tau, **given, **flags) if t is not None]
    # Rows without any pair: −inf times their weight would be all there is.
    total = sum((w * t.masked_fill(t == -torch.inf, 0.0)).sum() for w, t in zip(weights, outputs, strict=False))
    return outputs, list(torch.autograd.grad(total, leaves))


def check(arguments: dict[str, Any], scale: float, *, name: str = "") -> list[Tensor]:
    """Everything the kernels can give against the reference in float64, by the error budget."""
    (m, _), n, dtype = arguments["q"].shape, len(arguments["k"]), arguments["q"].dtype
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(size, generator=random).to(DEVICE) for size in (m, n, m)]
    if arguments.get("positives") is not None:  # as a cross entropy has it
        weights[2] = -weights[0]
    with sslfast.use_backend("triton"):
        kernel = run(similarity_terms, arguments, scale, dtype, weights, columns=True, hardest=True)
    plain = roundings(run, reference.similarity_terms, arguments, scale, dtype, weights)
    truth = run(reference.similarity_terms, arguments, scale, torch.float64, weights)
    outputs = OUTPUTS if arguments.get("positives") is not None else ("row_lse", "col_lse", "hardest")
    if len(outputs) == 3:
        plain, truth = (([t for i, t in enumerate(a) if i != 2], b) for a, b in (plain, truth))
    for what, *values in zip(outputs, kernel[0], plain[0], truth[0], strict=True):
        empty = values[2] == -torch.inf
        assert torch.equal(values[0] == -torch.inf, empty), f"{name}{what}"
        within_budget(f"{name}{what}", *(t.masked_fill(empty, 0.0) for t in values), dtype)
    # dscale is a sum over rows of q·dq / scale, of both signs.
    terms = (arguments["q"].double() * truth[1][0]).sum(1).abs().sum().item() / abs(scale)
    for what, *values in zip(INPUTS, kernel[1], plain[1], truth[1], strict=False):
        within_budget(f"{name}{what}", *values, dtype, floor=terms if what == "dscale" else 1e-6)
    return [*kernel[0], *kernel[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make(*shape, dtype), 1.5 / shape[2] ** 0.5)


@pytest.mark.parametrize("scale", [100.0, -3.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_of_normalized_rows(scale: float, dtype: torch.dtype) -> None:
    arguments = make(40, 45, 24)
    for name in ("q", "k"):
        arguments[name] = torch.nn.functional.normalize(arguments[name], dim=1).to(dtype)
    check(arguments, scale)


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of excluded pairs, not used
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_logits_within_a_bound(size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums relative to 0 where the norms allow it, to the maximum where not, or where there is a bias."""
    from sslfast.kernels import similarity_lse as kernel

    monkeypatch.setattr(kernel, "BOUND_FROM", 0)
    arguments = make(45, 70, 12, dtype)
    arguments["bias"] *= size
    check(arguments, 0.5 * size, name=f"{size} ")
    check({name: t for name, t in arguments.items() if name != "bias"}, 0.5 * size)
    test_excluded_rows_and_columns()
    q, k = arguments["q"], arguments["k"]
    scale = torch.tensor(0.5 * size, device=DEVICE)
    found = kernel.similarity_forward(q, k, scale, None, None, None, None, True, False)
    bound = 0.5 * size * q.float().norm(dim=1).max() * k.float().norm(dim=1).max() / torch.log(torch.tensor(2.0))
    for top in (found[4], found[6]):
        assert bool((top == 0).all()) == (bound.item() < 59)


@pytest.mark.parametrize("absent", [("bias",), ("row_ids", "col_ids"), ("positives",), ("bias", "row_ids", "col_ids")])
def test_without(absent: tuple[str, ...]) -> None:
    check({name: t for name, t in make(45, 70, 12).items() if name not in absent}, 0.5)


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_float16_weights_stay_in_range(unit: float) -> None:
    """Gradients of the LSE that float16 itself could not hold."""
    from sslfast.kernels import similarity_lse as kernel

    a = make(40, 50, 16, torch.float16)
    scale, pairs = torch.tensor(0.3, device=DEVICE), (a["bias"], a["row_ids"], a["col_ids"], a["positives"])
    _, _, _, _, *saved = kernel.similarity_forward(a["q"], a["k"], scale, *pairs, True, False)
    grads = [unit * torch.randn(size, device=DEVICE) for size in (40, 50, 40)]
    found = kernel.similarity_backward(*grads, a["q"], a["k"], scale, *pairs, *saved, True, True, True)
    plain = roundings(run, reference.similarity_terms, a, 0.3, torch.float32, grads)[1]
    truth = run(reference.similarity_terms, a, 0.3, torch.float64, grads)[1]
    for what, *values in zip(INPUTS, found, plain, truth, strict=True):
        within_budget(what, *values, torch.float16, floor=1e-6 * unit)


def test_a_dominant_positive() -> None:
    """P_ip is nearly 1: what is left of the gradient is a difference of nearly equal numbers."""
    k = torch.nn.functional.normalize(make(1, 40, 32)["k"], dim=1)
    q = torch.nn.functional.normalize(k + 0.02 * torch.randn(40, 32).to(DEVICE), dim=1)
    both = torch.arange(40, device=DEVICE)
    result = check({"q": q, "k": k, "positives": both}, 20.0)
    assert 0 < (result[0] - result[2]).mean() < 1e-4


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the exponentials of excluded pairs, not used
def test_excluded_rows_and_columns() -> None:
    """A row and a column without any pair: −inf and no gradient, also where their logits are far from 0."""
    arguments = make(50, 60, 9)
    arguments["row_ids"] = torch.zeros(50, dtype=torch.long, device=DEVICE)
    arguments["col_ids"] = torch.arange(60, device=DEVICE) % 2
    arguments["bias"][::2] = 500.0
    row, col, *_ = check(arguments, 0.5)
    assert (col == -torch.inf).sum() == 30
    arguments["col_ids"] = torch.zeros(60, dtype=torch.long, device=DEVICE)
    row, col, _, hardest, *grads = check(arguments, 0.5)
    assert (row == -torch.inf).all() and (col == -torch.inf).all() and (hardest == -torch.inf).all()
    only_row = {"q": arguments["q"][:3], "k": arguments["k"], "row_ids": torch.tensor([0, 1, 0], device=DEVICE)}
    attend(only_row | {"col_ids": arguments["col_ids"], "bias": arguments["bias"]}, 0.5)


def test_wide_ids() -> None:
    """Ids are compared in all of their 64 bits."""
    arguments = make(40, 40, 6)
    arguments["row_ids"] = torch.arange(40, device=DEVICE) << 32
    arguments["col_ids"] = torch.arange(40, device=DEVICE) << 33
    check(arguments, 0.5)


def test_positives_outside_k_are_none() -> None:
    q, k = torch.randn(40, 6, device=DEVICE), torch.randn(10, 6, device=DEVICE)
    positives = torch.arange(40, device=DEVICE) - 20
    one = torch.ones((), device=DEVICE)
    from sslfast.kernels import similarity_lse as kernel

    positive = kernel.similarity_forward(q, k, one, None, None, None, positives, False, False)[2]
    inside = (positives >= 0) & (positives < 10)
    assert not positive[~inside].any()
    torch.testing.assert_close(positive[inside], (q[inside] * k[positives[inside]]).sum(1))


def attend(arguments: dict[str, Any], scale: float, name: str = "") -> None:
    """Only q (and scale) learn: the mean of k comes along in the forward."""
    dtype = arguments["q"].dtype
    weight = torch.randn(len(arguments["q"]), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def step(function: Any, kind: torch.dtype) -> list[Tensor]:
        given = {n: t.to(kind) if t.is_floating_point() else t for n, t in arguments.items()}
        wide = torch.float64 if kind == torch.float64 else torch.float32
        q, tau = given.pop("q").clone().requires_grad_(), torch.tensor(scale, dtype=wide, device=DEVICE)
        lse = function(q, given.pop("k"), tau.requires_grad_(), **given)
        return [lse, *torch.autograd.grad((weight * lse.masked_fill(lse == -torch.inf, 0.0)).sum(), (q, tau))]

    with sslfast.use_backend("triton"):
        kernel = step(sslfast.similarity_lse, dtype)
    for what, *values in zip(
        ("row_lse", "dq", "dscale"),
        kernel,
        roundings(step, reference.similarity_lse, dtype),
        step(reference.similarity_lse, torch.float64),
        strict=True,
    ):
        empty = values[2] == -torch.inf
        assert torch.equal(values[0] == -torch.inf, empty)
        within_budget(f"{name}{what}", *(t.masked_fill(empty, 0.0) for t in values), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = make(*shape, dtype)
    del arguments["positives"]
    attend(arguments, 1.5 / shape[2] ** 0.5)


def test_attend_with_few_and_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import _owner

    arguments = make(20, 700, 6)
    del arguments["positives"]
    for split in (1, 3, 22):
        monkeypatch.setattr(_owner, "best_split", lambda programs, slots, most, split=split: split)
        attend(arguments, 2.0, name=f"{split} programs ")


def test_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """More row blocks than a band holds, runs of several tiles, the last one ragged, parts in the backward."""
    from sslfast.kernels import _owner, similarity_lse as kernel

    block = kernel.config_for(
        kernel.SIMILARITY_FORWARD, kernel.architecture(torch.empty(0, device=DEVICE)), 4, 16
    ).block_m
    arguments = make(block * 4 + 3, 150, 16)  # five row blocks
    whole = check(arguments, 0.2)
    for band, programs, parts in ((2, 1024, 1), (2, 3, 2), (64, 7, 3)):
        monkeypatch.setattr(kernel, "BAND", band)
        monkeypatch.setattr(kernel, "multiprocessors", lambda q: 1)
        monkeypatch.setattr(kernel, "FORWARD_PROGRAMS", programs)
        monkeypatch.setattr(_owner, "best_split", lambda programs, slots, most, parts=parts: parts)
        values = check(arguments, 0.2, name=f"bands of {band} ")
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=2e-5)


def test_self_gradient_in_one_launch() -> None:
    """q = k: with the rows' statistics as the columns', dq is the whole gradient of the row LSE."""
    from sslfast.kernels import similarity_lse as kernel

    z, scale = torch.randn(75, 20, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    ids = torch.arange(75, device=DEVICE)
    grad = torch.randn(75, device=DEVICE)
    lse, _, _, _, top, total, _, _ = kernel.similarity_forward(z, z, scale, None, ids, ids, None, False, False)
    saved = (top, total, top, total)
    dz, _, dscale, _ = kernel.similarity_backward(
        grad, grad, None, z, z, scale, None, ids, ids, None, *saved, True, False, False
    )
    wide = z.double().requires_grad_()
    tau = scale.double().requires_grad_()
    truth = reference.similarity_lse(wide, wide, tau, row_ids=ids, col_ids=ids)
    torch.testing.assert_close(lse.double(), truth.detach(), rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad((truth * grad).sum(), (wide, tau))
    torch.testing.assert_close((dz.double(), dscale.double() / 2), expected, rtol=1e-4, atol=1e-5)


def test_statistics() -> None:
    """The maximum is the maximum itself, in base 2, and the sum is relative to it."""
    from sslfast.kernels import similarity_lse as kernel

    q, k = torch.randn(45, 12, device=DEVICE), torch.randn(70, 12, device=DEVICE)
    found = kernel.similarity_forward(q, k, torch.tensor(0.6, device=DEVICE), None, None, None, None, True, False)
    assert found[2].shape == found[3].shape == (0,)
    x = 0.6 * (q.double() @ k.double().T) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    for axis, (top, total) in ((1, found[4:6]), (0, found[6:8])):
        torch.testing.assert_close(top.double(), x.amax(axis), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total.double(), (x - x.amax(axis, True)).exp2().sum(axis), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_rows(bad: float) -> None:
    arguments = make(40, 45, 8)
    arguments["k"][7, 3] = bad
    arguments["bias"][20] = -torch.inf  # a way to take a column out
    weights = [torch.ones(size, device=DEVICE) for size in (40, 0, 40)]
    with sslfast.use_backend("triton"):
        kernel = run(similarity_terms, arguments, 0.5, torch.float32, weights[:1], columns=True, hardest=True)
    plain = run(reference.similarity_terms, arguments, 0.5, torch.float32, weights[:1])
    for name, a, b in zip((*OUTPUTS, *INPUTS), kernel[0] + kernel[1], plain[0] + plain[1], strict=True):
        same_nonfinite(name, a, b)
    assert not kernel[0][0].isfinite().all()


def test_every_subset_of_gradients() -> None:
    arguments = make(35, 40, 6)
    names = ("q", "k", "scale", "bias")
    arguments["scale"] = torch.tensor(0.4, device=DEVICE)
    ids = {name: arguments[name] for name in ("row_ids", "col_ids")}
    positives = arguments["positives"]

    def grads(wanted: tuple[bool, ...], backend: str) -> list[Tensor | None]:
        leaves = [arguments[name].clone().requires_grad_(w) for name, w in zip(names, wanted, strict=True)]
        with sslfast.use_backend(backend):
            terms = similarity_terms(*leaves[:3], bias=leaves[3], positives=positives, **ids)
            loss = (terms.row_lse - terms.positive).sum()
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            (loss * 3).backward()
        return [leaf.grad for leaf in leaves]

    full = grads((True,) * 4, "reference")
    for wanted in itertools.product((False, True), repeat=4):
        for name, w, g, expected in zip(names, wanted, grads(wanted, "triton"), full, strict=True):
            assert (g is not None) == w, (wanted, name)
            if g is not None:
                torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_one_output_alone() -> None:
    arguments = make(40, 35, 7)
    for index in range(3):

        def only(*args: Any, index: int = index, **kwargs: Any) -> list[Tensor]:
            return [t for i, t in enumerate(similarity_terms(*args, **kwargs)) if i == index]

        def only_plain(*args: Any, index: int = index, **kwargs: Any) -> list[Tensor]:
            return [reference.similarity_terms(*args, **kwargs)[index]]

        weights = [torch.randn((40, 35, 40)[index], device=DEVICE)]
        with sslfast.use_backend("triton"):
            kernel = run(only, arguments, 0.5, torch.float32, weights, columns=True)
        plain = run(only_plain, arguments, 0.5, torch.float32, weights)
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_strided_inputs() -> None:
    a = make(33, 40, 10)
    strided = {
        "q": a["q"].T.contiguous().T,
        "k": torch.stack([a["k"], a["k"]], 2)[:, :, 1],
        **{name: torch.stack([t, t], 1)[:, 1] for name, t in a.items() if t.dim() == 1},
    }
    flags = {"columns": True, "hardest": True}
    with sslfast.use_backend("triton"):
        expected, found = (similarity_terms(scale=0.5, **given, **flags) for given in (a, strided))
        assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
        q, k = (a[name].clone().requires_grad_() for name in ("q", "k"))
        sslfast.similarity_lse(q, k, 0.5).sum().backward()  # the incoming gradient has stride 0
    dq, dk = q.grad.clone(), k.grad.clone()
    q.grad = k.grad = None
    reference.similarity_lse(q, k, 0.5).sum().backward()
    torch.testing.assert_close((dq, dk), (q.grad, k.grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run(dtype: torch.dtype) -> None:
    arguments = make(70, 80, 40, dtype)
    weights = [torch.randn(size, device=DEVICE) for size in (70, 80, 70)]
    with sslfast.use_backend("triton"):
        first, second = (
            run(similarity_terms, arguments, 0.3, dtype, weights, columns=True, hardest=True) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


def test_opcheck() -> None:
    a = make(6, 5, 4)
    q, k, bias = (a[name].requires_grad_() for name in ("q", "k", "bias"))
    scale = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    pairs = (bias, a["row_ids"], a["col_ids"])
    full = (q, k, scale, *pairs, a["positives"], True, True, 0)
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_triton, full)
    torch.library.opcheck(
        torch.ops.sslfast.similarity_lse_attend_triton, (q, k.detach(), scale, bias.detach(), *pairs[1:])
    )
    with torch.no_grad():
        row, col, positive, _, *saved = torch.ops.sslfast.similarity_lse_triton(*full)
    grads = tuple(torch.ones_like(t) for t in (row, col, positive))
    inputs = tuple(t.detach() for t in (q, k, scale, bias))
    arguments = (*grads, *inputs, *pairs[1:], a["positives"], *saved, True, True, True)
    torch.library.opcheck(torch.ops.sslfast.similarity_lse_triton_backward, arguments)


@pytest.mark.parametrize("with_ids", [False, True])
def test_rows_against_themselves_with_positives(with_ids: bool) -> None:
    """The public call with one tensor: positives that are not mutual, and rows without one."""
    z = torch.randn(50, 12, device=DEVICE, requires_grad=True)
    ids = torch.arange(50, device=DEVICE) // 2 if with_ids else None
    positives = torch.randint(-1, 50, (50,)).to(DEVICE)
    weight = torch.linspace(0.5, 1.5, 50, device=DEVICE)
    results = []
    for backend, kind in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        x = z.detach().to(kind).requires_grad_()
        scale = torch.tensor(0.5, dtype=kind, device=DEVICE, requires_grad=True)
        with sslfast.use_backend(backend):
            terms = sslfast.similarity_terms(x, None, scale, row_ids=ids, positives=positives)
        loss = (terms.row_lse * weight - terms.positive * weight.flip(0)).sum()
        results.append((loss, *torch.autograd.grad(loss, (x, scale))))
    for name, mine, right, own in zip(("loss", "dz", "dscale"), *results, strict=True):
        within_budget(name, mine, own, right, torch.float32, floor=1.0)
