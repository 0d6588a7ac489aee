"""CO2 against a queue, forward and backward, temperature 0.05: the formula beside rows in blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .bench_moco import keys_and_queue
from .contrastive import Benchmark, Loss, views
from .harness import Case

TEMPERATURE = 0.05


def _plain(case: Case) -> Loss:
    k, queue = keys_and_queue(case)

    def co2(q: Tensor) -> Tensor:
        positive = (q * k).sum(1, keepdim=True)
        p, p_of_k = (torch.cat([positive, x @ queue.T], 1).div(TEMPERATURE).log_softmax(1) for x in (q, k))
        return sum(F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((p, p_of_k), (p_of_k, p))) / 2

    return co2


def _fused(case: Case) -> Loss:
    k, queue = keys_and_queue(case)
    return lambda q: sslfast.co2(q, k, queue, TEMPERATURE, normalize=False)


# Products of both sides with the queue, and of one side's weights with it.
BENCHMARK = Benchmark(
    op="co2",
    sweep=[{"N": n, "K": 65536, "D": 128} for n in (256, 1024)],
    inputs=lambda case: views(case)[:1],
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["N"], shape["K"]),
    share=3.0,
    forward=2.0,
    tiny={"N": 64, "K": 256, "D": 32},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
