"""NT-Xent, forward and backward, temperature 0.5: bound by arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sslfast
from sslfast import reference

from . import chunked, peers
from .contrastive import in_form, noisy_pair
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
    drawn = noisy_pair(case.shape["N"], case.shape["D"], 0.5)
    z0, z1 = (z.to(case.device, case.torch_dtype, copy=True).requires_grad_() for z in drawn)
    return z0, z1


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on two views, [N, D] each."""
    z0, z1 = _views(case)
    if not provider.startswith("sslfast"):
        return work(_function(provider), (z0, z1), case.mode)
    backend = "triton" if case.device == "cuda" else "cpu"
    require_backend(lambda: sslfast.nt_xent(z0.detach()[:2], z1.detach()[:2], TEMPERATURE), backend)
    found, form = work(_function("sslfast"), (z0, z1), case.mode), provider.partition("-")[2]
    return in_form(found, form) if form else found


def _function(provider: str) -> Callable[[Tensor, Tensor], Tensor]:
    if provider == "sslfast":
        return lambda z0, z1: sslfast.nt_xent(z0, z1, TEMPERATURE)
    if provider == "eager":
        return lambda z0, z1: reference.nt_xent(z0, z1, TEMPERATURE)
    if provider == "compile":
        compiled = torch.compile(reference.nt_xent, fullgraph=True, dynamic=False)
        return lambda z0, z1: compiled(z0, z1, TEMPERATURE)
    if provider == "chunked":
        return lambda z0, z1: chunked.nt_xent(z0, z1, TEMPERATURE)
    return peers.nt_xent(provider, TEMPERATURE)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference in float64 on the same views; where its matrices would not fit, the chunked form of it."""
    views = tuple(z.detach().double().requires_grad_() for z in _views(case))
    small = MATRICES * _matrix_bytes(case, itemsize=8) <= MATRIX_BYTES_TIMED
    exact = reference.nt_xent if small else chunked.nt_xent
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
