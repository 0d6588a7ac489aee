"""NT-Xent, forward and backward, temperature 0.5: bound by arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sslfast
from sslfast import reference

from . import peers
from .harness import Case, Work, require_backend, work
from .machine import available_bytes

PROVIDERS = ("lightly", "pytorch-metric-learning", "memeff", "chunked", "eager", "compile", "sslfast")
TINY = {"N": 64, "D": 32}
TEMPERATURE = 0.5

# Providers that store the 2N × 2N matrix hold about four of it at once (similarities, scaled, masked, log-softmax or
# its gradient). On the CPU they are timed while these take at most this much: larger ones take minutes.
MATRICES = 4
MATRIX_BYTES_TIMED = int(2.5 * 2**30)
# pytorch-metric-learning compares every positive pair with every negative pair: about six arrays of 2N · 2N(2N−2).
CUBIC_ARRAYS = 6
CUBIC_BYTES = 2**30
LIGHTLY_PAIRS_ON_CPU = (512, 4096)


def cases(device: str, quick: bool) -> list[Case]:
    """A sweep over N at D = 128, one case at D = 512, forward and backward apart at N = 4096; bfloat16 on a GPU."""
    if device == "cuda":
        shapes = [(4096, 512)] if quick else [(4096, 512), (8192, 128), (32768, 128)]
        return [_case(n, d, device, dtype) for dtype in ("bfloat16", "float32") for n, d in shapes]
    if quick:
        return [_case(512, 128, device), _case(2048, 128, device)]
    sweep = [_case(n, 128, device) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]
    apart = [_case(4096, 128, device, mode=mode) for mode in ("forward", "backward")]
    return [*sweep, _case(2048, 512, device), *apart]


def _case(n: int, d: int, device: str, dtype: str = "float32", mode: str = "both") -> Case:
    return Case("nt_xent", {"N": n, "D": d}, dtype, mode, device)


def _views(case: Case) -> tuple[Tensor, Tensor]:
    """Two views, [N, D] each: the second is the first plus half as much noise, so that positives are close (0.9)."""
    generator = torch.Generator().manual_seed(0)
    z0, noise = (torch.randn(case.shape["N"], case.shape["D"], generator=generator) for _ in range(2))
    z0, z1 = (t.to(case.device, case.torch_dtype).requires_grad_() for t in (z0, z0 + 0.5 * noise))
    return z0, z1


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on two views, [N, D] each."""
    z0, z1 = _views(case)
    if provider == "sslfast":
        backend = "triton" if case.device == "cuda" else "cpu"
        require_backend(lambda: sslfast.nt_xent(z0.detach()[:2], z1.detach()[:2], TEMPERATURE), backend)
    return work(_function(provider), (z0, z1), case.mode)


