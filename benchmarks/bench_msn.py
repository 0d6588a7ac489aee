"""MSN's loss of V anchor views of B images against K prototypes, forward and backward: lightly's class beside one read.

Anchors and prototypes learn, the targets are given. V = 11: one view of the whole image and ten small ones, as MSN's
ViT-S/16 and larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import peers
from .contrastive import Benchmark as Contrastive, Loss, generator
from .harness import Case

TEMPERATURE, SHARPENING, ITERATIONS = 0.1, 0.25, 3


def _embeddings(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, views of the targets with noise; targets; prototypes."""
    v, b, k, d = (case.shape[name] for name in ("V", "B", "K", "D"))
    draw = generator()
    targets, prototypes = torch.randn(b, d, generator=draw), torch.randn(k, d, generator=draw)
    anchors = targets.repeat(v, 1) + 2 * torch.randn(v * b, d, generator=draw)
    a, z, c = (x.to(case.device, case.torch_dtype) for x in (anchors, targets, prototypes))
    return a, z, c


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    anchors, _, prototypes = _embeddings(case)
    return anchors.requires_grad_(), prototypes.requires_grad_()


def _plain(case: Case) -> Loss:
    """facebookresearch/msn's formula, with the logarithm of the softmax in place of that of a power."""
    targets = _embeddings(case)[1]

    def function(anchors: Tensor, prototypes: Tensor) -> Tensor:
        c = F.normalize(prototypes)
        log_p = F.log_softmax(F.normalize(anchors) @ c.T / TEMPERATURE, 1)
        with torch.no_grad():
            t = F.softmax(F.normalize(targets) @ c.T / (TEMPERATURE * SHARPENING), 1)
            for _ in range(ITERATIONS):
                t = t / t.sum(0)
                t = t / t.sum(1, keepdim=True)
        mean = log_p.exp().mean(0)
        cross_entropy = -(t.repeat(len(log_p) // len(t), 1) * log_p).sum(1).mean()
        return cross_entropy + (mean * mean.log()).sum() + math.log(len(mean))

    return function


def _published(case: Case) -> Loss:
    criterion, targets = peers.lightly_loss("msn_loss", "MSNLoss"), _embeddings(case)[1]
    return lambda anchors, prototypes: criterion(anchors, targets, prototypes)


def _fused(case: Case) -> Loss:
    targets = _embeddings(case)[1]
    return lambda anchors, prototypes: sslfast.msn(anchors, targets, prototypes)


class Benchmark(Contrastive):
    """Operations: three products of the anchors with the prototypes, one of the targets."""

    def units(self, case: Case) -> float:
        """In units of the anchors' product."""
        targets = 1.0 / case.shape["V"]
        return {"forward": 1.0 + targets, "backward": 2.0}.get(case.mode, 3.0 + targets)


BENCHMARK = Benchmark(
    op="msn",
    sweep=[{"B": b, "V": v, "K": 1024, "D": 256} for b, v in ((64, 11), (32, 11), (32, 1))],
    inputs=_inputs,
    plain=_plain,
    fused=_fused,
    pairs=lambda shape: (shape["V"] * shape["B"], shape["K"]),
    share=4.0,
    forward=2.0,
    tiny={"B": 4, "V": 3, "K": 64, "D": 16},
    peers={"lightly": _published},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
