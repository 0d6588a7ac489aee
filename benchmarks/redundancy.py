"""What the benchmarks of the redundancy-reduction losses share: two batches of embeddings, and second moments' cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .contrastive import Benchmark, generator, too_large
from .harness import Case


def views(case: Case) -> tuple[Tensor, Tensor]:
    """Two views [N, D] that learn: correlated pairs, columns of several means and scales."""
    draw = generator()
    n, d = case.shape["N"], case.shape["D"]
    x, noise = (torch.randn(n, d, generator=draw) for _ in range(2))
    mean, scale = torch.linspace(-1, 1, d), torch.linspace(0.5, 1.5, d)
    pair = ((z * scale + mean).to(case.device, case.torch_dtype) for z in (x, 0.8 * x + 0.6 * noise))
    z_a, z_b = (z.requires_grad_() for z in pair)
    return z_a, z_b


def sizes(shape: dict[str, int]) -> tuple[int, int]:
    """(max, min) of N and D: a product over the longer side, of matrices of the shorter squared."""
    return max(shape["N"], shape["D"]), min(shape["N"], shape["D"])


@dataclass(frozen=True)
class Redundancy(Benchmark):
    """A loss on D × D matrices. Operations: ``share`` products of 2·N·D·min(N, D), the matrix by its cheaper form."""

    def cost(self, case: Case) -> tuple[float, float]:
        """Operations; bytes: two views read, two gradients written, once."""
        longer, shorter = self.pairs(case.shape)
        views = 4.0 * case.shape["N"] * case.shape["D"]
        passes = 0.5 if case.mode == "forward" else 1.0
        return self.units(case) * 2.0 * longer * shorter * shorter, passes * views * case.torch_dtype.itemsize

    def why_skip(self, case: Case, provider: str, metric: str) -> str | None:
        """Where the plain formulas' D × D matrices do not fit, or take minutes."""
        if provider == "sslfast":
            return None
        return too_large(case, metric, case.shape["D"] ** 2)


def two_views(op: str, shapes: Sequence[tuple[int, int]], **options: Any) -> Redundancy:
    """A loss of two views at sizes (N, D)."""
    return Redundancy(
        op=op,
        sweep=[{"N": n, "D": d} for n, d in shapes],
        gpu_sweep=[{"N": n, "D": 8192} for n in (256, 1024)],
        inputs=views,
        pairs=sizes,
        share=3.0,
        forward=1.0,
        tiny={"N": 32, "D": 64},
        **options,
    )
