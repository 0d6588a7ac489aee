"""Cases of test_distributed.py: DINOv2's and DINOv3's losses over several ranks, with sslfast in them and without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import dinov2.loss as v2
import dinov3.distributed as groups
import dinov3.loss as v3
import torch
import torch.distributed as dist
from torch import Tensor

import sslfast
from distributed_common import case, mean_over_ranks

PROTOTYPES, ROWS, WIDTH = 11, 6, 5
TOKENS = (3, 7, 0, 5)  # masked ones of each rank
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def drawn(rank: int, rows: int, width: int = PROTOTYPES) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rank))


def with_and_without(package: str, run: Callable[[], Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Each result of sslfast's, and of the package's own code."""
    own = run()
    with sslfast.patch(package), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        fast = run()
    return list(zip(fast, own, strict=True))


def assignments(package: Any, rank: int) -> list[Tensor]:
    """Of rows, of masked tokens in unequal numbers, and centred ones after an update that was under way."""
    rows, patches = package.DINOLoss(PROTOTYPES), package.iBOTPatchLoss(PROTOTYPES)
    for loss in (rows, patches):
        loss.center.zero_()
    x, tokens = drawn(rank, ROWS), drawn(rank, TOKENS[rank])
    found = [rows.sinkhorn_knopp_teacher(x, 0.3)]
    teacher = getattr(patches.sinkhorn_knopp_teacher, "forward", patches.sinkhorn_knopp_teacher)  # not compiled
    found.append(teacher(tokens, 0.3, n_masked_patches_tensor=torch.tensor([len(tokens)])))
    for scale in (1.0, 2.0):
        found.append(rows.softmax_center_teacher(scale * x, 0.3))
        rows.update_center(scale * x)
        found.append(patches.softmax_center_teacher(scale * x[None], 0.3))
        patches.update_center(scale * x[None])
    rows.apply_center_update()
    patches.apply_center_update()
    return [*found, rows.center, patches.center]


@case
def dino_targets_over_ranks(rank: int, world: int) -> None:
    for package, name in ((v2, "dinov2"), (v3, "dinov3")):
        for fast, own in with_and_without(name, lambda package=package: assignments(package, rank)):
            torch.testing.assert_close(fast, own, **CLOSE)


@case
def the_callers_count_of_masked_tokens(rank: int, world: int) -> None:
    """The package's own sums it over the ranks where it stands, so that a second call counts twice."""
    count = torch.tensor([TOKENS[rank]])
    with sslfast.patch("dinov2"):
        v2.iBOTPatchLoss(PROTOTYPES).sinkhorn_knopp_teacher(drawn(rank, TOKENS[rank]), 0.3, count)
    assert count == TOKENS[rank]


@case
def dino_targets_in_subgroups(rank: int, world: int) -> None:
    """DINOv3 trains several models at once, each on some of the ranks."""
    if world != 4:
        return
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    groups.subgroup = pairs[rank // 2]
    try:
        for fast, own in with_and_without("dinov3", lambda: assignments(v3, rank)):
            torch.testing.assert_close(fast, own, **CLOSE)
        with sslfast.patch("dinov3"):
            mine = v3.DINOLoss(PROTOTYPES).sinkhorn_knopp_teacher(drawn(rank, ROWS), 0.3)
        both = torch.cat([drawn(r, ROWS) for r in (rank // 2 * 2, rank // 2 * 2 + 1)])
        torch.testing.assert_close(mine, sslfast.sinkhorn(both, 0.3).split(ROWS)[rank % 2], **CLOSE)
    finally:
        groups.subgroup = None


@case
def koleo_of_dinov3_over_ranks(rank: int, world: int) -> None:
    """Value on each rank, and the gradient that DDP makes the mean of, for groups of one, two or all ranks."""
    sizes = [None, *(ROWS * ranks for ranks in (1, 2, 4) if ranks <= world)]
    for topk, size in ((1, None), *((3, size) for size in sizes)):
        loss = v3.KoLeoLossDistributed(topk, size)

        def run(loss: Any = loss) -> list[Tensor]:
            x = drawn(rank, ROWS, WIDTH).requires_grad_()
            value = loss(x)
            return [value.detach(), *torch.autograd.grad(1.7 * value, x)]

        for fast, own in with_and_without("dinov3", run):
            torch.testing.assert_close(fast, own, **CLOSE)


@case
def koleo_of_dinov3_with_uneven_batches(rank: int, world: int) -> None:
    """The package's own gather needs as many rows on every rank; sslfast's loss is that of the global batch."""
    if world == 1:
        return
    sizes = [ROWS - r for r in range(world)]
    whole = torch.cat([drawn(r, n, WIDTH) for r, n in enumerate(sizes)]).requires_grad_()
    expected = sslfast.koleo(whole)
    gradient = torch.autograd.grad(expected, whole)[0].split(sizes)[rank]
    x = drawn(rank, sizes[rank], WIDTH).requires_grad_()
    with sslfast.patch("dinov3"):
        loss = v3.KoLeoLossDistributed()(x)
    torch.testing.assert_close(mean_over_ranks(loss.detach()), expected.detach(), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0] / world, gradient, **CLOSE)
