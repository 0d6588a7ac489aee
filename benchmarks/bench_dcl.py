"""DCL, forward and backward, temperature 0.1: lightly's class and the formula beside rows against themselves."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from . import chunked, peers
from .contrastive import Benchmark, Loss, views
from .harness import Case

TEMPERATURE = 0.1


def _plain(case: Case) -> Loss:
    number = torch.arange(case.shape["N"], device=case.device).repeat(2)
    own = number[:, None] == number  # [2N, 2N]: the row itself and its other view

    def dcl(z0: Tensor, z1: Tensor) -> Tensor:
        z = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
        s = z @ z.T / TEMPERATURE
        positive = (z * z.roll(len(z0), 0)).sum(1) / TEMPERATURE
        return (s.masked_fill(own, float("-inf")).logsumexp(1) - positive).mean()

    return dcl


BENCHMARK = Benchmark(
    op="dcl",
    sweep=[{"N": n, "D": 128} for n in (256, 1024, 4096, 8192)],
    gpu_sweep=[{"N": n, "D": 128} for n in (4096, 32768)],
    inputs=views,
    plain=_plain,
    fused=lambda case: lambda z0, z1: sslfast.dcl(z0, z1, TEMPERATURE),
    pairs=lambda shape: (2 * shape["N"], 2 * shape["N"]),
    share=2.0,
    forward=0.5,
    tiny={"N": 64, "D": 32},
    chunked=lambda case: lambda z0, z1: chunked.dcl(z0, z1, TEMPERATURE),
    peers={"lightly": lambda case: peers.lightly_loss("dcl_loss", "DCLLoss", temperature=TEMPERATURE)},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