def _function(provider: str) -> Callable[[Tensor, Tensor], Tensor]:
    if provider == "sslfast":
        return lambda z0, z1: sslfast.nt_xent(z0, z1, TEMPERATURE)
    if provider == "eager":
        return lambda z0, z1: reference.nt_xent(z0, z1, TEMPERATURE)
    if provider == "compile":
        compiled = torch.compile(reference.nt_xent, fullgraph=True, dynamic=False)
        return lambda z0, z1: compiled(z0, z1, TEMPERATURE)
    if provider == "chunked":
        return lambda z0, z1: chunked_nt_xent(z0, z1, TEMPERATURE)
    return peers.nt_xent(provider, TEMPERATURE)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference in float64 on the same views; where its matrices would not fit, the chunked form of it."""
    views = tuple(z.detach().double().requires_grad_() for z in _views(case))
    small = MATRICES * _matrix_bytes(case, itemsize=8) <= MATRIX_BYTES_TIMED
    exact = reference.nt_xent if small else chunked_nt_xent
    return work(lambda z0, z1: exact(z0, z1, TEMPERATURE), views, case.mode)()


def cost(case: Case) -> tuple[float, float]:
    """With U = 2·(2N)²·D: the similarities are symmetric, so forward ½U, recomputed ½U, product with the weights 1U.

    Bytes: the views are read, their gradients written. The cost is that of storing nothing, the same for every
    provider; one that keeps similarities for its backward does less (1½U in all) and may exceed a share of 1.
    """
    rows, d = 2 * case.shape["N"], case.shape["D"]
    u = 2.0 * rows**2 * d
    share = {"forward": 0.5, "backward": 1.5, "both": 2.0}[case.mode]
    passes = 1 if case.mode == "forward" else 2
    return share * u, float(passes * rows * d * case.torch_dtype.itemsize)


def _matrix_bytes(case: Case, itemsize: int) -> int:
    return (2 * case.shape["N"]) ** 2 * itemsize


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Where a provider is not measured: its memory does not fit, or a baseline belongs to the other device."""
    n, on_cpu = case.shape["N"], case.device == "cpu"
    if provider == "chunked" and on_cpu:
        return "a baseline for GPUs"
    if provider == "lightly" and on_cpu and n not in LIGHTLY_PAIRS_ON_CPU:
        return f"measured at N = {', '.join(map(str, LIGHTLY_PAIRS_ON_CPU))} on a CPU"
    if provider == "pytorch-metric-learning":
        cubic = CUBIC_ARRAYS * (2 * n) ** 2 * (2 * n - 2) * case.torch_dtype.itemsize
        if cubic > CUBIC_BYTES:
            return f"its memory grows as N³, here about {cubic / 2**30:.1f} GiB"
    if provider in ("lightly", "eager", "compile"):
        stored = MATRICES * _matrix_bytes(case, case.torch_dtype.itemsize)
        size = f"its 2N × 2N matrices take about {stored / 2**30:.1f} GiB"
        if on_cpu and metric == "time_ms" and stored > MATRIX_BYTES_TIMED:
            return f"{size}; timed up to {MATRIX_BYTES_TIMED / 2**30:.1f} GiB"
        if on_cpu and stored > 0.7 * available_bytes():
            return f"{size}, more than is free"
    return None


# -------------------------------------------------------------- the strong baseline: library products, chunk by chunk


class _Chunked(torch.autograd.Function):
    """NT-Xent of normalised rows by ``torch.mm`` on blocks of rows and an epilogue in plain PyTorch.

    With cosines the similarities lie in [−m, m], m = 1/|τ|, so exponentials relative to m need no running maximum
    (sound while 2/|τ| stays far from the 87 at which float32 underflows). Backward, from the symmetry of S:
    dz_i = (g/(2Nτ)) · (Σ_j (P_ij + P_ji) z_j − 2 z_p(i)),   P_ij + P_ji = exp(s_ij − m)·(c_i + c_j),
    c_i = 1/Σ_j exp(s_ij − m).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        ctx.temperature, ctx.top = temperature, 1 / abs(temperature)
        sums = torch.empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)  # [2N]
        for rows in _blocks(z):
            sums[rows] = _exponentials(z, rows, temperature, ctx.top).sum(1)
        ctx.save_for_backward(z, sums)
        positive = (z * z.roll(len(z) // 2, 0)).sum(1, dtype=sums.dtype) / temperature
        return (sums.log() + ctx.top - positive).mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        z, sums = ctx.saved_tensors
        inverse = sums.reciprocal()
        pulled = torch.empty_like(z, dtype=sums.dtype)  # [2N, D]
        for rows in _blocks(z):
            weights = _exponentials(z, rows, ctx.temperature, ctx.top)
            weights *= inverse[rows, None] + inverse
            pulled[rows] = torch.mm(weights.to(z.dtype), z).to(sums.dtype)
        pulled -= 2 * z.roll(len(z) // 2, 0)
        return (pulled * (grad_loss / (len(z) * ctx.temperature))).to(z.dtype), None


def _blocks(z: Tensor) -> list[slice]:
    """Blocks of rows whose similarities to all rows are at most 2²⁶ numbers."""
    step = max(1, 2**26 // len(z))
    return [slice(first, min(first + step, len(z))) for first in range(0, len(z), step)]


def _exponentials(z: Tensor, rows: slice, temperature: float, top: float) -> Tensor:
    """``exp(s_ij − top)`` of some rows against all, [rows, 2N], zero where ``j = i``."""
    s = torch.mm(z[rows], z.T).to(torch.promote_types(z.dtype, torch.float32))
    s = s.div_(temperature).sub_(top).exp_()
    s.diagonal(rows.start).zero_()
    return s


def chunked_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent of two views ([N, D] each) without the whole matrix, from library products; |temperature| ≥ 0.05."""
    z = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    return _Chunked.apply(z, temperature)
