"""NT-Xent's Triton kernels: values and gradients, through the interpreter where there is no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import roundings, same_nonfinite, within_budget
from sslfast import reference
from triton_common import DEVICE, MARKS

pytestmark = MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (pairs, features): one pair; one feature; tiny; prime; ragged in both; aligned to the tiles; several row blocks, two
# products (features > 128); more than one chunk of dz (features > 256).
SHAPES = [(1, 8), (33, 1), (3, 5), (61, 127), (75, 130), (64, 64), (131, 150), (40, 300), (5, 2048)]


def make(n: int, d: int, dtype: torch.dtype, noise: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views whose rows resemble each other."""
    random = torch.Generator().manual_seed(seed)
    z0 = torch.randn(n, d, generator=random)
    z1 = z0 + noise * torch.randn(n, d, generator=random)
    return z0.to(DEVICE, dtype), z1.to(DEVICE, dtype)


def run(
    function: object, z0: Tensor, z1: Tensor, tau: float, normalize: bool, grad_output: float, dtype: torch.dtype
) -> list[Tensor]:
    """Loss and its gradients in z0, z1 and temperature, computed in ``dtype``."""
    inputs = [z0.to(dtype, copy=True).requires_grad_(), z1.to(dtype, copy=True).requires_grad_()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs.append(torch.tensor(tau, dtype=wide, device=z0.device, requires_grad=True))
    loss = function(*inputs, normalize=normalize)
    return [loss, *torch.autograd.grad(loss * grad_output, inputs)]


def check(
    z0: Tensor, z1: Tensor, tau: float, *, normalize: bool = True, grad_output: float = 3.0, name: str = ""
) -> list[Tensor]:
    """Triton against the reference in float64, by the error budget."""
    with sslfast.use_backend("triton"):
        kernel = run(sslfast.nt_xent, z0, z1, tau, normalize, grad_output, z0.dtype)
    plain = roundings(run, reference.nt_xent, z0, z1, tau, normalize, grad_output, z0.dtype)
    truth = run(reference.nt_xent, z0, z1, tau, normalize, grad_output, torch.float64)
    for what, *values in zip(("loss", "dz0", "dz1", "dtemperature"), kernel, plain, truth, strict=True):
        within_budget(f"{name}{what}", *values, z0.dtype)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(*make(*shape, dtype), 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.01, 0.07, 100.0, -0.5])
def test_temperatures(tau: float, dtype: torch.dtype) -> None:
    # Noise 2 leaves losses well above rounding at temperature 0.01 too.
    check(*make(50, 24, dtype, noise=2.0), tau)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_well_separated_pairs_at_a_small_temperature(dtype: torch.dtype) -> None:
    """Nearly one-hot rows: loss and gradient are differences of nearly equal numbers."""
    z0, z1 = make(20, 16, dtype, noise=0.3)
    loss = check(z0, z1, 0.02)[0]
    assert 0 < loss.item() < 1e-2


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the short form's weights, where it is not used
def test_rows_that_are_not_normalized() -> None:
    """Maxima beyond PLAIN_LIMIT in some rows: tiles take the exact form of W and the short one side by side."""
    z0, z1 = make(150, 20, torch.float32)
    z0[100:120] *= 6
    z0[3] *= 0.01
    check(z0, z1, 0.5, normalize=False)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # rows outside z
def test_a_row_that_is_far_from_all_others() -> None:
    """One row's maximum is about −400: the short form of W would be 0·∞ in its column, in rows that are in range."""
    z0, z1 = (0.3 + 0.05 * z for z in make(150, 4, torch.float32))
    z1[100] *= 1000
    check(z0, z1, -1.0, normalize=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.5, 0.05, -0.5, 0.02])
