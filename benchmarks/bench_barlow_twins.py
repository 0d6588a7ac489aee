"""Barlow Twins, forward and backward, λ = 0.005: lightly's class and the formula with its D × D matrix beside tiles."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from . import peers
from .redundancy import two_views

LAMBDA = 0.005


def _plain(z_a: Tensor, z_b: Tensor) -> Tensor:
    a, b = (torch.nn.functional.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.T @ b / len(a)  # [D, D]
    on = c.diagonal()
    return (on - 1).square().sum() + LAMBDA * (c.square().sum() - on.square().sum())


BENCHMARK = two_views(
    "barlow_twins",
    [(256, 8192), (1024, 8192), (256, 2048), (1024, 2048), (4096, 2048), (4096, 512)],
    plain=lambda case: _plain,
    fused=lambda case: lambda z_a, z_b: sslfast.barlow_twins(z_a, z_b, LAMBDA),
    peers={"lightly": lambda case: peers.lightly_loss("barlow_twins_loss", "BarlowTwinsLoss", lambda_param=LAMBDA)},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
