"""One iteration of k-means and the assignment after it, to given centroids: two E steps and one M step.

``eager`` takes the largest of ``x·c − ½‖c‖²`` over chunks of rows and adds rows up by label; ``sklearn`` is
scikit-learn's Lloyd iteration on its own threads.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

from .contrastive import generator
from .harness import CALL, Case, Unavailable, Work, require_backend

PROVIDERS = ("eager", "sklearn", "sslfast")
BASELINES = ("eager", "sklearn")
TINY = {"N": 200, "D": 8, "K": 7}
CHUNK = 4096


def cases(device: str, quick: bool) -> list[Case]:
    """DeepCluster-v2's features and clusters, of a twentieth of ImageNet, on a GPU a tenth; and fewer clusters."""
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


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    bias = -0.5 * centroids.square().sum(1)
    return torch.cat([torch.addmm(bias, part, centroids.T).argmax(1) for part in x.split(CHUNK)])


def _eager(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    labels = _nearest(x, centroids)
    sums = torch.zeros_like(centroids).index_add_(0, labels, x)
    counts = torch.bincount(labels, minlength=len(centroids))[:, None]
    centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids, _nearest(x, centroids)


def _sklearn(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    try:
        cluster: Any = importlib.import_module("sklearn.cluster")
    except ImportError as error:
        raise Unavailable("scikit-learn is not installed") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration does not converge
        fitted = cluster.KMeans(len(centroids), init=centroids.numpy(), n_init=1, max_iter=1, tol=0.0).fit(x.numpy())
    return torch.from_numpy(fitted.cluster_centers_), torch.from_numpy(fitted.labels_).long()


def _fused(x: Tensor, centroids: Tensor) -> tuple[Tensor, ...]:
    return tuple(sslfast.k_means(x, centroids, 1))


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider; the labels of its proof are compared by distance, which rounding moves little."""
    x, centroids = _inputs(case)
    function = {"eager": _eager, "sklearn": _sklearn, "sslfast": _fused}[provider]
    if provider == "sklearn":
        if case.device != "cpu":
            raise Unavailable("scikit-learn's k-means is on the CPU")
        _sklearn(x[:50], centroids[:3])
    if provider == "sslfast":
        require_backend(lambda: function(x[:50], centroids[:3]), "triton" if case.device == "cuda" else "cpu")

    def proof() -> tuple[Tensor, ...]:
        return _compared(x, *function(x, centroids))

    return Work(lambda: None, lambda _: function(x, centroids), proof)


def _compared(x: Tensor, centroids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return centroids, (x - centroids[labels]).square().sum(1)


def truth(case: Case) -> tuple[Tensor, ...]:
    """The iteration in float64."""
    x, centroids = (t.double() for t in _inputs(case))
    return _compared(x, *_eager(x, centroids))


def cost(case: Case) -> tuple[float, float]:
    """Two products of all rows with all centroids and N·D additions; rows read three times."""
    n, d, k = (case.shape[name] for name in "NDK")
    return 4.0 * n * k * d + n * d, 3.0 * n * d * case.torch_dtype.itemsize


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing."""
    return None
