"""Float32 products of the Triton kernels: exact, or in TF32, as PyTorch's own products, whichever way that was said."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

pytest.importorskip("triton")


def by_matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def by_backends(value: str) -> None:
    torch.backends.fp32_precision = value


def by_flag(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


old, new, every, flag = torch.set_float32_matmul_precision, by_matmul, by_backends, by_flag
Step = tuple[Callable[..., None], object]
# What was set, in order, and how float32 products are then made. After a mixture, reading the older interface raises.
SETTINGS: dict[str, tuple[list[Step], str]] = {
    "nothing": ([], "tf32x3"),
    "highest": ([(old, "highest")], "tf32x3"),
    "high": ([(old, "high")], "tf32"),
    "medium": ([(old, "medium")], "tf32"),
    "allowed": ([(flag, True)], "tf32"),
    "forbidden": ([(flag, False)], "tf32x3"),
    "new tf32": ([(new, "tf32")], "tf32"),
    "new ieee": ([(new, "ieee")], "tf32x3"),
    "new none": ([(new, "none")], "tf32x3"),
    "all tf32": ([(every, "tf32")], "tf32"),
    "all ieee": ([(every, "ieee")], "tf32x3"),
    "all bf16": ([(every, "bf16")], "tf32x3"),  # no precision of CUDA's
    "all tf32, new ieee": ([(every, "tf32"), (new, "ieee")], "tf32x3"),
    "all tf32, highest": ([(every, "tf32"), (old, "highest")], "tf32x3"),
    "high, new ieee": ([(old, "high"), (new, "ieee")], "tf32x3"),
    "highest, new tf32": ([(old, "highest"), (new, "tf32")], "tf32"),
    "new tf32, highest": ([(new, "tf32"), (old, "highest")], "tf32x3"),
    "new tf32, forbidden, new tf32": ([(new, "tf32"), (flag, False), (new, "tf32")], "tf32"),
}


def reset() -> None:
    old("highest")
    by_backends("none")
    by_matmul("none")


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    reset()
    yield
    reset()
    assert torch.backends.cuda.matmul.fp32_precision == "none" and torch.get_float32_matmul_precision() == "highest"


def clip(a: Tensor, b: Tensor) -> Tensor:
    return sslfast.clip(a, b, 10.0)


def attended(a: Tensor, b: Tensor) -> Tensor:
    """Keys that learn nothing: the forward makes the gradient."""
    return sslfast.similarity_lse(a, b.detach(), 5.0).mean()


LOSSES = {
    "nt_xent": sslfast.nt_xent,
    "clip": clip,
    "attended": attended,
    "sig_lip": lambda a, b: sslfast.sig_lip(a, b, 10.0, -10.0),
    "barlow_twins": sslfast.barlow_twins,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_made_as_pytorchs(setting: str) -> None:
    from sslfast.kernels._common import dot_precision

    steps, expected = SETTINGS[setting]
    for function, value in steps:
        function(value)
    assert dot_precision(torch.float32) == expected
    assert dot_precision(torch.bfloat16) == "tf32"
    a, b = torch.randn(2, 6, 16).unbind()
    with sslfast.use_backend("reference"):
        reference = sslfast.nt_xent(a, b)
    with sslfast.use_backend("triton"):
        torch.testing.assert_close(sslfast.nt_xent(a, b), reference)


@pytest.mark.parametrize("name", LOSSES)
def test_every_kernel_runs_after_a_mixture(name: str) -> None:
    """Forward and backward, each kernel with float32 products in it."""
    old("high")
    old("highest")
    every("ieee")
    new("tf32")
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    gradients = []
    for backend in ("reference", "triton"):
        torch.manual_seed(1)
        a, b = (F.normalize(torch.randn(6, 16)).requires_grad_() for _ in range(2))
        with sslfast.use_backend(backend):
            loss = LOSSES[name](a, b)
        gradients.append(torch.autograd.grad(loss, [a, b], allow_unused=True, materialize_grads=True))
    for reference, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_compiled_in_one_graph(precision: str) -> None:
    a, b = torch.randn(2, 6, 16).unbind()
    with sslfast.use_backend("triton"):
        expected = sslfast.nt_xent(a, b)
        new(precision)
        step = torch.compile(sslfast.nt_xent, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(a, b), expected)
    assert torch.backends.cuda.matmul.fp32_precision == precision
