"""EMP-SSL of many views, forward and backward: lightly's class and the D × D determinants beside the smaller ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from . import peers
from .contrastive import generator
from .harness import Case, Work, require_backend, work

PROVIDERS = ("eager", "compile", "lightly", "sslfast")
BASELINES = ("eager", "compile", "lightly")
TINY = {"V": 2, "N": 8, "D": 16}
EPS, COEFFICIENT = 0.2, 200.0


def cases(device: str, quick: bool) -> list[Case]:
    """[V, N, D]: 20 views of the paper's 100 samples with 1,024 features, and a batch that is larger than D."""
    shapes = [(20, 100, 256)] if quick else [(20, 100, 1024), (20, 100, 256), (20, 512, 256)]
    return [Case("emp_ssl", dict(zip("VND", s, strict=True)), "float32", device=device) for s in shapes]


def _inputs(case: Case) -> tuple[Tensor, ...]:
    """Views that learn, of unit rows as the authors' projector gives them."""
    v, n, d = (case.shape[name] for name in "VND")
    draw = generator()
    shared = torch.randn(n, d, generator=draw)
    drawn = (F.normalize(shared + torch.randn(n, d, generator=draw), dim=1) for _ in range(v))
    return tuple(z.to(case.device, case.torch_dtype).requires_grad_() for z in drawn)


def _plain(*z_views: Tensor) -> Tensor:
    z = torch.stack(z_views)
    _, n, d = z.shape
    moments = torch.eye(d, dtype=z.dtype, device=z.device) + d / (n * EPS) * z.mT @ z  # [V, D, D]
    similarity = F.cosine_similarity(z, z.mean(0, keepdim=True), dim=2).mean()
    return 0.5 * torch.logdet(moments).mean() - COEFFICIENT * similarity


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider on the views."""
    inputs = _inputs(case)
    function = _plain
    if provider == "sslfast":
        function = lambda *z: sslfast.emp_ssl(z, EPS, COEFFICIENT)  # noqa: E731
        small = [z.detach()[:2] for z in inputs[:2]]
        require_backend(lambda: function(*small), "cuda" if case.device == "cuda" else "cpu")
    elif provider == "compile":
        function = torch.compile(_plain, fullgraph=True, dynamic=False)
    elif provider == "lightly":
        criterion = peers.lightly_loss("emp_ssl_loss", "EMPSSLLoss", tcr_eps=EPS, inv_coef=COEFFICIENT)
        function = lambda *z: criterion(list(z))  # noqa: E731
    return work(function, inputs, case.mode)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The D × D determinants in float64 on the same inputs."""
    inputs = tuple(z.detach().double().requires_grad_() for z in _inputs(case))
    return work(_plain, inputs, case.mode)()


def cost(case: Case) -> tuple[float, float]:
    """Of the smaller matrices, m on a side: the product, its Cholesky factor; the inverse, and its product with Z.

    Bytes: the views read for the product and for the similarities, each way, and their gradients written.
    """
    v, n, d = (case.shape[name] for name in "VND")
    m = min(n, d)
    forward, backward = 2.0 * n * d * m + m**3 / 3, 2.0 * n * d * m + 2 * m**3 / 3
    flops = {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]
    passes = {"forward": 2, "backward": 3, "both": 5}[case.mode]
    return v * flops, float(passes * v * n * d * case.torch_dtype.itemsize)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped: every provider fits everywhere."""
    return None
