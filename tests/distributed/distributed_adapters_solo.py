"""Cases of test_distributed.py: solo-learn over several ranks, with its own code and with sslfast in it.

Its functions gather whenever a process group is there, and need as many rows on every rank.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sslfast
from distributed_common import case, mean_over_ranks
from solo_common import Newer, losses

ROWS, WIDTH = 6, 5

# Each takes solo.losses and two views [n, D] of this rank, and its number.
LOSSES: dict[str, Callable[[Any, Tensor, Tensor, int], Tensor]] = {
    "nnclr": lambda solo, a, b, rank: solo.nnclr_loss_func(a, b, 0.3),
    "mocov3": lambda solo, a, b, rank: solo.mocov3_loss_func(a, b, 0.3),
    "vicreg": lambda solo, a, b, rank: solo.vicreg_loss_func(a, b),
    "vibcreg": lambda solo, a, b, rank: solo.vibcreg_loss_func(a, b),
    "simclr, images": lambda solo, a, b, rank: solo.simclr_loss_func(
        torch.cat([a, b]), (torch.arange(ROWS) + rank * ROWS).repeat(2), 0.3
    ),
    "simclr, classes": lambda solo, a, b, rank: solo.simclr_loss_func(
        torch.cat([a, b]), (torch.arange(2 * ROWS) + rank) % 5, 0.3
    ),
    "simclr, an image on each rank": lambda solo, a, b, rank: solo.simclr_loss_func(
        a, torch.arange(ROWS) if rank % 2 else torch.arange(ROWS).flip(0), 0.3
    ),
}


def views(rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    a, b = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return [a.to(dtype), (a + 0.5 * b).to(dtype)]


def value_and_gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves, materialize_grads=True, allow_unused=True)]


@case
def solo_over_ranks(rank: int, world: int) -> None:
    """Each rank's gradients are the package's, and so is the mean of the values."""
    with Newer() as solo:
        for name, loss in LOSSES.items():
            if "each rank" in name and world == 1:
                continue  # an image alone has no positive
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
                inputs = views(rank, dtype)
                own = value_and_gradients(lambda a, b, f=loss: f(solo, a, b, rank), inputs)
                with sslfast.patch("solo"), warnings.catch_warnings():
                    warnings.filterwarnings("error", message="sslfast does not serve")
                    fast = value_and_gradients(lambda a, b, f=loss: f(solo, a, b, rank), inputs)
                fast[0], own[0] = mean_over_ranks(fast[0]), mean_over_ranks(own[0])
                for what, mine, theirs in zip(("value", "z1", "z2"), fast, own, strict=True):
                    told = f"{name}, {dtype}: {what}: "
                    torch.testing.assert_close(
                        mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, told=told: told + m
                    )


@case
def solo_barlow_over_ranks(rank: int, world: int) -> None:
    """The package's value, and the gradient of the global batch, of which the package has 1/W."""
    torch.set_default_dtype(torch.float64)
    try:
        with Newer() as solo:
            everyone = [views(r, torch.float64) for r in range(world)]
            leaves = [[t.requires_grad_() for t in pair] for pair in everyone]

            def standard(z: Tensor) -> Tensor:
                return (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()

            c = sum(standard(a).T @ standard(b) / ROWS for a, b in leaves) / world
            identity = torch.eye(WIDTH)
            truth = 0.025 * ((c - identity).square() * torch.where(identity == 1, 1.0, 5e-3)).sum()
            gradients = torch.autograd.grad(1.7 * truth, leaves[rank])
            own = value_and_gradients(solo.barlow_loss_func, views(rank, torch.float64))
            with sslfast.patch("solo"):
                fast = value_and_gradients(solo.barlow_loss_func, views(rank, torch.float64))
        torch.testing.assert_close(fast[0], own[0])
        torch.testing.assert_close(fast[0], truth.detach())
        for mine, theirs, true in zip(fast[1:], own[1:], gradients, strict=True):
            torch.testing.assert_close(mine / world, true)  # DDP divides by W
            torch.testing.assert_close(theirs, true)  # what is 1/W too little after that division
    finally:
        torch.set_default_dtype(torch.float32)


@case
def solo_as_it_is_installed_over_ranks(rank: int, world: int) -> None:
    """Of 1.0.2 Barlow Twins' matrix is the mean over the ranks; VICReg's loss is that of the rank alone."""
    solo = losses()
    pairs = [views(r, torch.float32) for r in range(world)]
    with sslfast.patch("solo"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        barlow = value_and_gradients(solo.barlow_loss_func, pairs[rank])
        vicreg = value_and_gradients(solo.vicreg_loss_func, pairs[rank])
    near = {"rtol": 2e-4, "atol": 2e-4}
    for mine, theirs in zip(vicreg, value_and_gradients(solo.vicreg_loss_func, pairs[rank]), strict=True):
        torch.testing.assert_close(mine, theirs, **near)
    own = value_and_gradients(solo.barlow_loss_func, pairs[rank])
    torch.testing.assert_close(barlow[0], mean_over_ranks(barlow[0]))  # one value for all
    torch.testing.assert_close(barlow[0], own[0], **near)
    for mine, theirs in zip(barlow[1:], own[1:], strict=True):
        torch.testing.assert_close(mine, world * theirs, **near)  # its sum over the ranks is outside autograd


@case
def solo_assignments_over_ranks(rank: int, world: int) -> None:
    """``SinkhornKnopp`` balances over the rows of all ranks whenever a process group is there, as the package does."""
    solo = losses()
    scores, teacher = views(rank, torch.float64)
    made = sys.modules["solo.utils.sinkhorn_knopp"].SinkhornKnopp(epsilon=0.4, world_size=world)

    def run() -> list[Tensor]:
        loss = solo.DINOLoss(WIDTH, 0.04, 0.07, 2, 5)
        return [made(scores), loss(scores, teacher), loss.center, loss(scores, teacher)]

    own = run()
    with sslfast.patch("solo"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        fast = run()
    for mine, theirs in zip(fast, own, strict=True):
        torch.testing.assert_close(mine, theirs)
