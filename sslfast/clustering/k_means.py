"""k-means, Euclidean or spherical: nearest centroids without the N × K matrix, sums by label, on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backends
from .._checks import accumulator, check_matrix, whole_number, without_autocast
from ..distributed.agreement import over_ranks
from ..distributed.choose import scope_of
from ..distributed.scope import Scope, Shard
from ..ops.l2_normalize import EPS, normalized
from ..ops.nearest_neighbours import neighbours_of, why_not
from ..ops.neighbour_distance import sums_by_index

METRICS = ("euclidean", "cosine")


class Clusters(NamedTuple):
    """What :func:`sslfast.k_means` finds.

    Attributes:
        centroids: [K, D], float32 (float64 for float64 rows); of norm 1 for ``metric="cosine"``.
        assignments: [N] int64, the centroid nearest to each row.

    Example:
        >>> found = sslfast.k_means(torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[0.0], [9.0]]))
        >>> found.centroids.tolist(), found.assignments.tolist()
        ([[0.5], [9.0]], [0, 0, 1])
    """

    centroids: Tensor
    assignments: Tensor


@over_ranks()
def k_means(
    x: Tensor,
    clusters: int | Tensor,
    iterations: int = 10,
    *,
    metric: str = "euclidean",
    generator: torch.Generator | None = None,
    gather_distributed: bool = False,
) -> Clusters:
    """Lloyd's k-means on the device of the rows, without their matrix of distances and without waiting for the host.

        assignment_n = argmin_k ‖x_n − c_k‖       the lowest k of equals; "cosine": argmax_k x̂_n·c_k
        c_k          = mean of the rows with assignment k; "cosine": that mean, normalised

    ``iterations`` times, and the assignments once more at the end, to the centroids that are returned. A cluster
    without rows keeps its centroid. Time is ``iterations``·2·N·K·D operations, extra memory O((N + K)·D).

    Args:
        x: [N, D]; float32, float64, bfloat16 or float16 (which are float32 numbers from the start); any strides. No
            gradient.
        clusters: K, from 1 to the number of rows: the centroids start at K different rows that are drawn; or where they
            start [K, D], over ranks the same on each.
        iterations: at least 0 (default 10, as DeepCluster-v2).
        metric: "euclidean" (default), or "cosine": spherical k-means of the normalised rows.
        generator: of the draw, on any device (default: PyTorch's of the rows' device). Over ranks rank 0's counts.
        gather_distributed: cluster the rows of all ranks, whose numbers may differ: sums and counts are added up over
            the ranks, every rank has the same centroids, and assignments of its own rows. ``False``: this rank's alone.

    Returns:
        ``(centroids, assignments)``. The same in every run.

    Raises:
        TypeError, ValueError: an argument does not fit; it is named. Over ranks also where they disagree on K, the
            number of iterations or the metric.

    Source: Lloyd 1982, "Least squares quantization in PCM"; Dhillon and Modha 2001, "Concept decompositions for large
    sparse text data using clustering"; ``metric="cosine"`` as DeepCluster-v2's ``cluster_memory``
    (facebookresearch/swav).

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [0.2, 1.0], [5.0, 0.1], [7.0, 0.0]])
        >>> sslfast.k_means(x, x[[0, 3]], metric="cosine").assignments.tolist()
        [0, 0, 1, 1]
    """
    check_matrix("x", x)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    count = _checked_clusters(clusters, x)
    iterations = whole_number("iterations", iterations, 0)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    spherical = metric == "cosine"
    scope = scope_of(gather_distributed)
    with torch.no_grad(), without_autocast(x):
        rows = x.detach().to(accumulator(x))
        rows = _unit(rows) if spherical else rows
        given = clusters if isinstance(clusters, Tensor) else None
        traits = {"clusters": count, "iterations": iterations, "whether k-means is spherical": spherical}
        shard = scope.shard(rows, {**traits, "whether centroids are given": given is not None})
        if given is None:
            whole_number("clusters", count, 1, shard.total, "rows of x")
            centroids = _drawn_rows(rows, count, scope, shard, generator)
        else:
            centroids = given.detach().to(rows.dtype)
        if spherical:
            return _clustered(rows, _unit(centroids), iterations, scope, spherical)
        # Distances do not change, and their squares keep their digits: a coordinate of a centroid in the middle, which
        # is one of the data, so that whole numbers stay whole.
        middle = centroids.sort(dim=0).values[count // 2]
        found = _clustered(rows - middle, centroids - middle, iterations, scope, spherical)
        return found._replace(centroids=found.centroids + middle)


def _clustered(rows: Tensor, centroids: Tensor, iterations: int, scope: Scope, spherical: bool) -> Clusters:
    for _ in range(iterations):
        assignments = _nearest(rows, centroids, spherical)
        sums = scope.total(sums_by_index(rows, assignments, centroids))
        ones = torch.ones_like(assignments)
        counts = scope.total(ones.new_zeros(len(centroids)).index_add_(0, assignments, ones))[:, None]
        means = sums / counts.clamp_min(1)
        centroids = torch.where(counts > 0, _unit(means) if spherical else means, centroids)
    return Clusters(centroids, _nearest(rows, centroids, spherical))


def _nearest(rows: Tensor, centroids: Tensor, spherical: bool) -> Tensor:
    """The nearest centroid of each row; of a row that is infinitely far from all the first."""
    bias = None if spherical else -0.5 * centroids.square().sum(1)
    return neighbours_of(rows, centroids, 1, bias=bias).index[:, 0].clamp_min(0)


def _unit(rows: Tensor) -> Tensor:
    return normalized(rows, EPS, _backends.serve("nearest_neighbours", rows, "triton", why_not))


def _drawn_rows(x: Tensor, count: int, scope: Scope, shard: Shard, generator: torch.Generator | None) -> Tensor:
    """``count`` rows of all ranks, the same on each: rank 0 draws their numbers, and each sends what it has of them."""
    device = x.device if generator is None else generator.device
    numbers = torch.randperm(shard.total, generator=generator, device=device)[:count].to(x.device)
    if shard.world_size == 1:
        return x[numbers]
    numbers = scope.total(numbers if shard.offset == 0 else torch.zeros_like(numbers)) - shard.offset
    mine = (numbers >= 0) & (numbers < shard.local)
    return scope.total(torch.where(mine[:, None], x[numbers.clamp(0, shard.local - 1)], 0.0))


def _checked_clusters(clusters: int | Tensor, x: Tensor) -> int:
    """K."""
    if not isinstance(clusters, Tensor) or clusters.dim() == 0:
        return whole_number("clusters", clusters, 1)
    check_matrix("clusters", clusters)
    if clusters.shape[1] != x.shape[1]:
        raise ValueError(f"clusters must have x's {x.shape[1]} features, got {clusters.shape[1]}")
    if clusters.device != x.device:
        raise ValueError(f"clusters must be on x's device {x.device}, got {clusters.device}")
    return len(clusters)
