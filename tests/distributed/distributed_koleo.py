"""Cases of test_distributed.py: KoLeo over all ranks' rows, in groups within and across ranks."""

from __future__ import annotations

import torch
from torch import Tensor

import sslfast
from distributed_common import batch, case, mean_over_ranks, raises

SIZES = {1: [(8,)], 2: [(5, 3), (7, 1)], 4: [(4, 2, 3, 7), (1, 1, 1, 1)]}


def value_and_gradient(x: Tensor, **how: object) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = sslfast.koleo(x, **how)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@case
def koleo_of_the_global_batch(rank: int, world: int) -> None:
    for sizes in SIZES[world]:
        (x, *_), parts = batch(sizes, torch.float64)
        for how in ({}, {"topk": 2}, {"loss_group_size": sum(sizes) // 2}, {"loss_group_size": 4, "topk": 3}):
            if how.get("topk", 1) >= how.get("loss_group_size", sum(sizes)):
                continue
            truth, true = value_and_gradient(x, **how)
            found, mine = value_and_gradient(parts[rank][0], gather_distributed=True, **how)
            torch.testing.assert_close(mean_over_ranks(found), truth, rtol=1e-10, atol=1e-12)
            expected = true.split(list(sizes))[rank]
            torch.testing.assert_close(mine / world, expected, rtol=1e-9, atol=1e-11, msg=lambda m, h=how: f"{h}: {m}")


@case
def koleo_of_ranks_that_disagree(rank: int, world: int) -> None:
    """A width of its own, or something that is no matrix, is an error on every rank."""
    if world == 1:
        return
    width = 5 if rank == 1 else 4
    call = lambda x: sslfast.koleo(x, gather_distributed=True)  # noqa: E731
    raises(ValueError, "the ranks disagree on the width", lambda: call(torch.randn(3, width)))
    if rank == 1:
        raises(ValueError, "x must be two-dimensional", lambda: call(torch.randn(3)))
    else:
        raises(RuntimeError, "the inputs of rank 1 were refused there", lambda: call(torch.randn(3, 4)))
    found = sslfast.KoLeoLoss(gather_distributed=True)(torch.randn(3, 4))  # and the next call works
    assert found.isfinite()
