"""SupCon, forward and backward, 100 classes, temperature 0.07: HobbitLong's formula beside class sums."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from . import chunked
from .contrastive import Benchmark, Loss, generator, views
from .harness import Case

TEMPERATURE = 0.07
CLASSES = 100


def _labels(case: Case) -> Tensor:
    return torch.randint(0, CLASSES, (case.shape["N"],), generator=generator()).to(case.device)


def _plain(case: Case) -> Loss:
    labels = _labels(case)

    def sup_con(z: Tensor) -> Tensor:
        logits = z @ z.T / TEMPERATURE  # [N, N]
        logits = logits - logits.max(1, keepdim=True).values.detach()
        others = 1 - torch.eye(len(z), dtype=logits.dtype, device=z.device)
        positives = (labels[:, None] == labels).to(logits.dtype) * others
        log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        count = positives.sum(1)
        return -((positives * log_probability).sum(1) / torch.where(count < 1e-6, 1, count)).mean()

    return sup_con


def _fused(case: Case) -> Loss:
    labels = _labels(case)
    return lambda z: sslfast.sup_con(z[:, None], labels, temperature=TEMPERATURE, base_temperature=TEMPERATURE)


def _chunked(case: Case) -> Loss:
    labels = _labels(case)
    return lambda z: chunked.sup_con(z, labels, CLASSES, TEMPERATURE)


BENCHMARK = Benchmark(
    op="sup_con",
    sweep=[{"N": n, "D": 128} for n in (256, 1024, 4096, 8192)],
    gpu_sweep=[{"N": n, "D": 128} for n in (4096, 16384, 65536)],
    inputs=lambda case: views(case)[1:],
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["N"], shape["N"]),
    share=2.0,
    forward=0.5,
    tiny={"N": 64, "D": 32},
    chunked=_chunked,
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
