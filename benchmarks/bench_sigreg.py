"""SIGReg, forward and backward, 17 knots: lightly's class and lejepa's formula beside sums of products of angles.

V views of N embeddings of D features on S directions. All get the same directions, and none draws them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import peers
from .contrastive import MATRIX_BYTES_TIMED, Benchmark, Loss, generator
from .harness import Case
from .machine import available_bytes

KNOTS = 17
# Operations of a row and a slice beside the products, an addition or a multiplication-addition each: the cosine and the
# sine, three multiples of their angle and two pivots, and the sums over 16 knots.
FORWARD, BACKWARD = 24 + 17 + 32, 24 + 17 + 36
ARRAYS = 5  # [V, N, S, knots] that the plain formula holds at once


def _views(case: Case) -> tuple[Tensor]:
    v, n, d = (case.shape[name] for name in "VND")
    z = torch.randn(v, n, d, generator=generator()) * torch.linspace(0.5, 1.5, d) + 0.2
    return (z.to(case.device, case.torch_dtype).requires_grad_(),)


def _directions(case: Case) -> Tensor:
    a = torch.randn(case.shape["D"], case.shape["S"], generator=generator(), dtype=torch.float64)
    return F.normalize(a, dim=0).to(case.device, case.torch_dtype)


def _plain(case: Case) -> Loss:
    """lejepa's ``SlicingUnivariateTest(EppsPulley())``."""
    a = _directions(case)
    t = torch.linspace(0, 3, KNOTS, device=case.device, dtype=a.dtype)
    phi = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * 3 / (KNOTS - 1))
    weights[[0, -1]] /= 2
    weights *= phi

    def function(z: Tensor) -> Tensor:
        x = (z @ a).unsqueeze(-1) * t  # [V, N, S, knots]
        error = (x.cos().mean(1) - phi).square() + x.sin().mean(1).square()
        return z.shape[1] * (error @ weights).mean()

    return function


def _fused(case: Case) -> Loss:
    a = _directions(case)
    return lambda z: sslfast.sigreg(z, slices=a, knots=KNOTS)


def _lightly(case: Case) -> Loss:
    loss, a = peers.lightly_loss("lejepa_loss", "SIGReg", knots=KNOTS, num_vectors=case.shape["S"]), _directions(case)
    loss._generate_unit_vectors = lambda *_: a
    return loss.to(case.device)


@dataclass(frozen=True)
class Sketch(Benchmark):
    """Three products of [V·N, D] and [D, S], one cosine and one sine for each row and slice in either direction."""

    def units(self, case: Case) -> float:
        """Operations of the case's mode, in units of one product."""
        d = case.shape["D"]
        forward, backward = 1.0 + FORWARD / d, 2.0 + BACKWARD / d
        return {"forward": forward, "backward": backward}.get(case.mode, forward + backward)

    def cost(self, case: Case) -> tuple[float, float]:
        """Operations; bytes: embeddings read in forward and backward, their gradient written."""
        v, n, d, s = (case.shape[name] for name in "VNDS")
        passes = {"forward": 1.0, "backward": 2.0}.get(case.mode, 3.0)
        return self.units(case) * 2.0 * v * n * d * s, passes * v * n * d * case.torch_dtype.itemsize

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Where the plain formulas' arrays of all knots do not fit, or take minutes."""
        if provider == "sslfast":
            return None
        v, n, _, s = (case.shape[name] for name in "VNDS")
        stored = ARRAYS * v * n * s * KNOTS * case.torch_dtype.itemsize
        size = f"its arrays take about {stored / 2**30:.1f} GiB"
        if case.device == "cpu" and metric == "time_ms" and stored > MATRIX_BYTES_TIMED:
            return f"{size}; timed up to {MATRIX_BYTES_TIMED / 2**30:.1f} GiB"
        if case.device == "cpu" and stored > 0.5 * available_bytes():
            return f"{size}, more than is free"
        return None


BENCHMARK = Sketch(
    op="sigreg",
    sweep=[
        {"V": 8, "N": 256, "D": 64, "S": 1024},
        {"V": 4, "N": 256, "D": 16, "S": 256},
        {"V": 2, "N": 256, "D": 2048, "S": 1024},
        {"V": 8, "N": 1024, "D": 128, "S": 1024},
    ],
    gpu_sweep=[{"V": 8, "N": 256, "D": 64, "S": 1024}, {"V": 8, "N": 1024, "D": 512, "S": 1024}],
    inputs=_views,
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["V"] * shape["N"], shape["S"]),
    share=0.0,
    forward=0.0,
    tiny={"V": 2, "N": 12, "D": 6, "S": 20},
    peers={"lightly": _lightly},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
