"""Gram anchoring of a batch's patch features, forward and backward: bound by matrix products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import reference

from .harness import Case, Work, require_backend, work

PROVIDERS = ("eager", "compile", "dinov3", "sslfast")
BASELINES = ("eager", "compile", "dinov3")
TINY = {"B": 2, "P": 24, "D": 16}


def cases(device: str, quick: bool) -> list[Case]:
    """[B, P, D]: 16 × 16 patches of a ViT-L, and on a GPU 48 × 48; float32, on a GPU bfloat16 too."""
    shapes = [(8, 256, 384)] if quick else [(8, 256, 384), (32, 256, 1024)]
    shapes += [(16, 2304, 1024)] if device == "cuda" and not quick else []
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    return [Case("gram_anchor", dict(zip("BPD", s, strict=True)), t, device=device) for t in dtypes for s in shapes]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y, noise = (torch.randn(*(case.shape[n] for n in "BPD"), generator=generator) for _ in range(2))
    x, y = (t.to(case.device, case.torch_dtype) for t in (y + 0.5 * noise, y))
    return x.requires_grad_(), y


def _dinov3(x: Tensor, y: Tensor) -> Tensor:
    """The steps of DINOv3's class with its defaults: clamped in place."""
    x, y = (F.normalize(t.float(), dim=-1) for t in (x, y))
    t, s = torch.matmul(y, y.transpose(-1, -2)), torch.matmul(x, x.transpose(-1, -2))
    t[t < 0] = 0.0
    s[s < 0] = 0.0
    return F.mse_loss(s, t)


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on ``x``, which learns, and ``y``, which does not."""
    x, y = _inputs(case)
    function = reference.gram_anchor
    if provider == "sslfast":
        function = sslfast.gram_anchor
        require_backend(lambda: function(x.detach()[:1], y[:1]), "triton" if case.device == "cuda" else "cpu")
    elif provider == "compile":
        function = torch.compile(reference.gram_anchor, fullgraph=True, dynamic=False)
    elif provider == "dinov3":
        function = _dinov3
    return work(lambda x: function(x, y), (x,), case.mode)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference in float64 on the same inputs."""
    x, y = _inputs(case)
    x = x.detach().double().requires_grad_()
    return work(lambda x: reference.gram_anchor(x, y.double()), (x,), case.mode)()


def cost(case: Case) -> tuple[float, float]:
    """Half of both Gram matrices and W x: 2U of U = 2·B·P²·D; x and y read, dx written and read, and scaled."""
    b, p, d = (case.shape[n] for n in "BPD")
    u = 2.0 * b * p * p * d
    flops = {"forward": 2 * u, "backward": 0.0, "both": 2 * u}[case.mode]
    passes = {"forward": 3, "backward": 2, "both": 5}[case.mode]
    return flops, float(passes * b * p * d * case.torch_dtype.itemsize)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped: every provider fits everywhere."""
    return None
