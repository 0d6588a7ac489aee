"""Cases of test_distributed.py: k-means, self-labelling and DeepCluster-v2's bank over the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast
from distributed_common import case, raises
from sslfast.clustering import self_labelling as module

SIZES = {1: [(40,)], 2: [(25, 15), (1, 39)], 4: [(20, 1, 9, 10)]}


def rows(count: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@case
def k_means_of_the_global_batch(rank: int, world: int) -> None:
    """Given centroids, with one that no row is near; and drawn ones, by the generator of rank 0 alone."""
    for sizes in SIZES[world]:
        x = rows(sum(sizes), 5)
        mine = x.split(list(sizes))[rank].clone()
        for metric in ("euclidean", "cosine"):
            for clusters in (torch.cat([x[-6:], -50 - x[:1].abs()]), 7):
                truth = sslfast.k_means(x, clusters, 4, metric=metric, generator=seeded(3))
                found = sslfast.k_means(
                    mine, clusters, 4, metric=metric, generator=seeded(3 + rank), gather_distributed=True
                )
                torch.testing.assert_close(found.centroids, truth.centroids, rtol=1e-10, atol=1e-12)
                assert torch.equal(found.assignments, truth.assignments.split(list(sizes))[rank])


@case
def clusters_that_the_ranks_disagree_on(rank: int, world: int) -> None:
    if world == 1:
        return
    x, last = rows(6, 3), rank == world - 1
    call = lambda x=x, clusters=2, iterations=3, **how: sslfast.k_means(  # noqa: E731
        x, clusters, iterations, gather_distributed=True, **how
    )
    raises(ValueError, "the ranks disagree on clusters: 2 on rank", lambda: call(clusters=3 if last else 2))
    raises(ValueError, "disagree on iterations: 3 on rank", lambda: call(iterations=4 if last else 3))
    raises(ValueError, "whether k-means is spherical", lambda: call(metric="cosine" if last else "euclidean"))
    raises(ValueError, "whether centroids are given", lambda: call(clusters=x[:2] if last else 2))
    kind, told = (ValueError, "x must be two-dim") if last else (RuntimeError, f"the inputs of rank {world - 1} were")
    raises(kind, told, lambda: call(x[0] if last else x))
    raises(ValueError, f"to the {6 * world} rows of x, got 99", lambda: call(clusters=99))
    assert len(call(clusters=6 * world).centroids) == 6 * world  # more than this rank has rows
    told = "the ranks disagree on sharpness: 2.0 on rank"
    raises(ValueError, told, lambda: sslfast.self_labelling(x, sharpness=3.0 if last else 2.0, gather_distributed=True))


@case
def self_labelling_of_the_global_batch(rank: int, world: int) -> None:
    """In chunks of another length on each rank."""
    before = module.CHUNK_BYTES
    try:
        for sizes in SIZES[world]:
            z, w, b = rows(sum(sizes), 5), rows(6, 5, seed=1), rows(6, 1, seed=2)[:, 0]
            truth = sslfast.self_labelling(z, w, bias=b)
            module.CHUNK_BYTES = 8 * 6 * (rank + 3)
            found = sslfast.self_labelling(z.split(list(sizes))[rank].clone(), w, bias=b, gather_distributed=True)
            module.CHUNK_BYTES = before
            assert torch.equal(found, truth.split(list(sizes))[rank])
    finally:
        module.CHUNK_BYTES = before


@case
def deep_cluster_v2_banks_of_all_ranks(rank: int, world: int) -> None:
    """Every rank gets the labels and centroids of one process with all rows, in the order of the ranks."""
    for sizes in SIZES[world]:
        total = sum(sizes)
        z = torch.nn.functional.normalize(rows(2 * total, 4).view(2, total, 4), dim=2)
        index = torch.randperm(total, generator=seeded(1))
        results = []
        for gather in (False, True):
            criterion = sslfast.DeepClusterV2Loss(total, 4, [3, 5], gather_distributed=gather).double()
            head = sslfast.SwAVPrototypes(4, [3, 5]).double()
            features, numbers = z, index
            if gather:
                features, numbers = z.split(list(sizes), 1)[rank], index.split(list(sizes))[rank]
            criterion.update(features, numbers)
            criterion.cluster(head, generator=seeded(8))
            results.append((criterion.assignments, *(w.detach() for w in head.prototypes)))
        for found, true in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)
    if world > 1:
        criterion = sslfast.DeepClusterV2Loss(4, 4, [2], gather_distributed=True)
        if rank > 0:
            criterion.update(torch.ones(2, 1, 4), torch.tensor([0]))
        kind, told = (ValueError, "the bank must hold") if rank == 0 else (RuntimeError, "the inputs of rank 0 were")
        raises(kind, told, lambda: criterion.cluster([torch.zeros(2, 4)]))
