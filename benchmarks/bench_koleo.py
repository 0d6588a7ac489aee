"""KoLeo of one batch, forward and backward: lightly's class and DINOv2's formula beside tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import peers
from .contrastive import Benchmark, generator
from .harness import Case

EPS = 1e-8


def _inputs(case: Case) -> tuple[Tensor]:
    x = torch.randn(case.shape["N"], case.shape["D"], generator=generator())
    return (x.to(case.device, case.torch_dtype).requires_grad_(),)


def _plain(x: Tensor) -> Tensor:
    """DINOv2's, in float32 as its autocast region is, with −2 on the diagonal."""
    unit = F.normalize(x if x.dtype == torch.float64 else x.float(), eps=EPS)
    index = torch.mm(unit, unit.T).fill_diagonal_(-2).max(1).indices
    return -torch.log(F.pairwise_distance(unit, unit[index], 2, EPS) + EPS).mean()


BENCHMARK = Benchmark(
    op="koleo",
    sweep=[{"N": 4096, "D": 384}, *({"N": n, "D": 384} for n in (32, 256, 1024)), {"N": 4096, "D": 1024}],
    gpu_sweep=[{"N": n, "D": 1024} for n in (1024, 4096, 16384)],
    inputs=_inputs,
    plain=lambda case: _plain,
    fused=lambda case: lambda x: sslfast.koleo(x),
    pairs=lambda shape: (shape["N"], shape["N"]),
    share=0.5,
    forward=0.5,
    tiny={"N": 32, "D": 16},
    peers={"lightly": lambda case: peers.lightly_loss("koleo_loss", "KoLeoLoss")},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
