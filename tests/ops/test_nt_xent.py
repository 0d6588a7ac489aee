"""NT-Xent on the CPU: value and gradients against float64 truth, contracts of a torch operator, and wrong input."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.nn import functional as F

import sslfast
from benchmarks import Unavailable, peers
from helpers import SHAPES, roundings, same_nonfinite, within_budget
from sslfast import reference

pytestmark = pytest.mark.sanitize

op = sslfast.ops.nt_xent

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRAD_LOSS = 3.0  # not 1: a backward that forgets it fails


def two_views(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of norms from 0.1 to 10 and positives that are similar but not equal, exactly representable in ``dtype``."""
    z0 = torch.randn(n, d, dtype=torch.float64)
    z1 = z0 + torch.randn(n, d, dtype=torch.float64)
    sizes = torch.logspace(-1, 1, 2 * n, dtype=torch.float64)[torch.randperm(2 * n)].reshape(2, n, 1)
    return (z0 * sizes[0]).to(dtype), (z1 * sizes[1]).to(dtype)


def value_and_gradients(function, z0: Tensor, z1: Tensor, temperature: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (z0, z1, temperature)]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, GRAD_LOSS))]


def check(z0: Tensor, z1: Tensor, temperature: float, **options) -> None:
    """Loss and the three gradients within the error budget."""
    kind = torch.float64 if z0.dtype == torch.float64 else torch.float32
    tau = torch.tensor(temperature, dtype=kind)
    kernel = value_and_gradients(sslfast.nt_xent, z0, z1, tau, **options)
    plain = roundings(value_and_gradients, reference.nt_xent, z0, z1, tau, **options)
    truth = value_and_gradients(reference.nt_xent, z0.double(), z1.double(), tau.double(), **options)
    assert kernel[0].dtype == kind and kernel[1].dtype == kernel[2].dtype == z0.dtype
    # A row of dz is a sum of terms of size g/(M τ ‖z‖), without normalisation g·max‖z‖/(M τ); dτ of size g·max|s|/τ.
    each = GRAD_LOSS / (2 * len(z0) * abs(temperature))
    norms = [z.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for z in (z0, z1)]
    largest = max(norm.max().item() for norm in norms)
    if options.get("normalize", True):
        sizes = [1.0, *(each / norm for norm in norms), GRAD_LOSS / temperature**2]
    else:
        sizes = [1.0, each * largest, each * largest, GRAD_LOSS * largest**2 / temperature**2]
    for name, k, p, t, size in zip(("loss", "dz0", "dz1", "dtemperature"), kernel, plain, truth, sizes, strict=True):
        within_budget(name, k.double() / size, p.double().div(size), t / size, z0.dtype, 1.0)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 33), (1700, 16)], ids=str)  # the last two: several groups of blocks
def test_value_and_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(*two_views(*shape, dtype), 0.5)


