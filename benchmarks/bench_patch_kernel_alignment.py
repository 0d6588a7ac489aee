"""Patch kernel alignment of a batch's tokens, forward and backward: lightly's class beside the smaller matrices."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast

from . import peers
from .contrastive import generator
from .harness import Case, Work, work

PROVIDERS = ("eager", "compile", "lightly", "sslfast")
BASELINES = ("eager", "compile", "lightly")
TINY = {"B": 2, "N": 12, "D": 16}


def cases(device: str, quick: bool) -> list[Case]:
    """[B, N, D]: 14 × 14 tokens of a ViT-B, and more tokens than features: 28 × 28 of a ViT-S."""
    shapes = [(8, 196, 384)] if quick else [(32, 196, 768), (8, 784, 384)]
    return [Case("patch_kernel_alignment", dict(zip("BND", s, strict=True)), "float32", device=device) for s in shapes]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    draw = generator()
    y, noise = (torch.randn(*(case.shape[n] for n in "BND"), generator=draw) for _ in range(2))
    x, y = (t.to(case.device, case.torch_dtype) for t in (y + 0.5 * noise, y))
    return x.requires_grad_(), y


def _plain(x: Tensor, y: Tensor) -> Tensor:
    """Kernels of centred tokens, for autograd."""
    x, y = (t - t.mean(1, keepdim=True) for t in (x, y))
    s, t = x @ x.mT, y @ y.mT  # [B, N, N]
    cross, own, other = ((a * b).sum((1, 2)) for a, b in ((s, t), (s, s), (t, t)))
    return (1 - cross / (own.sqrt() * other.sqrt())).mean()


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on ``x``, which learns, and ``y``, which does not."""
    x, y = _inputs(case)
    function = _plain
    if provider == "sslfast":
        function = sslfast.patch_kernel_alignment
    elif provider == "compile":
        function = torch.compile(_plain, fullgraph=True, dynamic=False)
    elif provider == "lightly":
        function = peers.lightly_loss("patch_kernel_alignment_loss", "PatchKernelAlignmentLoss")
    return work(lambda x: function(x, y), (x,), case.mode)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The plain formula in float64 on the same inputs."""
    x, y = _inputs(case)
    x = x.detach().double().requires_grad_()
    return work(lambda x: _plain(x, y.double()), (x,), case.mode)()


def cost(case: Case) -> tuple[float, float]:
    """N ≤ D: both kernels and W x; else three products of features and two with tokens. x, y read, dx written."""
    b, n, d = (case.shape[name] for name in "BND")
    u = 2.0 * b * n * d * min(n, d)
    forward, backward = (2, 1) if n <= d else (3, 2)
    units = {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]
    passes = {"forward": 2, "backward": 2, "both": 4}[case.mode]
    return units * u, float(passes * b * n * d * case.torch_dtype.itemsize)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped: every provider fits everywhere."""
    return None
