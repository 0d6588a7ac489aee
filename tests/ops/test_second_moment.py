"""second_moment on the CPU, in both forms: sums and gradients against the reference in float64, and its contracts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import at_levels, reference_moment, roundings, within_budget
from sslfast.ops.types import dual_is_cheaper

pytestmark = pytest.mark.sanitize

op = sslfast.ops.second_moment

# (rows, columns): aligned, ragged, prime, one row, one column, wider than a block of rows or of columns.
SHAPES = [(64, 64), (100, 48), (61, 127), (3, 5), (1, 8), (33, 1), (200, 450), (450, 200), (20, 1100), (1500, 33)]
KINDS = [  # (pair, cross, center, scale)
    (True, True, True, "variance"),  # Barlow Twins
    (True, False, True, "none"),  # VICReg
    (True, False, True, "norm"),  # VIbCReg
    (False, False, False, "norm"),  # FroSSL
    (True, True, False, "none"),  # spectral contrastive, transposed
    (False, False, True, "variance"),
]
Kind = tuple[bool, bool, bool, str]


def by(
    function: Callable[..., Any], a: Tensor, b: Tensor | None, kind: Kind, dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """The three outputs and the gradients of a weighted sum of them, in ``dtype``."""
    _, cross, center, scale = kind
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in (a, b) if x is not None]
    given = inputs if len(inputs) == 2 else [*inputs, None]
    out = function(*given, cross=cross, center=center, scale=scale, eps=1e-5, **options)
    n, d = a.shape
    weights = torch.linspace(0.5, 1.5, out.diagonal.numel(), dtype=torch.float64).view_as(out.diagonal)
    size = float(reference_moment(a.double(), None, center=center, scale=scale).diagonal.abs().max()) or 1.0
    loss = (out.off_diagonal.double() * torch.tensor([1.3, 0.7])[: len(out.off_diagonal)]).sum() / size
    loss = loss + (weights * out.diagonal.double()).sum() + 0.3 * out.distance.double()
    grads = torch.autograd.grad(loss, inputs)
    return {**out._asdict(), **{f"d{name}": g for name, g in zip("ab", grads, strict=False)}}


def batches(n: int, d: int, kind: Kind, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    a = torch.randn(n, d) + torch.linspace(-2, 2, d)
    b = (0.6 * a + 0.8 * torch.randn(n, d)).to(dtype)
    return a.to(dtype), b if kind[0] else None


def check(a: Tensor, b: Tensor | None, kind: Kind, dtype: torch.dtype, **options: Any) -> None:
    mine = by(sslfast.second_moment, a, b, kind, dtype, **options)
    truth = by(reference_moment, a, b, kind, torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = roundings(by, reference_moment, a, b, kind, wide)
    for name, right in truth.items():
        if name.startswith("d") and len(name) == 2:  # gradients are rounded to the inputs' dtype
            floor = 0.1 if a.shape[1] == 1 else 1e-2  # of one column the gradients cancel, at a norm to nothing
            within_budget(name, mine[name], plain[name].to(dtype), right, dtype, floor=floor)
        else:  # the dual form's sum is what is left of ‖M‖² without the diagonal's squares
            dual_sum = name == "off_diagonal" and options.get("form") == "dual"
            floor = truth["diagonal"].detach().square().sum().item() if dual_sum else 1e-3
            within_budget(name, mine[name], plain[name], right, wide, floor=floor)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", at_levels(SHAPES, [(61, 127)]), ids=str)
def test_sums_and_gradients(shape: tuple[int, int], kind: Kind, form: str) -> None:
    a, b = batches(*shape, kind, torch.float32)
    check(a, b, kind, torch.float32, form=form)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_dtypes(kind: Kind, form: str, dtype: torch.dtype) -> None:
    for shape in [(61, 127), (127, 61), (200, 33)]:
        a, b = batches(*shape, kind, dtype)
        check(a, b, kind, dtype, form=form)


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_moments_that_were_not_kept(kind: Kind, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide matrices are not kept: their tiles are computed again. Dual form keeps always; the operator need not."""
    monkeypatch.setattr(op, "KEPT", 0)
    for shape in [(61, 230), (230, 61)]:
        a, b = batches(*shape, kind, torch.float32)
        if form == "primal":
            check(a, b, kind, torch.float32, form="primal")
        options = (kind[1], kind[2], op.SCALES.index(kind[3]), 1e-5, form == "dual")
        grads = []
        for keep in (True, False):
            out = torch.ops.sslfast.second_moment(a, b, *options, keep)
            assert out[5].numel() == (
                0 if not keep else out[5].shape[0] * (shape[0] if form == "dual" else shape[1]) ** 2
            )
            ones = [torch.ones_like(x) for x in out[:3]]
            rest = (a, b, out[1], out[3], out[4], out[5], *options, True, b is not None)
            grads.append(torch.ops.sslfast.second_moment_backward(*ones, *rest))
        for kept, again in zip(*grads, strict=True):
            torch.testing.assert_close(
                again, kept, rtol=1e-4, atol=1e-4 * (kept.abs().max().item() if len(kept) else 1)
            )


