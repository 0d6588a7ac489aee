"""Second moments of two batches at one width: both forms beside the matrices in memory, across the border N = D."""

from __future__ import annotations

from torch import Tensor

import sslfast

from .contrastive import Loss
from .redundancy import Redundancy, sizes, views


def _plain(z_a: Tensor, z_b: Tensor) -> Tensor:
    loss = (z_a - z_b).square().mean()
    for z in (z_a, z_b):
        centred = z - z.mean(0)
        m = centred.T @ centred / len(z)  # [D, D]
        loss = loss + (m.square().sum() - m.diagonal().square().sum()) / len(m)
    return loss


def _by(form: str) -> Loss:
    def function(z_a: Tensor, z_b: Tensor) -> Tensor:
        n, d = z_a.shape
        terms = sslfast.second_moment(z_a, z_b, form=form)
        return terms.off_diagonal.sum() / (n * n * d) + terms.distance / (n * d)

    return function


BENCHMARK = Redundancy(
    op="second_moment",
    sweep=[{"N": n, "D": 1024} for n in (128, 256, 512, 1024, 2048, 4096)],
    inputs=views,
    plain=lambda case: _plain,
    fused=lambda case: _by("auto"),
    pairs=sizes,
    share=3.0,
    forward=1.0,
    tiny={"N": 32, "D": 64},
    peers={"primal": lambda case: _by("primal"), "dual": lambda case: _by("dual")},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
