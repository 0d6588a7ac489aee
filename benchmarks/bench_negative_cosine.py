"""The mean cosine of predictions and fixed targets, forward and backward: bound by memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .harness import Case, Work, require_backend, work
from .peers import lightly_loss

PROVIDERS = ("eager", "compile", "lightly", "sslfast")
BASELINES = ("eager", "compile", "lightly")
TINY = {"N": 16, "D": 24}


def cases(device: str, quick: bool) -> list[Case]:
    """[N, D] of a small batch, of BYOL's and of SimSiam's heads; on a GPU bfloat16 too."""
    shapes = [(32, 256), (4096, 256)] if quick else [(32, 256), (512, 2048), (4096, 256)]
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    return [Case("negative_cosine", {"N": n, "D": d}, dtype, device=device) for dtype in dtypes for n, d in shapes]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, z = (torch.randn(case.shape["N"], case.shape["D"], generator=generator) for _ in range(2))
    p, z = (t.to(case.device, case.torch_dtype) for t in (p, p + z))
    return p.requires_grad_(), z


def _eager(p: Tensor, z: Tensor) -> Tensor:
    return -F.cosine_similarity(p, z, dim=1).mean()


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on ``p`` [N, D], which learns, and ``z`` [N, D], which does not."""
    p, z = _inputs(case)
    function = _eager
    if provider == "sslfast":
        function = sslfast.negative_cosine
        require_backend(lambda: function(p.detach()[:1], z[:1]), "cuda" if case.device == "cuda" else "cpu")
    elif provider == "compile":
        function = torch.compile(_eager, fullgraph=True, dynamic=False)
    elif provider == "lightly":
        function = lightly_loss("negative_cosine_similarity", "NegativeCosineSimilarity")
    return work(lambda p: function(p, z), (p,), case.mode)


def truth(case: Case) -> tuple[Tensor, ...]:
    """PyTorch's function in float64 on the same inputs."""
    p, z = _inputs(case)
    return work(lambda p: _eager(p, z.double()), (p.detach().double().requires_grad_(),), case.mode)()


def cost(case: Case) -> tuple[float, float]:
    """Forward: read p and z. Backward: read both, write dp. Arithmetic: 6 and 5 an entry."""
    entries = case.shape["N"] * case.shape["D"]
    passes = {"forward": 2, "backward": 3, "both": 5}[case.mode]
    flops = {"forward": 6.0, "backward": 5.0, "both": 11.0}[case.mode]
    return flops * entries, float(passes * entries * case.torch_dtype.itemsize)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped: every provider fits everywhere."""
    return None
