"""Both forms of the GPU's gradients over all pairs: the choice, what forces it, and both against float64."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import reference
from triton_common import DEVICE, MARKS

pytestmark = MARKS

FORMS = ["streamed", "banded"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, columns, features): one row; one column; one feature; ragged; several blocks and tiles; more than one product.
SHAPES = [(1, 40, 8), (70, 1, 5), (33, 20, 1), (67, 97, 13), (40, 70, 130), (20, 35, 300)]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    """Each form by force."""
    with sslfast.use_gradient_form(request.param), sslfast.use_backend("triton"):
        yield request.param


def rows(m: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(m, d, generator=random), dim=1).to(DEVICE, dtype)


def both(function: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Value and gradients of ``function`` by the budget of ``formula``, in the inputs' dtype and in float64."""

    def step(f: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        value = f(*leaves)
        return [value.detach(), *torch.autograd.grad(3 * value, leaves)]

    results = step(function), roundings(step, formula), step(formula, torch.float64)
    for index, values in enumerate(zip(*results, strict=True)):
        within_budget(f"result {index}", *values, inputs[0].dtype)


def sigmoid_of(function: Callable[..., Tensor], m: int, n: int) -> Callable[..., Tensor]:
    """The pairwise sigmoid loss a row, with several positives for some of them."""
    ids = {"row_ids": torch.arange(m, device=DEVICE), "col_ids": torch.arange(n, device=DEVICE) // 2}
    return lambda q, k, scale, bias: function(q, k, scale, bias, **ids) / m


def clip_of(lse: Callable[..., Any], columns: bool = True) -> Callable[..., Tensor]:
    """½(row LSE + column LSE) − positive, of q, k and scale."""

    def loss(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        positives = torch.arange(len(q), device=q.device) % len(k)
        terms = lse(q, k, scale, positives=positives, **({"columns": True} if lse is sslfast.similarity_terms else {}))
        row, col, positive = terms[:3]
        return 0.5 * (row.mean() + col.mean()) - positive.mean()

    return loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    m, n, d = shape
    scale = torch.tensor(7.0, device=DEVICE)
    both(
        clip_of(sslfast.similarity_terms),
        clip_of(reference.similarity_terms),
        rows(m, d, dtype),
        rows(n, d, dtype, 1),
        scale,
    )


@pytest.mark.parametrize("scale", [100.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(scale: float, dtype: torch.dtype, form: str) -> None:
    """At 100 some maxima are beyond the short form of the weights; at 0 a gradient of the scale is left."""
    q, k = rows(70, 24, dtype), rows(75, 24, dtype, 1)  # two whole tiles each way, and no positives in two of the four
    q[:20] = k[:20]  # maxima of 144 in base 2
    both(
        clip_of(sslfast.similarity_terms), clip_of(reference.similarity_terms), q, k, torch.tensor(scale, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (33, 1), (29, 127), (51, 150), (20, 300)], ids=str)
def test_nt_xent(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    z0, z1 = rows(*shape, dtype), rows(*shape, dtype, 1)
    tau = torch.tensor(0.2, device=DEVICE)
    both(
        lambda a, b, t: sslfast.nt_xent(a, 0.5 * a + b, t),
        lambda a, b, t: reference.nt_xent(a, 0.5 * a + b, t),
        z0,
        z1,
        tau,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairwise_sigmoid(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    m, n, d = shape
    scalars = torch.tensor(10.0, device=DEVICE), torch.tensor(-3.0, device=DEVICE)
    sigmoid = (sigmoid_of(f, m, n) for f in (sslfast.similarity_logsigmoid, reference.similarity_logsigmoid))
    both(*sigmoid, rows(m, d, dtype), rows(n, d, dtype, 1), *scalars)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_q_learns(shape: tuple[int, int, int], dtype: torch.dtype, form: str) -> None:
    m, n, d = shape
    k = rows(n, d, dtype, 1)
    scale = torch.tensor(5.0, device=DEVICE)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, scale: function(q, k.to(q.dtype), scale).mean()

    both(of(sslfast.similarity_lse), of(reference.similarity_lse), rows(m, d, dtype), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_bands(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A band of one block of rows and one of two, the last one ragged: the gradients of one band."""
    forms = importlib.import_module("sslfast.kernels._gradient_forms")
    q, k, scale = rows(150, 12, dtype), rows(70, 12, dtype, 1), torch.tensor(9.0, device=DEVICE)
    bias = torch.tensor(-2.0, device=DEVICE)
    buffers: list[int] = []
    make = forms.band_buffer

    def recorded(*arguments: Any) -> Tensor | None:
        band = make(*arguments)
        buffers.append(len(band))
        return band

    for module in ("similarity_bands", "similarity_logsigmoid_bands"):
        monkeypatch.setattr(importlib.import_module(f"sslfast.kernels.{module}"), "band_buffer", recorded)
    with sslfast.use_gradient_form("banded"), sslfast.use_backend("triton"):
        for band_bytes in (1, 72 * dtype.itemsize * 64):
            monkeypatch.setattr(forms, "BAND_BYTES", band_bytes)
            both(clip_of(sslfast.similarity_terms), clip_of(reference.similarity_terms), q, k, scale)
            both(lambda a, b: sslfast.nt_xent(a, b, 0.2), lambda a, b: reference.nt_xent(a, b, 0.2), q[:75], q[75:])
            sigmoid = (sigmoid_of(f, 150, 70) for f in (sslfast.similarity_logsigmoid, reference.similarity_logsigmoid))
            both(*sigmoid, q, k, scale, bias)
    assert set(buffers) == ({32, 64} if DEVICE.type == "cpu" else {min(buffers)})


def test_bias_alone_learns(form: str) -> None:
    q, k, bias = rows(40, 10, torch.float32), rows(60, 10, torch.float32, 1), torch.randn(60, device=DEVICE)

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda b: function(q.to(b.dtype), k.to(b.dtype), 4.0, bias=b).mean()

    both(of(sslfast.similarity_lse), of(reference.similarity_lse), bias)


def test_memory_that_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the band asked for, a smaller one; without room for one block, the streamed form."""
    forms = importlib.import_module("sslfast.kernels._gradient_forms")
    z = rows(200, 8, torch.float32)
    whole = forms.band_buffer(z, 200, 200, 32)
    assert whole.shape == (224, 200)
    allowed = 0

    class Short(torch.Tensor):
        """Refuses more elements than allowed."""

        def new_empty(self, shape: tuple[int, ...]) -> Tensor:
            if shape[0] * shape[1] > allowed:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.empty(shape, device=DEVICE)

    short = z.as_subclass(Short)
    allowed = 64 * 200
    assert forms.band_buffer(short, 200, 200, 32).shape == (32, 200)  # 7, 3, 1 blocks: 3 are too many
    allowed = 0
    assert forms.band_buffer(short, 200, 200, 32) is None
    for module in ("similarity_bands", "similarity_logsigmoid_bands"):
        found = importlib.import_module(f"sslfast.kernels.{module}")
        monkeypatch.setattr(found, "band_buffer", lambda *_: None)
    with sslfast.use_gradient_form("banded"), sslfast.use_backend("triton"):
        scale, bias = torch.tensor(9.0, device=DEVICE), torch.tensor(-2.0, device=DEVICE)
        q, k = z[:40], z[100:]
        both(clip_of(sslfast.similarity_terms), clip_of(reference.similarity_terms), q, k, scale)
        both(lambda a, b: sslfast.nt_xent(a, b, 0.2), lambda a, b: reference.nt_xent(a, b, 0.2), q, k[:40])
        sigmoid = (sigmoid_of(f, 40, 100) for f in (sslfast.similarity_logsigmoid, reference.similarity_logsigmoid))
        both(*sigmoid, q, k, scale, bias)
        both(
            lambda x: sslfast.similarity_lse(x, k.to(x.dtype), 5.0).mean(),
            lambda x: reference.similarity_lse(x, k.to(x.dtype), 5.0).mean(),
            q,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run(dtype: torch.dtype, form: str) -> None:
    q, k = rows(90, 40, dtype).requires_grad_(), rows(70, 40, dtype, 1).requires_grad_()
    loss = clip_of(sslfast.similarity_terms)
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    first, second = (torch.autograd.grad(loss(q, k, scale), (q, k, scale)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def chosen(features: int, dtype: torch.dtype, sides: int = 2, after_forward: bool = True) -> str:
    from sslfast.kernels._configs import SIMILARITY_OWNER, config_for
    from sslfast.kernels._gradient_forms import gradient_form

    z = torch.empty(1, features, dtype=dtype)
    return gradient_form(z, sides, config_for(SIMILARITY_OWNER, 90, dtype.itemsize, features), after_forward)


@pytest.mark.parametrize("sides", [1, 2])
def test_choice(sides: int) -> None:
    """On both sides of the border: while one product takes all features, streaming costs less."""
    assert chosen(128, torch.bfloat16, sides) == "streamed"
    assert chosen(136, torch.bfloat16, sides) == "banded"
    assert chosen(32, torch.float32, sides) == "streamed"
    assert chosen(40, torch.float32, sides) == "banded"
    assert chosen(128, torch.float16, 1, after_forward=False) == "streamed"
    assert chosen(768, torch.float16, 1, after_forward=False) == "banded"


def test_forced_by_a_context() -> None:
    with sslfast.use_gradient_form("banded"):
        assert chosen(8, torch.float32) == "banded"
        with sslfast.use_gradient_form("streamed"):
            assert chosen(768, torch.float32) == "streamed"
            with sslfast.use_gradient_form(None):
                assert chosen(768, torch.float32) == "banded"
        assert chosen(8, torch.float32) == "banded"
    with pytest.raises(ValueError, match="name='tiled' is not a form of the gradient; allowed: streamed, banded"):
        sslfast.use_gradient_form("tiled").__enter__()


@pytest.mark.parametrize("value", ["banded", "tiled"])
def test_forced_by_the_environment(value: str) -> None:
    command = [sys.executable, "-c", "import sslfast; print(sslfast._backends.forced_gradient_form())"]
    environment = {**os.environ, "SSLFAST_GRADIENT_FORM": value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if value == "banded":
        assert done.stdout.strip() == "banded", done.stderr
    else:
        assert "SSLFAST_GRADIENT_FORM='tiled' is not a form of the gradient" in done.stderr
