"""VICReg, forward and backward, weights 25, 25, 1: lightly's class and the D × D matrices beside tiles."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from . import peers
from .redundancy import two_views

EPS = 1e-4


def _plain(z_a: Tensor, z_b: Tensor) -> Tensor:
    loss = 25.0 * torch.nn.functional.mse_loss(z_a, z_b)
    for z in (z_a, z_b):
        centred = z - z.mean(0)
        cov = centred.T @ centred / (len(z) - 1)  # [D, D]
        variance = cov.diagonal()
        loss = loss + 12.5 * torch.relu(1 - (variance + EPS).sqrt()).mean()
        loss = loss + (cov.square().sum() - variance.square().sum()) / len(cov)
    return loss


BENCHMARK = two_views(
    "vicreg",
    [(256, 8192), (1024, 8192), (256, 2048), (1024, 2048), (2048, 2048), (4096, 512)],
    plain=lambda case: _plain,
    fused=lambda case: lambda z_a, z_b: sslfast.vicreg(z_a, z_b, eps=EPS),
    peers={"lightly": lambda case: peers.lightly_loss("vicreg_loss", "VICRegLoss", eps=EPS)},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
