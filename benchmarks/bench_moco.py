"""MoCo, forward and backward, temperature 0.07: the authors' formula beside the gradient that comes in the forward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import chunked
from .contrastive import Benchmark, Loss, generator, views
from .harness import Case

TEMPERATURE = 0.07


def keys_and_queue(case: Case) -> tuple[Tensor, Tensor]:
    """The queries' own keys [N, D] and the queue [K, D], both without gradient."""
    _, k = views(case)
    queue = torch.randn(case.shape["K"], case.shape["D"], generator=generator())
    return k.detach(), F.normalize(queue, dim=1).to(case.device, case.torch_dtype)


def _plain(case: Case) -> Loss:
    k, queue = keys_and_queue(case)
    first = torch.zeros(case.shape["N"], dtype=torch.long, device=case.device)

    def moco(q: Tensor) -> Tensor:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE  # [N, 1 + K]
        return F.cross_entropy(logits, first)

    return moco


def _fused(case: Case) -> Loss:
    k, queue = keys_and_queue(case)
    return lambda q: sslfast.moco(q, k, queue, TEMPERATURE, normalize=False)


def _chunked(case: Case) -> Loss:
    k, queue = keys_and_queue(case)
    return lambda q: chunked.moco(q, k, queue, TEMPERATURE)


BENCHMARK = Benchmark(
    op="moco",
    sweep=[{"N": n, "K": 65536, "D": 128} for n in (256, 1024)],
    gpu_sweep=[{"N": n, "K": 65536, "D": 128} for n in (256, 4096)],
    inputs=lambda case: views(case)[:1],
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["N"], shape["K"]),
    share=2.0,
    forward=1.0,
    tiny={"N": 64, "K": 256, "D": 32},
    chunked=_chunked,
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
