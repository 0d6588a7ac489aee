"""The nearest neighbours of queries in a bank, as a kNN classifier looks them up, with the gradient of their mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .contrastive import Benchmark, generator
from .harness import Case


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    draw = generator()
    rows = (torch.randn(case.shape[size], case.shape["D"], generator=draw) for size in ("M", "N"))
    q, k = (F.normalize(x, dim=1).to(case.device, case.torch_dtype).requires_grad_() for x in rows)
    return q, k


def _plain(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    count = case.shape["count"]
    return lambda q, k: (q @ k.T).topk(count, dim=1).values.mean()


def _fused(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, k: sslfast.nearest_neighbours(q, k, case.shape["count"]).similarity.mean()


BENCHMARK = Benchmark(
    op="nearest_neighbours",
    sweep=[{"M": 1024, "N": 50_000, "D": 384, "count": count} for count in (20, 1, 200)],
    gpu_sweep=[{"M": 8192, "N": 200_000, "D": 768, "count": count} for count in (1, 20)],
    inputs=_inputs,
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["M"], shape["N"]),
    share=1.0,
    forward=1.0,
    tiny={"M": 8, "N": 40, "D": 16, "count": 3},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
