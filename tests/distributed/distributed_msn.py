"""Cases of test_distributed.py: MSN and PMSN of the global batch, and lightly's on each rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import sslfast
from benchmarks import peers
from distributed_common import SIZES, case, mean_over_ranks, raises

VIEWS, PROTOTYPES, WIDTH = 3, 11, 6
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FORMS: dict[str, Callable[..., Tensor]] = {
    "msn": sslfast.msn,
    "no Sinkhorn": partial(sslfast.msn, sinkhorn_iterations=0),
    "no regulariser": partial(sslfast.msn, regularization_weight=0.0, entropy_weight=0.5),
    "pmsn": partial(sslfast.pmsn, regularization_weight=3.0),
}


def embeddings(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors [views, batch, D], targets [batch, D], prototypes [K, D]."""
    draw = torch.Generator().manual_seed(batch)
    shapes = ((VIEWS, batch), (batch,), (PROTOTYPES,))
    a, z, c = (torch.randn(*shape, WIDTH, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return a, z, c


def value_and_gradients(loss: Callable[..., Tensor], anchors: Tensor, targets: Tensor, c: Tensor) -> list[Tensor]:
    """The loss, and the gradients of anchors [views, batch, D] and prototypes."""
    anchors, c = (x.clone().requires_grad_() for x in (anchors, c))
    value = loss(anchors.flatten(0, 1), targets, c)
    return [value.detach(), *torch.autograd.grad(value, (anchors, c))]


def of_rank(x: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return x.split(list(sizes), -2)[rank]


@case
def msn_of_the_global_batch(rank: int, world: int) -> None:
    """The mean assignment, the balanced targets and the mean are those of all ranks, for uneven ones too."""
    for sizes in SIZES[world]:
        if max(sizes) > 50:
            continue
        anchors, targets, c = embeddings(sum(sizes))
        mine = of_rank(anchors, sizes, rank), of_rank(targets, sizes, rank)
        for name, loss in FORMS.items():
            value, grad, of_prototypes = value_and_gradients(loss, anchors, targets, c)
            found = value_and_gradients(partial(loss, gather_distributed=True), *mine, c)
            near = {**CLOSE, "msg": lambda m, told=f"{name}, {sizes}": f"{told}: {m}"}
            torch.testing.assert_close(mean_over_ranks(found[0]), value, **near)
            torch.testing.assert_close(found[1] / world, of_rank(grad, sizes, rank), **near)
            torch.testing.assert_close(mean_over_ranks(found[2]), of_prototypes, **near)


@case
def msn_of_ranks_that_disagree(rank: int, world: int) -> None:
    if world == 1:
        return
    anchors, targets, c = embeddings(4)
    x = anchors.flatten(0, 1)
    own = 5 if rank == 1 else 7
    for told, call in (
        ("the number of prototypes", lambda: sslfast.msn(x, targets, c[:own], gather_distributed=True)),
        ("sinkhorn_iterations", lambda: sslfast.msn(x, targets, c, sinkhorn_iterations=own, gather_distributed=True)),
        (
            "regularization_weight",
            lambda: sslfast.pmsn(x, targets, c, regularization_weight=own, gather_distributed=True),
        ),
    ):
        raises(ValueError, f"the ranks disagree on {told}", call)
    assert sslfast.MSNLoss(gather_distributed=True)(x, targets, c).isfinite()  # and the next call works


@case
def msn_of_lightly(rank: int, world: int) -> None:
    """lightly balances the targets over the ranks; the mean assignment and the mean are each rank's own."""
    if world != 2:
        return
    for module, name in (("msn_loss", "MSNLoss"), ("pmsn_loss", "PMSNLoss")):
        criterion = peers.lightly_loss(module, name, gather_distributed=True)  # Unavailable skips the case
        for dtype, digits in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            anchors, targets, c = embeddings(10, dtype)
            mine = of_rank(anchors, (5, 5), rank), of_rank(targets, (5, 5), rank), c
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="sslfast does not serve")
                own = value_and_gradients(criterion, *mine)
                with sslfast.patch("lightly"):
                    found = value_and_gradients(criterion, *mine)
            for place, (a, b) in enumerate(zip(found, own, strict=True)):
                told = f"{name}, {dtype}, {place}"
                torch.testing.assert_close(a, b, rtol=digits, atol=digits, msg=lambda m, t=told: f"{t}: {m}")
