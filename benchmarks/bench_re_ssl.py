"""ReSSL, forward and backward: the published formula beside the gradient of the forward; the queue is fixed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .contrastive import Benchmark, Loss, generator, views
from .harness import Case

TEMPERATURE_Q, TEMPERATURE_K = 0.1, 0.04


def _keys(case: Case) -> tuple[Tensor, Tensor]:
    """The other view's keys [N, D] and the queue [K, D], both without gradient."""
    _, k = views(case)
    queue = torch.randn(case.shape["K"], case.shape["D"], generator=generator())
    return k.detach(), F.normalize(queue, dim=1).to(case.device, case.torch_dtype)


def _plain(case: Case) -> Loss:
    k, queue = _keys(case)

    def re_ssl(q: Tensor) -> Tensor:
        targets = F.softmax(k @ queue.T / TEMPERATURE_K, dim=1)  # [N, K]
        return -(targets * F.log_softmax(q @ queue.T / TEMPERATURE_Q, dim=1)).sum(1).mean()

    return re_ssl


def _fused(case: Case) -> Loss:
    k, queue = _keys(case)
    return lambda q: sslfast.re_ssl(q, k, queue, TEMPERATURE_Q, TEMPERATURE_K, normalize=False)


BENCHMARK = Benchmark(
    op="re_ssl",
    sweep=[{"N": 256, "K": 65536, "D": 128}, {"N": 32, "K": 1024, "D": 128}],
    gpu_sweep=[{"N": n, "K": 65536, "D": 128} for n in (256, 4096)],
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