@pytest.mark.levels
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.03, 0.1, 100.0, -0.5, -0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    check(*two_views(127, 61, dtype), temperature)


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 20.0])  # similarities beyond and within what needs no running maximum
def test_without_normalisation(temperature: float, dtype: torch.dtype) -> None:
    z0, z1 = (z / z.double().norm(dim=1, keepdim=True).mean() for z in two_views(150, 30, dtype))
    check(z0.to(dtype) * 3, z1.to(dtype) * 3, temperature, normalize=False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 230),
    d=st.integers(1, 140),
    temperature=st.sampled_from([0.02, 0.1, 1.0, -0.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(n: int, d: int, temperature: float, dtype: torch.dtype) -> None:
    torch.manual_seed(n * 1000 + d)
    check(*two_views(n, d, dtype), temperature)


@pytest.mark.parametrize("shape", [(1, 8), (64, 32), (101, 30)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.05, -0.5])
def test_equals_lightly(shape: tuple[int, int], temperature: float) -> None:
    try:
        theirs = peers.nt_xent("lightly", temperature)
    except Unavailable as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")
    z0, z1 = (z.requires_grad_() for z in two_views(*shape, torch.float64))
    expected, loss = theirs(z0, z1), sslfast.NTXentLoss(temperature)(z0, z1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, (z0, z1)), torch.autograd.grad(expected, (z0, z1))
    for ours, their in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str)
def test_requires_grad_subsets(wanted: tuple[bool, bool, bool]) -> None:
    inputs = [*two_views(40, 12), torch.tensor(0.3)]
    full = value_and_gradients(sslfast.nt_xent, *inputs)[1:]
    leaves = [t.clone().requires_grad_(needed) for t, needed in zip(inputs, wanted, strict=True)]
    (GRAD_LOSS * sslfast.nt_xent(*leaves)).backward()
    for leaf, gradient, needed in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            assert torch.equal(leaf.grad, gradient)


def test_strides() -> None:
    z0, z1 = two_views(90, 44)
    expected = value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.5))
    wide = torch.stack([z0, z1], dim=2)  # [N, D, 2]: neither rows nor features are contiguous
    got = value_and_gradients(
        lambda a, b, t: sslfast.nt_xent(a.T.contiguous().T, b, t), wide[..., 0], wide[..., 1], torch.tensor(0.5)
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", [True, False])
def test_zero_and_duplicate_rows(normalize: bool) -> None:
    z0, z1 = two_views(50, 20)
    z0[3], z1[7], z0[11], z1[20] = 0, 0, z0[12], z0[20]
    check(F.normalize(z0) * 2, F.normalize(z1) * 2, 0.2, normalize=normalize)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_nan_and_inf_flow_through(value: float, normalize: bool, temperature: float) -> None:
    z0, z1 = two_views(210, 20)
    z0[5, 3] = value
    kernel = value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(temperature), normalize=normalize)
    plain = value_and_gradients(reference.nt_xent, z0, z1, torch.tensor(temperature), normalize=normalize)
    assert plain[0].isnan()
    for name, k, p in zip(("loss", "dz0", "dz1", "dtemperature"), kernel, plain, strict=True):
        same_nonfinite(name, k, p)


def test_a_nan_of_any_bits_stays_one() -> None:
    """Also one whose payload lies in the low bits, in rows that finite ones follow."""
    z0, z1 = two_views(210, 20)
    z0[5, 3] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    for normalize in (True, False):
        kernel = value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.5), normalize=normalize)
        assert all(t.isnan().all() for t in kernel)


def test_one_pair() -> None:
    z0, z1 = two_views(1, 8)
    loss, *gradients = value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.5))
    assert abs(loss.item()) <= 1e-6
    assert all(g.abs().max() <= 1e-5 for g in gradients)


