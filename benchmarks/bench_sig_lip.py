"""SigLIP, forward and backward, with learnable scale and bias: open_clip's formula beside one pass over the tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import chunked, pair_peers
from .contrastive import Loss, number, two_towers, views
from .harness import Case


def _plain(case: Case) -> Loss:
    def sig_lip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.T + bias  # [N, N]
        sign = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(sign * logits).sum() / len(image)

    return sig_lip


BENCHMARK = two_towers(
    "sig_lip",
    inputs=lambda case: (*views(case), number(case, 10.0), number(case, -10.0)),
    plain=_plain,
    fused=lambda case: sslfast.sig_lip,
    share=3.0,
    chunked=lambda case: chunked.sig_lip,
    peers={"open_clip_torch": pair_peers.open_clip_sig_lip, "siglip-kernel": pair_peers.siglip_kernel},
)
PROVIDERS, TINY = BENCHMARK.providers, BENCHMARK.tiny
cases, setup, truth = BENCHMARK.cases, BENCHMARK.setup, BENCHMARK.truth
cost, why_skip = BENCHMARK.cost, BENCHMARK.why_skip
