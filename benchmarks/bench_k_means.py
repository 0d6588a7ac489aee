"""One iteration of spherical k-means and its last assignment, as DeepCluster-v2 makes eleven: two E steps, one M step.

``eager`` multiplies chunks of rows with all centroids, takes the maximum, and adds rows up by label; ``faiss`` is its
index of inner products with the same sums. (scikit-learn's k-means is Euclidean alone.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .contrastive import generator
from .harness import CALL, Case, Unavailable, Work, require_backend

PROVIDERS = ("eager", "faiss", "sslfast")
BASELINES = ("eager", "faiss")
TINY = {"N": 200, "D": 8, "K": 7}
CHUNK = 4096


def cases(device: str, quick: bool) -> list[Case]:
    """DeepCluster-v2's features and clusters, of a twentieth of ImageNet; fewer clusters; on a GPU a tenth."""
    rows = 131_072 if device == "cuda" else 65_536
    shapes = [{"N": rows, "D": 128, "K": 3000}, {"N": rows, "D": 128, "K": 100}]
    return [Case("k_means", shape, mode=CALL, device=device) for shape in (shapes[:1] if quick else shapes)]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Rows around K directions, and the first K rows to start from."""
    n, d, k = (case.shape[name] for name in "NDK")
    draw = generator()
    rows = torch.randn(k, d, generator=draw)[torch.arange(n) % k] + 0.7 * torch.randn(n, d, generator=draw)
    rows = F.normalize(rows, dim=1).to(case.device, case.torch_dtype)
    return rows, rows[:k].clone()


def _by_sums(nearest: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The iteration, with an E step of one's own."""

    def run(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
        labels = nearest(x, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(centroids))[:, None]
        centroids = torch.where(counts > 0, F.normalize(sums, dim=1), centroids)
        return centroids, nearest(x, centroids)

    return run


def _eager(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([(part @ centroids.T).argmax(1) for part in x.split(CHUNK)])


def _faiss(x: Tensor, centroids: Tensor) -> Tensor:
    index: Any = _module("faiss").IndexFlatIP(x.shape[1])
    index.add(centroids.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed") from error


def _fused(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    return tuple(sslfast.k_means(x, centroids, 1, metric="cosine"))


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider; the labels of its proof are compared as cosines, which rounding moves little."""
    x, centroids = _inputs(case)
    if provider == "faiss":
        if case.device != "cpu":
            raise Unavailable("its index is on the CPU here")
        _module("faiss")
    function = {"eager": _by_sums(_eager), "faiss": _by_sums(_faiss), "sslfast": _fused}[provider]
    if provider == "sslfast":
        require_backend(lambda: function(x[:50], centroids[:3]), "triton" if case.device == "cuda" else "cpu")

    def proof() -> tuple[Tensor, ...]:
        return _compared(x, *function(x, centroids))

    return Work(lambda: None, lambda _: function(x, centroids), proof)


def _compared(x: Tensor, centroids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return centroids, (x * centroids[labels]).sum(1)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The iteration in float64."""
    x, centroids = (t.double() for t in _inputs(case))
    return _compared(x, *_by_sums(_eager)(x, centroids))


def cost(case: Case) -> tuple[float, float]:
    """Two products of all rows with all centroids and N·D additions; rows read three times."""
    n, d, k = (case.shape[name] for name in "NDK")
    return 4.0 * n * k * d + n * d, 3.0 * n * d * case.torch_dtype.itemsize


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing."""
    return None