@pytest.mark.levels
def test_tile_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile kept, some, all: the backward recomputes the very same numbers."""
    z0, z1 = two_views(900, 24)
    results = []
    for elements in (0, 300_000, 10_000_000):
        monkeypatch.setattr(op, "_tile_cache", lambda z, elements=elements: elements)
        results.append(value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.1)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_same_bits_every_time_and_right_for_any_thread_count() -> None:
    z0, z1 = two_views(1500, 40)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            first = value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.5))
            for _ in range(3):
                for a, b in zip(first, value_and_gradients(sslfast.nt_xent, z0, z1, torch.tensor(0.5)), strict=True):
                    assert torch.equal(a, b)
            check(z0, z1, 0.5)
    finally:
        torch.set_num_threads(before)


def test_operator_contracts() -> None:
    z0, z1 = (z.requires_grad_() for z in two_views(20, 6))
    tau = torch.tensor(0.5, requires_grad=True)
    # Without a tile cache: its unused part is uninitialised, which opcheck would compare.
    torch.library.opcheck(torch.ops.sslfast.nt_xent, (z0, z1, tau, True, 0))
    torch.library.opcheck(torch.ops.sslfast.nt_xent, (z0.double(), z1.double(), tau.double(), False, 0))
    loss, *saved = (t.detach() for t in torch.ops.sslfast.nt_xent(z0, z1, tau, True, 0))
    arguments = (torch.ones_like(loss), z0.detach(), z1.detach(), tau.detach(), *saved, True)
    torch.library.opcheck(torch.ops.sslfast.nt_xent_backward, arguments)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_the_kernel_twice(normalize: bool) -> None:
    """In float64 the kernel itself against finite differences; the second derivatives come from the reference."""
    z0, z1 = (z.requires_grad_() for z in two_views(7, 5, torch.float64))
    z0, z1 = (F.normalize(z.detach()).requires_grad_() for z in (z0, z1))
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    function = lambda a, b, t: sslfast.nt_xent(a, b, t, normalize=normalize)  # noqa: E731
    assert torch.autograd.gradcheck(function, (z0, z1, tau))
    assert torch.autograd.gradgradcheck(function, (z0, z1, tau))


def test_gradients_that_carry_a_graph_are_partial() -> None:
    """Where one input is, or depends on, another, the path through it is counted once."""
    z = F.normalize(torch.randn(9, 6, dtype=torch.float64)).requires_grad_()
    for function in (lambda z: sslfast.nt_xent(z, z), lambda z: sslfast.nt_xent(z, 2 * z.sin() + 1, z.mean() + 1)):
        (plain,) = torch.autograd.grad(function(z), z)
        (carrying,) = torch.autograd.grad(function(z), z, create_graph=True)
        torch.testing.assert_close(carrying, plain)


def test_backward_operator_checks_what_it_is_given() -> None:
    z0, z1, tau = *two_views(6, 4), torch.tensor(0.5)
    loss, *saved = torch.ops.sslfast.nt_xent(z0, z1, tau, True, 0)
    good = [loss, z0, z1, tau, *saved, True]
    for place, name in ((0, "grad_loss"), (4, "inv_norm"), (5, "row_max"), (6, "row_sum"), (7, "tiles")):
        bad = list(good)
        bad[place] = good[place].double()
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            torch.ops.sslfast.nt_xent_backward(*bad)
        if place in (4, 5, 6):
            bad[place] = good[place][:-1]
            with pytest.raises(RuntimeError, match=f"{name} has an unexpected shape"):
                torch.ops.sslfast.nt_xent_backward(*bad)


def test_every_tile_is_kept_for_small_batches() -> None:
    """The estimate in Python is at least what the kernel's layout needs: then the backward packs rows only once."""
    for n in range(1, 1500):
        rows = 2 * n
        for columns in (4, 8, 16, 32):  # of a panel: by dtype and level
            eighth = math.ceil(math.ceil(rows / 8) / columns) * columns
            height = eighth if rows < 16 * 192 and eighth < 192 else 192
            blocks = -(-rows // height)
            assert op._tile_cache(torch.empty(n, 8)) >= blocks * (blocks + 1) // 2 * height * 192


def test_dynamic_batch_compiles_once_for_all_sizes() -> None:
    step = torch.compile(lambda a, b: sslfast.nt_xent(a, b, 0.5), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33, 70):
        z0, z1 = (z.requires_grad_() for z in two_views(n, 12))
        torch.testing.assert_close(step(z0, z1), sslfast.nt_xent(z0, z1, 0.5))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend: str) -> None:
    z0, z1 = two_views(60, 16)
    tau = torch.tensor(0.5)
    step = torch.compile(lambda a, b, t: 2 * sslfast.nt_xent(a * 1.5, b, t), fullgraph=True, backend=backend)
    got = value_and_gradients(step, z0, z1, tau)
    expected = value_and_gradients(lambda a, b, t: 2 * sslfast.nt_xent(a * 1.5, b, t), z0, z1, tau)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    fixed = torch.compile(lambda a, b: sslfast.nt_xent(a, b, 0.5), fullgraph=True, backend=backend)
    torch.testing.assert_close(fixed(z0, z1), sslfast.nt_xent(z0, z1, 0.5))


def test_autocast_never_lowers_precision() -> None:
    z0, z1 = two_views(60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sslfast.nt_xent(z0, z1), sslfast.nt_xent(z0.clone(), z1.clone()))
        mixed = sslfast.nt_xent(z0.bfloat16(), z1)
        with sslfast.use_backend("reference"):
            torch.testing.assert_close(sslfast.nt_xent(z0, z1), sslfast.nt_xent(z0.clone(), z1), rtol=0, atol=0)
            plain = sslfast.nt_xent(z0, z1)
    torch.testing.assert_close(plain, sslfast.nt_xent(z0, z1))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, sslfast.nt_xent(z0.bfloat16().float(), z1))