@pytest.mark.levels
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_every_subset_of_gradients(form: str) -> None:
    for cross in (True, False):
        a, b = torch.randn(40, 70), torch.randn(40, 70)

        def function(x: Tensor, y: Tensor, cross: bool = cross) -> Tensor:
            return sslfast.second_moment(x, y, cross=cross, form=form).off_diagonal.sum()

        full = [t.clone().requires_grad_() for t in (a, b)]
        right = torch.autograd.grad(function(*full), full)
        for chosen in (0, 1):
            some = [t.clone().requires_grad_(i == chosen) for i, t in enumerate((a, b))]
            function(*some).backward()
            torch.testing.assert_close(some[chosen].grad, right[chosen])
            assert some[1 - chosen].grad is None
        one = a.clone().requires_grad_()  # both arguments are the same leaf
        function(one, one).backward()
        pair = [a.clone().requires_grad_() for _ in range(2)]
        torch.testing.assert_close(one.grad, sum(torch.autograd.grad(function(*pair), pair)))


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_strides_repeats_and_nonfinite_rows(form: str) -> None:
    a, b = torch.randn(90, 60), torch.randn(60, 90).t()
    out = sslfast.second_moment(a[::2], b[::2], form=form)
    torch.testing.assert_close(out, sslfast.second_moment(a[::2].contiguous(), b[::2].contiguous(), form=form))
    runs = []
    for _ in range(2):
        x = [t.clone().requires_grad_() for t in (a, b)]
        terms = sslfast.second_moment(*x, cross=True, scale="variance", form=form)
        runs.append(torch.autograd.grad(terms.off_diagonal.sum() + terms.diagonal.square().sum(), x))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    a[7, 3] = float("nan")
    mine = sslfast.second_moment(a, b, form=form)
    right = reference_moment(a, b)
    assert mine.off_diagonal.isnan().tolist() == right.off_diagonal.isnan().tolist() == [True, False]
    assert torch.equal(mine.diagonal.isnan(), right.diagonal.isnan())
    assert mine.distance.isnan()
    x = [t.clone().requires_grad_() for t in (a, b)]
    same = sslfast.second_moment(*x, form=form).distance
    grads = torch.autograd.grad(same, x)
    assert grads[1].isnan().any(1).nonzero().tolist() == [[7]]  # of the other view only the same row


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape, form in [((70, 900), "dual"), ((900, 70), "primal"), ((5, 3), "primal")]:
            a, b = batches(*shape, KINDS[0], torch.float32)
            check(a, b, KINDS[0], torch.float32, form=form)
    finally:
        torch.set_num_threads(before)


