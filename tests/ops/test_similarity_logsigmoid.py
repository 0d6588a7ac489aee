"""similarity_logsigmoid on the CPU: value and every gradient against the reference in float64, and its contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import reference

pytestmark = pytest.mark.sanitize

SHAPES = [(64, 64, 64), (100, 70, 48), (61, 127, 31), (1, 9, 8), (9, 1, 8), (33, 20, 1), (500, 401, 20)]


def by(function: Any, tensors: list[Tensor], ids: tuple[Tensor, Tensor], kind: torch.dtype) -> tuple[Tensor, ...]:
    """Loss and its gradients for q, k, scale and bias in ``kind``; scalars at least float32."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    cast = [t.detach().to(kind if t.dim() else wide, copy=True).requires_grad_() for t in tensors]
    if function is reference.similarity_logsigmoid:
        cast[2:] = [t.detach().to(kind).requires_grad_() for t in cast[2:]]
    loss = function(*cast, row_ids=ids[0], col_ids=ids[1])
    return (loss.detach(), *torch.autograd.grad(1.7 * loss, cast))


def check(tensors: list[Tensor], ids: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) if t.dim() else t for t in tensors]
    mine = by(sslfast.similarity_logsigmoid, tensors, ids, dtype)
    truth = by(reference.similarity_logsigmoid, tensors, ids, torch.float64)
    plain = roundings(by, reference.similarity_logsigmoid, tensors, ids, dtype)
    for name, a, right, own in zip(("loss", "dq", "dk", "dscale", "dbias"), mine, truth, plain, strict=True):
        # dscale and dbias sum terms of both signs: their floor is what one row of pairs adds.
        within_budget(name, a, own, right, dtype, floor=1.0 if name in ("dscale", "dbias") else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, d = shape
    tensors = [torch.randn(m, d), torch.randn(n, d), torch.tensor(2.0 / d**0.5), torch.tensor(-1.5)]
    check(tensors, (torch.randint(0, 9, (m,)), torch.randint(0, 9, (n,))), dtype)


@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (110.0, -13.0), (-40.0, 3.0), (500.0, 0.0)])
def test_extreme_logits(scale: float, bias: float) -> None:
    """SigLIP's initial scale and bias, trained ones, and logits whose exponentials leave float32's range."""
    q, k = (torch.nn.functional.normalize(torch.randn(n, 24)) for n in (90, 90))
    k[:45] = torch.nn.functional.normalize(q[:45] + 0.1 * k[:45])
    ids = torch.arange(90)
    check([q, k, torch.tensor(scale), torch.tensor(bias)], (ids, ids), torch.float32)


def test_default_ids_are_positions() -> None:
    q, k, ids = torch.randn(12, 5), torch.randn(12, 5), torch.arange(12)
    right = reference.similarity_logsigmoid(q, k, 2.0, -1.0, row_ids=ids, col_ids=ids)
    torch.testing.assert_close(sslfast.similarity_logsigmoid(q, k, 2.0, -1.0), right)


def test_every_subset_of_gradients() -> None:
    tensors = [torch.randn(20, 6), torch.randn(30, 6), torch.tensor(1.0), torch.tensor(-1.0)]
    ids = torch.arange(20), torch.arange(30)
    full = by(sslfast.similarity_logsigmoid, tensors, ids, torch.float32)[1:]
    for chosen in range(1, 16):
        some = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(tensors)]
        (1.7 * sslfast.similarity_logsigmoid(*some, row_ids=ids[0], col_ids=ids[1])).backward()
        for i, (t, right) in enumerate(zip(some, full, strict=True)):
            if chosen >> i & 1:
                torch.testing.assert_close(t.grad, right)
            else:
                assert t.grad is None


def test_nonfinite_rows_and_repeats() -> None:
    q, k = torch.randn(300, 6, requires_grad=True), torch.randn(230, 6)
    one, two = (torch.autograd.grad(sslfast.similarity_logsigmoid(q, k, 1.0), q)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert sslfast.similarity_logsigmoid(q, k.index_fill(0, torch.tensor([3]), float("nan")), 1.0).isnan()


def test_second_order_opcheck_and_compile() -> None:
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (6, 3), (), ())]
    torch.autograd.gradcheck(sslfast.similarity_logsigmoid, tensors)
    torch.autograd.gradgradcheck(sslfast.similarity_logsigmoid, tensors)
    q, k = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    one = torch.tensor(1.0, requires_grad=True)
    arguments = (q, k, one, one, torch.arange(9), torch.arange(7), True, True)
    torch.library.opcheck(torch.ops.sslfast.similarity_logsigmoid.default, arguments)
    compiled = torch.compile(sslfast.similarity_logsigmoid, fullgraph=True)
    a = torch.autograd.grad(compiled(q, k, one, -1.0), (q, k, one))
    torch.testing.assert_close(a, torch.autograd.grad(sslfast.similarity_logsigmoid(q, k, one, -1.0), (q, k, one)))


def test_bad_arguments() -> None:
    q, k, ids = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    with pytest.raises(ValueError, match="given together"):
        sslfast.similarity_logsigmoid(q, k, 1.0, row_ids=ids)
    with pytest.raises(ValueError, match=r"col_ids must have shape \(5,\)"):
        sslfast.similarity_logsigmoid(q, k, 1.0, row_ids=ids, col_ids=ids)
    with pytest.raises(ValueError, match="same width"):
        sslfast.similarity_logsigmoid(q, k[:, :2], 1.0)
    with pytest.raises(ValueError, match="bias must be a float"):
        sslfast.similarity_logsigmoid(q, k, 1.0, torch.zeros(5))


def test_reference_backend() -> None:
    q, k = torch.randn(9, 4), torch.randn(7, 4)
    with sslfast.use_backend("reference"):
        plain = sslfast.similarity_logsigmoid(q, k, 2.0, -1.0)
    torch.testing.assert_close(sslfast.similarity_logsigmoid(q, k, 2.0, -1.0), plain)
