"""CLIP, forward and backward, with a learnable logit scale: open_clip's formula beside rows and columns in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import chunked, pair_peers
from .contrastive import Loss, number, two_towers, views
from .harness import Case

SCALE = 1 / 0.07


def _plain(case: Case) -> Loss:
    label = torch.arange(case.shape["N"], device=case.device)

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T  # [N, N]
        return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2

    return clip


BENCHMARK = two_towers(
    "clip",
    inputs=lambda case: (*views(case), number(case, SCALE)),
    plain=_plain,
    fused=lambda case: sslfast.clip,
    share=4.0,
    chunked=lambda case: chunked.clip,
    peers={
        "open_clip_torch": pair_peers.open_clip_clip,
        "torch-linear-ce": pair_peers.torch_clip,
        "liger-kernel": pair_peers.liger_clip,
        "memeff": lambda case: pair_peers.memeff_clip(1 / SCALE),
    },
    without_scale=["memeff"],
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