def test_a_sum_of_squares_is_not_negative() -> None:
    """Columns that are orthogonal: in dual form nothing but rounding is left."""
    x = torch.zeros(100, 120)
    x[:, ::40] = 30 * torch.linalg.qr(torch.randn(100, 3))[0]
    for seed in range(5):
        torch.manual_seed(seed)
        assert (sslfast.second_moment(x + seed, center=False, form="dual").off_diagonal >= 0).all()


def test_cost_model() -> None:
    """Both sides of the border, the forms that the operator is asked for there, and that they agree."""
    assert dual_is_cheaper(256, 8192) and dual_is_cheaper(90, 100)
    assert not dual_is_cheaper(91, 100) and not dual_is_cheaper(4096, 512)
    for n, dual in ((90, True), (91, False)):
        a = torch.randn(n, 100, requires_grad=True)
        auto = sslfast.second_moment(a)
        forms = {form: sslfast.second_moment(a, form=form).off_diagonal for form in ("primal", "dual")}
        assert torch.equal(auto.off_diagonal, forms["dual" if dual else "primal"])
        torch.testing.assert_close(forms["primal"], forms["dual"], rtol=1e-5, atol=0)


def twice(x: Tensor, y: Tensor, cross: bool, center: bool, scale: str) -> tuple[Tensor, ...]:
    out = sslfast.second_moment(x, y, cross=cross, center=center, scale=scale, eps=1e-3)
    return out[:2] if cross else tuple(out)


def test_second_order_opcheck_and_compile() -> None:
    a, b = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for _, cross, center, scale in KINDS[:4]:
        torch.autograd.gradcheck(twice, (a, b, cross, center, scale))
        torch.autograd.gradgradcheck(twice, (a, b, cross, center, scale))
    x, y = torch.randn(9, 20, requires_grad=True), torch.randn(9, 20, requires_grad=True)
    for dual in (True, False):
        torch.library.opcheck(torch.ops.sslfast.second_moment.default, (x, y, True, True, 1, 1e-5, dual, True))
        torch.library.opcheck(torch.ops.sslfast.second_moment.default, (x, None, False, True, 0, 1e-5, dual, False))
    compiled = torch.compile(lambda x, y: sum(t.sum() for t in sslfast.second_moment(x, y)), fullgraph=True)
    found = torch.autograd.grad(compiled(x, y), (x, y))
    torch.testing.assert_close(found, torch.autograd.grad(sum(t.sum() for t in sslfast.second_moment(x, y)), (x, y)))


def test_extra_memory() -> None:
    """No D × D matrix in dual form: at N=64, D=6144 it would be 144 MiB, the inputs and gradients are 6 MiB."""
    program = (
        "import resource, torch, sslfast\n"
        "torch.set_num_threads(2)\n"
        "def step(n, d):\n"
        "    a, b = (torch.randn(n, d, requires_grad=True) for _ in range(2))\n"
        "    out = sslfast.second_moment(a, b)\n"
        "    (out.off_diagonal.sum() + out.diagonal.sum() + out.distance).backward()\n"
        "step(8, 64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "step(64, 6144)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024, f"{int(done.stdout) / 1024:.1f} MiB"


def test_bad_arguments() -> None:
    a = torch.randn(4, 3)
    cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "same shape", (a, a[:, :2]), {}),
        (TypeError, "same dtype", (a, a.double()), {}),
        (TypeError, "a must be float32", (a.long(),), {}),
        (ValueError, "a must be two-dimensional", (a[0],), {}),
        (ValueError, "b must have at least one row", (a, a[:0]), {}),
        (ValueError, "cross=True needs b", (a,), {"cross": True}),
        (ValueError, "scale must be one of.*'std'", (a,), {"scale": "std"}),
        (ValueError, "form must be one of.*'both'", (a,), {"form": "both"}),
        (ValueError, "eps must be a positive number, got 0", (a,), {"eps": 0.0}),
    ]
    for error, message, arguments, options in cases:
        with pytest.raises(error, match=message):
            sslfast.second_moment(*arguments, **options)
