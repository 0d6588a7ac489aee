"""k-means: against scikit-learn, and DeepCluster-v2's procedure in float64; empty clusters, the draw, wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import roundings, within_budget
from sslfast import reference
from sslfast.ops.neighbour_distance import sums_by_index

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def blobs(n: int, d: int, clusters: int, spread: float = 0.4) -> Tensor:
    return torch.randn(clusters, d)[torch.arange(n) % clusters] + spread * torch.randn(n, d)


def deep_cluster_v2(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The published procedure on one rank, for rows of norm 1."""
    for step in range(iterations + 1):
        nearest = (x @ centroids.T).max(dim=1).indices
        if step == iterations:
            break
        means = centroids.clone()
        for k in range(len(centroids)):
            if (nearest == k).any():
                means[k] = x[nearest == k].mean(0)
        centroids = F.normalize(means, dim=1)
    return centroids, nearest


@pytest.mark.parametrize("size", [(500, 16, 7), (97, 3, 20), (2000, 130, 40), (5, 4, 5), (6, 4, 1)], ids=str)
def test_euclidean_is_scikit_learns(size: tuple[int, int, int]) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(*size, spread=2.0).double()  # no cluster is ever without rows: scikit-learn would move its centroid
    start = x[torch.randperm(len(x))[: size[2]]]
    fitted = cluster.KMeans(size[2], init=start.numpy(), n_init=1, max_iter=300, tol=0.0).fit(x.numpy())
    found = sslfast.k_means(x, start, 300)
    torch.testing.assert_close(found.centroids, torch.from_numpy(fitted.cluster_centers_), rtol=1e-10, atol=1e-10)
    assert found.assignments.tolist() == fitted.labels_.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(500, 16, 7), (97, 3, 20), (400, 130, 40), (3, 4, 3)], ids=str)
def test_spherical_is_deep_cluster_v2s(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = blobs(*size).to(dtype)
    found = sslfast.k_means(x, x[: size[2]], metric="cosine")
    assert found.centroids.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert found.assignments.dtype == torch.int64

    def published(x: Tensor) -> Tensor:
        unit = F.normalize(x, dim=1)
        return deep_cluster_v2(unit, unit[: size[2]], 10)[0]

    plain = roundings(published, x.to(found.centroids.dtype))
    within_budget("centroids", found.centroids, plain, published(x.double()), found.centroids.dtype, 1.0)
    unit = F.normalize(x.double(), dim=1)
    own = (unit * found.centroids[found.assignments].double()).sum(1)
    assert (own >= (unit @ found.centroids.double().T).amax(1) - 1e-6).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_cluster_without_rows_keeps_its_centroid(metric: str) -> None:
    x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [2.0, 0.0]])
    start = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-1.0, 0.0]])
    found = sslfast.k_means(x, start, 3, metric=metric)
    assert found.assignments.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.centroids[1:], start[1:])


def test_of_equally_near_centroids_the_first() -> None:
    x = torch.tensor([[0.0], [2.0], [4.0]])
    assert sslfast.k_means(x, torch.tensor([[1.0], [3.0], [1.0]]), 0).assignments.tolist() == [0, 0, 1]


def test_rows_far_from_the_origin_keep_their_digits() -> None:
    """At 3,000 the squared norms in float32 have a unit in the last place of 4: the distances between rows."""
    x = blobs(400, 4, 5, 0.05)
    found, moved = (sslfast.k_means(x + shift, x[:5] + shift) for shift in (0.0, 3000.0))
    assert torch.equal(found.assignments, moved.assignments)
    torch.testing.assert_close(moved.centroids - 3000, found.centroids, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_draw(metric: str) -> None:
    """Different rows, chosen by the generator; without iterations the centroids are they."""
    x = F.normalize(torch.randn(50, 6), dim=1)
    draws = [sslfast.k_means(x, 20, 0, metric=metric, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    first, again, other = (found.centroids for found in draws)
    assert torch.equal(first, again) and not torch.equal(first, other)
    distance = (first[:, None] - x).norm(dim=2)
    assert (distance.amin(1) < 1e-6).all() and len(set(distance.argmin(1).tolist())) == 20
    torch.manual_seed(3)
    found = sslfast.k_means(x, 20, metric=metric)
    torch.manual_seed(3)
    assert torch.equal(found.centroids, sslfast.k_means(x, 20, metric=metric).centroids)


def test_nan_shows() -> None:
    x = torch.randn(30, 4)
    x[7, 2] = float("nan")
    for metric in ("euclidean", "cosine"):
        found = sslfast.k_means(x, 3, metric=metric)
        assert found.centroids.isnan().any() and ((found.assignments >= 0) & (found.assignments < 3)).all()


def test_backends_strides_autocast_and_compile_agree() -> None:
    x = blobs(300, 12, 6)
    start = x[:6].clone()
    expected = {metric: sslfast.k_means(x, start, metric=metric) for metric in ("euclidean", "cosine")}
    wide = torch.stack([x, x], dim=2)[..., 1].requires_grad_()
    compiled = torch.compile(sslfast.k_means, fullgraph=True, backend="aot_eager")
    for metric, true in expected.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [sslfast.k_means(wide, start, metric=metric), compiled(x, start, metric=metric)]
        with sslfast.use_backend("reference"):
            results.append(sslfast.k_means(x, start, metric=metric))
        for found in results:
            assert torch.equal(found.assignments, true.assignments) and not found.centroids.requires_grad
            torch.testing.assert_close(found.centroids, true.centroids)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_sums_by_index(backend: str) -> None:
    q = torch.randint(-3, 4, (90, 13)).float()
    index = torch.randint(-1, 8, (90,))
    with sslfast.use_backend(backend):
        sums = sums_by_index(q, index, torch.full((9, 13), float("nan")))
    truth = torch.stack([q[index == k].sum(0) for k in range(9)])
    assert torch.equal(sums, truth) and torch.equal(reference.sums_by_index(q, index, 9), truth)


def test_in_the_triton_interpreter() -> None:
    x = torch.randint(-2, 3, (60, 5)).float()
    for metric in ("euclidean", "cosine"):
        with sslfast.use_backend("triton"):
            found = sslfast.k_means(x, x[:4], 3, metric=metric)
        true = sslfast.k_means(x, x[:4], 3, metric=metric)
        assert torch.equal(found.assignments, true.assignments)
        torch.testing.assert_close(found.centroids, true.centroids)


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, 5), {}, ValueError, r"clusters must be a whole number from 1 to the 4 rows of x, got 5"),
        ((X, 0), {}, ValueError, r"clusters must be a whole number .* got 0"),
        ((X, 1.5), {}, ValueError, r"clusters must be a whole number .* got 1.5"),
        ((X, X[:, :2]), {}, ValueError, r"clusters must have x's 3 features, got 2"),
        ((X, X[:0]), {}, ValueError, r"clusters must have at least one row"),
        ((X, 2, -1), {}, ValueError, r"iterations must be a whole number of at least 0, got -1"),
        ((X, 2), {"metric": "dot"}, ValueError, r"metric must be one of 'euclidean', 'cosine', got 'dot'"),
        ((X, 2), {"generator": 3}, TypeError, r"generator must be a torch.Generator, got int"),
        ((X.long(), 2), {}, TypeError, r"x must be float32"),
        ((X[0], 2), {}, ValueError, r"x must be two-dimensional"),
    ],
)
def test_wrong_input(arguments, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.k_means(*arguments, **options)