def test_module_is_the_function() -> None:
    z0, z1 = two_views(30, 10)
    assert torch.equal(sslfast.NTXentLoss()(z0, z1), sslfast.nt_xent(z0, z1, 0.5))
    learns = torch.nn.Parameter(torch.tensor(0.2))
    module = sslfast.NTXentLoss(learns)
    module(z0, z1).backward()
    assert list(module.state_dict()) == ["temperature"] and learns.grad is not None and learns.grad != 0


@pytest.mark.slow
def test_rows_times_columns_beyond_2_to_the_31() -> None:
    """46,400² similarities of rows in 800 directions: how often each occurs gives the loss, and every gradient."""
    n, d, tau, kinds = 23_200, 8, 0.5, 400
    views, kind = two_views(kinds, d), torch.randint(kinds, (n,))
    z0, z1 = ((z[kind] * (0.5 + torch.rand(n, 1))).requires_grad_() for z in views)
    loss = sslfast.nt_xent(z0, z1, tau, normalize=True)
    loss.backward()
    y, count = F.normalize(torch.cat(views).double()), kind.bincount(minlength=kinds).repeat(2)
    s = y @ y.T / tau
    e, positive = s.exp(), s.diagonal(kinds).repeat(2)
    total = e @ count.double() - e.diagonal()  # without a row's similarity to itself
    expected = ((total.log() - positive) * count).sum() / (2 * n)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    w = e / total[:, None] + e / total
    g = ((w * count) @ y - w.diagonal()[:, None] * y - 2 * y.roll(kinds, 0)) / (tau * 2 * n)
    g -= (g * y).sum(1, keepdim=True) * y
    rows = torch.cat([kind, kind + kinds])
    right = g[rows] / torch.cat([z0, z1]).detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.cat([z0.grad, z1.grad]), right.float(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("z0", "z1", "options", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(4, 2), {}, ValueError, r"z0 and z1 .*same shape.*\(4, 3\) and \(4, 2\)"),
        (torch.ones(4, 3), torch.ones(5, 3), {}, ValueError, r"z0 and z1 .*same shape"),
        (torch.ones(4), torch.ones(4), {}, ValueError, r"z0 .*two-dimensional.*\(4,\)"),
        (torch.ones(4, 3), torch.ones(4, 3, 1), {}, ValueError, r"z1 .*two-dimensional"),
        (torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3), {}, TypeError, r"z0 .*float32.*int64"),
        (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float64), {}, TypeError, r"same dtype.*float32 and.*float64"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), {}, ValueError, r"same device.*cpu and meta"),
        (torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"z0 .*at least one row.*\(0, 3\)"),
        (torch.ones(4, 0), torch.ones(4, 0), {}, ValueError, r"z0 .*at least one row and one feature"),
        ([[1.0]], torch.ones(1, 1), {}, TypeError, r"z0 must be a torch.Tensor, got list"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": 0.0}, ValueError, r"temperature .*not zero.*0\.0"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": float("nan")}, ValueError, r"temperature .*finite.*nan"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": float("inf")}, ValueError, r"temperature .*finite.*inf"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": torch.zeros(())}, ValueError, r"temperature .*not zero"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": torch.ones(2)}, ValueError, r"temperature .*one-element"),
        (torch.ones(4, 3), torch.ones(4, 3), {"temperature": "0.5"}, TypeError, r"temperature .*float or a tensor"),
    ],
)
def test_wrong_input(z0, z1, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.nt_xent(z0, z1, **options)


def test_module_checks_its_temperature() -> None:
    with pytest.raises(ValueError, match="temperature must be finite and not zero"):
        sslfast.NTXentLoss(temperature=0)
    assert torch.isfinite(sslfast.NTXentLoss(temperature=-0.5)(*two_views(4, 3)))


def test_extra_memory_does_not_grow_with_the_matrix() -> None:
    """Peak resident memory of one step at N = 8192, D = 128, where the matrix alone is 1 GiB."""
    code = """
import ctypes, pathlib, torch, sslfast
def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
def step(n):
    z0, z1 = (torch.randn(n, 128).requires_grad_() for _ in range(2))
    start = status("VmRSS:")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    sslfast.nt_xent(z0, z1).backward()
    return (status("VmHWM:") - start) / 1024
step(64)
ctypes.CDLL(None).malloc_trim(0)
print(step(8192))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak resident set from /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 70, f"{done.stdout.strip()} MiB"
