"""The Triton kernel of similarity_logsigmoid: values and gradients, through the interpreter where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, same_nonfinite, within_budget
from sslfast import reference
from triton_common import DEVICE, MARKS

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, columns, features): one row; one column; one feature; several ragged tiles; two products (more than 128
# features); more than one chunk of the gradient (more than 256).
SHAPES = [(1, 40, 8), (35, 1, 5), (33, 20, 1), (67, 50, 13), (20, 35, 130), (20, 33, 300)]
NAMES = ("loss", "dq", "dk", "dscale", "dbias")


def make(m: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rows that resemble columns, several positives a row and rows without any."""
    random = torch.Generator().manual_seed(0)
    k = torch.randn(n, d, generator=random)
    chosen = torch.randint(0, n, (m,), generator=random)
    col_ids = torch.randint(0, 12, (n,), generator=random) << 33
    row_ids = torch.where(torch.arange(m) % 5 == 4, -1, col_ids[chosen])
    q = 0.5 * k[chosen] + torch.randn(m, d, generator=random)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "row_ids": row_ids, "col_ids": col_ids}
    return {name: t.to(DEVICE) for name, t in tensors.items()}


def run(function: Any, a: dict[str, Tensor], scale: float, bias: float, dtype: torch.dtype) -> list[Tensor]:
    """Loss and its gradients in q, k, scale and bias, computed in ``dtype``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [a[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k")]
    leaves += [torch.tensor(x, dtype=wide, device=DEVICE, requires_grad=True) for x in (scale, bias)]
    loss = function(*leaves, row_ids=a["row_ids"], col_ids=a["col_ids"])
    return [loss, *torch.autograd.grad(3 * loss, leaves)]


def check(a: dict[str, Tensor], scale: float, bias: float, name: str = "") -> list[Tensor]:
    dtype = a["q"].dtype
    with sslfast.use_backend("triton"):
        kernel = run(sslfast.similarity_logsigmoid, a, scale, bias, dtype)
    plain = roundings(run, reference.similarity_logsigmoid, a, scale, bias, dtype)
    truth = run(reference.similarity_logsigmoid, a, scale, bias, torch.float64)
    for what, *values in zip(NAMES, kernel, plain, truth, strict=True):
        within_budget(f"{name}{what}", *values, dtype)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make(*shape, dtype), 0.4, -1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 0.0), (-5.0, 2.0)])
def test_normalized_rows(scale: float, bias: float, dtype: torch.dtype) -> None:
    """SigLIP's start (scale 10, bias −10), and logits up to 100."""
    a = make(35, 40, 24)
    a |= {name: torch.nn.functional.normalize(a[name], dim=1).to(dtype) for name in ("q", "k")}
    check(a, scale, bias)


def test_tiny_losses_are_not_lost_beside_one() -> None:
    """log(1 + e) of e = exp(−15) and exp(−40), in every pair."""
    a = make(33, 40, 8)
    a["row_ids"] = torch.full_like(a["row_ids"], -1)
    for bias in (-15.0, -40.0):
        a["q"] = 0.01 * a["q"]
        loss = check(a, 1.0, bias)[0]
        truth = run(reference.similarity_logsigmoid, a, 1.0, bias, torch.float64)[0]
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)


def test_few_and_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import _owner

    a = make(40, 110, 6)
    for split in (1, 2, 4):
        monkeypatch.setattr(_owner, "best_split", lambda programs, slots, most, split=split: split)
        check(a, 0.7, -1.0, name=f"{split} programs ")


def test_every_subset_of_gradients() -> None:
    a = make(20, 17, 6)
    names = ("q", "k", "scale", "bias")
    values = [a["q"], a["k"], torch.tensor(0.7, device=DEVICE), torch.tensor(-0.5, device=DEVICE)]
    full = [g / 3 for g in run(reference.similarity_logsigmoid, a, 0.7, -0.5, torch.float32)[1:]]
    for wanted in itertools.product((False, True), repeat=4):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(values, wanted, strict=True)]
        with sslfast.use_backend("triton"):
            loss = sslfast.similarity_logsigmoid(*leaves, row_ids=a["row_ids"], col_ids=a["col_ids"])
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        for name, leaf, w, expected in zip(names, leaves, wanted, full, strict=True):
            assert (leaf.grad is not None) == w, (wanted, name)
            if w:
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_rows(bad: float) -> None:
    a = make(20, 25, 8)
    a["k"][7, 3] = bad
    with sslfast.use_backend("triton"):
        kernel = run(sslfast.similarity_logsigmoid, a, 0.5, -1.0, torch.float32)
    plain = run(reference.similarity_logsigmoid, a, 0.5, -1.0, torch.float32)
    for name, x, y in zip(NAMES, kernel, plain, strict=True):
        same_nonfinite(name, x, y)
    assert not kernel[0].isfinite()


def test_strided_inputs() -> None:
    a = make(20, 33, 10)
    strided = {
        "q": a["q"].T.contiguous().T,
        "k": torch.stack([a["k"], a["k"]], 2)[:, :, 1],
        **{name: torch.stack([a[name], a[name]], 1)[:, 1] for name in ("row_ids", "col_ids")},
    }
    with sslfast.use_backend("triton"):
        expected, found = (sslfast.similarity_logsigmoid(scale=0.5, bias=-1.0, **given) for given in (a, strided))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run(dtype: torch.dtype) -> None:
    a = make(40, 50, 20, dtype)
    with sslfast.use_backend("triton"):
        first, second = (run(sslfast.similarity_logsigmoid, a, 0.3, -1.0, dtype) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_opcheck() -> None:
    a = make(6, 5, 4)
    q, k = (a[name].requires_grad_() for name in ("q", "k"))
    scale, bias = (torch.tensor(x, device=DEVICE, requires_grad=True) for x in (0.5, -1.0))
    for need_q, need_k in ((True, True), (False, True), (False, False)):
        arguments = (q, k, scale, bias, a["row_ids"], a["col_ids"], need_q, need_k)
        tests = ("test_schema", "test_faketensor")  # gradients need what they ask for
        torch.library.opcheck(torch.ops.sslfast.similarity_logsigmoid_triton, arguments, test_utils=tests)
