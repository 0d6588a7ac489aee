"""What the benchmarks of the redundancy-reduction losses share: two batches of embeddings, and second moments' cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contrastive import MATRICES, MATRIX_BYTES_TIMED, Benchmark, generator
from .harness import Case
from .machine import available_bytes


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
        stored = MATRICES * case.shape["D"] ** 2 * case.torch_dtype.itemsize
        size = f"its matrices take about {stored / 2**30:.1f} GiB"
        if case.device == "cpu" and metric == "time_ms" and stored > MATRIX_BYTES_TIMED:
            return f"{size}; timed up to {MATRIX_BYTES_TIMED / 2**30:.1f} GiB"
        if case.device == "cpu" and stored > 0.5 * available_bytes():
            return f"{size}, more than is free"
        return None