def test_logits_within_a_bound(tau: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums relative to 0 where the rows' norms allow it (|τ| ≥ 0.025 for unit rows), to the maximum where not."""
    from sslfast.kernels import nt_xent as kernel

    monkeypatch.setattr(kernel, "BOUND_FROM", 0)
    check(*make(75, 24, dtype, noise=0.3), tau)
    z = torch.nn.functional.normalize(torch.cat(make(40, 24, torch.float32)), dim=1)
    _, row_max, row_sum, _ = torch.ops.sslfast.nt_xent_triton(z, torch.tensor(tau, device=DEVICE))
    s = (z.double() @ z.double().T / tau).fill_diagonal_(-torch.inf)
    lse = row_max.double() + row_sum.double().log2()
    torch.testing.assert_close(
        lse, s.logsumexp(1) / torch.log(torch.tensor(2.0, dtype=torch.float64)), rtol=1e-6, atol=3e-6
    )


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_norms(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import nt_xent as kernel

    monkeypatch.setattr(kernel, "BOUND_FROM", 0)
    test_nonfinite_rows(bad)


def test_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """More row blocks than a band holds, and runs of more than one block with a ragged last one."""
    from sslfast.kernels import nt_xent as kernel

    block = kernel.config_for(kernel.NT_XENT_FORWARD, kernel.architecture(torch.empty(0, device=DEVICE)), 4, 16).block_m
    z0, z1 = make(block * 5 // 2 + 3, 16, torch.float32)  # six row blocks
    whole = check(z0, z1, 0.2)
    monkeypatch.setattr(kernel, "COLUMN_BYTES", 0)
    monkeypatch.setattr(kernel, "BAND", 2)
    banded = check(z0, z1, 0.2, name="banded ")
    monkeypatch.setattr(kernel, "multiprocessors", lambda z: 1)
    monkeypatch.setattr(kernel, "FORWARD_PROGRAMS", 3)
    runs = check(z0, z1, 0.2, name="long runs ")
    monkeypatch.setattr(kernel, "BAND", 64)
    check(z0, z1, 0.2, name="one band of long runs ")
    for values in (banded, runs):
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-7)


def test_one_program_for_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslfast.kernels import nt_xent_backward as kernel

    z0, z1 = make(70, 12, torch.float32)
    for split in (1, 3):
        monkeypatch.setattr(kernel, "MAX_SPLIT", split)
        check(z0, z1, 0.3, name=f"split {split} ")


def test_many_duplicates_and_zero_rows() -> None:
    z0, z1 = make(40, 16, torch.float32)
    z0[5:15] = z0[4]
    z1[20] = 0
    z0[33] = 0
    check(z0, z1, 0.5, normalize=False)
    z0, z1 = (torch.zeros(9, 4, device=DEVICE) for _ in range(2))
    with sslfast.use_backend("triton"):
        loss = sslfast.nt_xent(z0, z1)
    assert loss.item() == pytest.approx(torch.tensor(17.0).log().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_rows(bad: float) -> None:
    z0, z1 = make(40, 8, torch.float32)
    z1[7, 3] = bad
    with sslfast.use_backend("triton"):
        kernel = run(sslfast.nt_xent, z0, z1, 0.5, False, 1.0, torch.float32)
    plain = run(reference.nt_xent, z0, z1, 0.5, False, 1.0, torch.float32)
    for name, a, b in zip(("loss", "dz0", "dz1", "dtemperature"), kernel, plain, strict=True):
        same_nonfinite(name, a, b)
    assert kernel[0].isnan()


def test_every_subset_of_gradients() -> None:
    z0, z1 = make(10, 6, torch.float32)
    tau = torch.tensor(0.4, device=DEVICE)
    full = check(z0, z1, 0.4)[1:]
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [t.clone().requires_grad_(w) for t, w in zip((z0, z1, tau), wanted, strict=True)]
        with sslfast.use_backend("triton"):
            loss = sslfast.nt_xent(*inputs)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            (loss * 3).backward()
        for t, w, g in zip(inputs, wanted, full, strict=True):
            assert (t.grad is not None) == w
            if w:
                assert torch.equal(t.grad, g)


def test_strided_inputs() -> None:
    z0, z1 = make(12, 10, torch.float32)
    with sslfast.use_backend("triton"):
        expected = sslfast.nt_xent(z0, z1)
        strided = sslfast.nt_xent(z0.T.contiguous().T, torch.stack([z1, z1], 2)[:, :, 1])
    assert torch.equal(expected, strided)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_run(dtype: torch.dtype) -> None:
    z0, z1 = make(90, 40, dtype)
    with sslfast.use_backend("triton"):
        first, second = (run(sslfast.nt_xent, z0, z1, 0.1, True, 1.0, dtype) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_row_statistics() -> None:
    """row_max is the maximum itself, row_sum the sum relative to it, row_rest the share of all but the positive."""
    z = torch.cat(make(45, 12, torch.float32))
    tau = torch.tensor(0.3, device=DEVICE)
    _, row_max, row_sum, row_rest = torch.ops.sslfast.nt_xent_triton(z, tau)
    s = (z.double() @ z.double().T / 0.3 / torch.log(torch.tensor(2.0, dtype=torch.float64))).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(row_max.double(), s.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row_sum.double(), (s - s.amax(1, keepdim=True)).exp2().sum(1), rtol=1e-4, atol=0)
    shares = torch.softmax(s * torch.log(torch.tensor(2.0, dtype=torch.float64)), 1)
    others = shares.sum(1) - shares[torch.arange(90), torch.arange(90).roll(45)]
    torch.testing.assert_close(row_rest.double(), others, rtol=1e-4, atol=1e-12)


def test_opcheck() -> None:
    z = torch.cat(make(6, 5, torch.float32)).requires_grad_()
    tau = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.sslfast.nt_xent_triton, (z, tau))
    with torch.no_grad():
        loss, *rows = torch.ops.sslfast.nt_xent_triton(z, tau)
    arguments = (torch.ones_like(loss), z.detach(), tau.detach(), *rows)
    torch.library.opcheck(torch.ops.sslfast.nt_xent_triton_backward, arguments)


def test_compile_fullgraph() -> None:
    z0, z1 = make(9, 7, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(a: Tensor, b: Tensor) -> Tensor:
        return sslfast.nt_xent(a, b, 0.3) * 2

    with sslfast.use_backend("triton"):
        grads = []
        for function in (loss_of, lambda a, b: sslfast.nt_xent(a, b, 0.3) * 2):
            inputs = [t.clone().requires_grad_() for t in (z0, z1)]
            function(*inputs).backward()
            grads.append([t.grad for t in inputs])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-8)


def test_second_derivatives_come_from_the_reference() -> None:
    z0, z1 = (t.requires_grad_() for t in make(4, 3, torch.float32))

    def penalty(function: object) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(function(z0, z1, 0.5), z0, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (z0, z1))

    with sslfast.use_backend("triton"):
        kernel = penalty(sslfast.nt_xent)
    torch.testing.assert_close(kernel, penalty(reference.nt_xent), rtol=1e-4, atol=1e-6)
