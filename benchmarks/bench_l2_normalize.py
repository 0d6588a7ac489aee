"""Row-wise L2-normalisation, forward and backward: bound by memory traffic."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast
from sslfast import reference

from .harness import Case, Work, require_backend, work

PROVIDERS = ("eager", "compile", "sslfast")
TINY = {"M": 64, "D": 32}


def cases(device: str, quick: bool) -> list[Case]:
    """[M, D] of a projection head's output and of a large one; float32, on a GPU bfloat16 too."""
    shapes = [(8192, 128)] if quick else [(8192, 128), (65536, 256)]
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    return [Case("l2_normalize", {"M": m, "D": d}, dtype, device=device) for dtype in dtypes for m, d in shapes]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(case.shape["M"], case.shape["D"], generator=generator) for _ in range(2))
    x, grad_y = (t.to(case.device, case.torch_dtype) for t in (x, grad_y))
    return x.requires_grad_(), grad_y


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on ``x`` [M, D] with incoming gradient ``grad_y`` [M, D]."""
    x, grad_y = _inputs(case)
    function = reference.l2_normalize
    if provider == "sslfast":
        function = sslfast.l2_normalize
        require_backend(lambda: sslfast.l2_normalize(x.detach()[:1]), "cuda" if case.device == "cuda" else "cpu")
    elif provider == "compile":
        function = torch.compile(reference.l2_normalize, fullgraph=True, dynamic=False)
    return work(function, (x,), case.mode, grad_y)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference in float64 on the same inputs."""
    x, grad_y = _inputs(case)
    return work(reference.l2_normalize, (x.detach().double().requires_grad_(),), case.mode, grad_y.double())()


def cost(case: Case) -> tuple[float, float]:
    """Forward: read x, write y. Backward: read x and grad_y, write grad_x. Arithmetic: about 3 and 5 per entry."""
    entries = case.shape["M"] * case.shape["D"]
    passes = {"forward": 2, "backward": 3, "both": 5}[case.mode]
    flops = {"forward": 3.0, "backward": 5.0, "both": 8.0}[case.mode]
    return flops * entries, float(passes * entries * case.torch_dtype.itemsize)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped: every provider fits everywhere."""
    return None
