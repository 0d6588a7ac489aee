"""Cases of test_distributed.py: losses of moments and of directions are those of one process on the global batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sslfast
from benchmarks import peers
from distributed_common import SIZES as BATCH_SIZES, batch, case, mean_over_ranks, of_global_batch, raises
from distributed_moments import SIZES, batches
from sslfast.losses.decorrelation.barlow_twins import BarlowTwinsLoss, barlow_twins
from sslfast.losses.decorrelation.emp_ssl import emp_ssl
from sslfast.losses.decorrelation.frossl import frossl
from sslfast.losses.decorrelation.le_jepa import le_jepa, le_wm
from sslfast.losses.decorrelation.mmcr import mmcr
from sslfast.losses.decorrelation.sigreg import SIGReg, sigreg
from sslfast.losses.decorrelation.spectral_contrastive import spectral_contrastive
from sslfast.losses.decorrelation.tico import TiCoLoss, tico
from sslfast.losses.decorrelation.vibcreg import vibcreg
from sslfast.losses.decorrelation.vicreg import VICRegLoss, vicreg
from sslfast.losses.decorrelation.vicregl import vicregl
from sslfast.losses.decorrelation.visreg import visreg


def places(x: Tensor, y: Tensor) -> Tensor:
    """Local features [n, 2, 2, D] of each row's own; no two pairs of places are equally far from each other."""
    return torch.stack([x, 0.5 * y + x, 1.1 * x.flip(1), y - 0.3 * x], 1).unflatten(1, (2, 2))


def of_crops(x: Tensor, y: Tensor, s: Tensor, **how: bool) -> Tensor:
    """VICRegL of two global views and a local one."""
    views = [(x, places(x, y)), (s * y, places(y, x)), (x + y, places(x + y, s * x))]
    grids = [local.detach()[..., :2] for _, local in views]
    return vicregl(views[:2], grids[:2], views[2:], grids[2:], num_matches=(3, 2), **how)


# Each takes x, y [n, D], a learnable number, and ``gather_distributed``.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "barlow_twins": lambda x, y, s, **how: barlow_twins(x, s * y + x, **how),
    "barlow_twins, dual": lambda x, y, s, **how: barlow_twins(x, s * y + x, form="dual", **how),
    "vicreg": lambda x, y, s, **how: vicreg(s * x, 0.3 * y, **how),
    "vicreg, places": lambda x, y, s, **how: vicreg(places(x, s * y), places(y, x), **how),
    "vibcreg": lambda x, y, s, **how: vibcreg(s * x, 0.3 * y, **how),
    "vicregl": of_crops,
    "tico": lambda x, y, s, **how: tico(x + s, y, gather_distributed=how.get("gather_distributed", False))[0],
    "emp_ssl": lambda x, y, s, **how: emp_ssl([x + s, y, x * y], 0.3, 5.0, **how),
    "frossl": lambda x, y, s, **how: frossl([x + s, y, x * y], **how),
    "mmcr": lambda x, y, s, **how: mmcr(torch.stack([x, y], 1), torch.stack([x + s, y.flip(1)], 1), 0.3, **how),
    "spectral_contrastive": lambda x, y, s, **how: spectral_contrastive(s * x, x + y, **how),
    "sigreg": lambda x, y, s, **how: sigreg(torch.stack([s * x, y]), slices=directions(x), **how),
    "sigreg, eb_jepa": lambda x, y, s, **how: sigreg(
        s * x + y, slices=directions(x), knots=10, convention="eb_jepa", **how
    ),
    "le_jepa": lambda x, y, s, **how: le_jepa(
        torch.stack([s * x]), torch.stack([y, x + y]), 0.4, slices=directions(x), **how
    ),
    "le_wm": lambda x, y, s, **how: le_wm(s * x, y, torch.stack([x, y], 1), slices=directions(x), **how),
    "visreg": lambda x, y, s, **how: visreg(torch.stack([s * x, y]), 0.5 * x[None], slices=directions(x), **how),
}


def directions(x: Tensor) -> Tensor:
    """[D, 9]; those that are drawn differ in the last digits of float32 between backends."""
    random = torch.Generator().manual_seed(x.shape[1])
    return torch.nn.functional.normalize(torch.randn(x.shape[1], 9, generator=random, dtype=torch.float64), dim=0)


@case
def slices_are_those_of_the_latest_step(rank: int, world: int) -> None:
    """A rank that has skipped batches draws as the others do, and goes on from its own count."""
    sizes = SIZES[world][0]
    whole, parts = batches(sizes, 6)
    loss_fn = SIGReg(num_vectors=5, gather_distributed=True, seed=3)
    loss_fn.global_step.fill_(rank)
    found = loss_fn(parts[rank][0])
    torch.testing.assert_close(found, sigreg(whole[0], num_vectors=5, seed=3, step=world - 1), rtol=1e-9, atol=1e-9)
    assert loss_fn.global_step == rank + 1


@case
def ranks_that_disagree_on_slices_all_raise(rank: int, world: int) -> None:
    if world == 1:
        return
    odd = rank == world - 1
    z = torch.randn(4, 6)
    given = directions(z) if odd else None
    for name, call in (
        ("how many slices", lambda: sigreg(z, num_vectors=5 + odd, gather_distributed=True)),
        ("the seed", lambda: sigreg(z, seed=int(odd), gather_distributed=True)),
        ("how many knots", lambda: sigreg(z, knots=5 + odd, gather_distributed=True)),
        ("the distance of the knots", lambda: sigreg(z, t_max=3.0 + odd, gather_distributed=True)),
        ("whether slices are given", lambda: sigreg(z, slices=given, gather_distributed=True)),
        ("how many slices", lambda: visreg(z[None], num_slices=5 + odd, gather_distributed=True)),
    ):
        raises(ValueError, f"the ranks disagree on {name}", call)
    if odd:
        raises(ValueError, "knots must be", lambda: sigreg(z, knots=1, gather_distributed=True))
    else:
        raises(RuntimeError, "refused there", lambda: sigreg(z, gather_distributed=True))


@case
def moment_losses_of_the_global_batch(rank: int, world: int) -> None:
    """The library's own losses, against themselves in one process; more rows than features, and fewer."""
    for sizes, width in itertools.product([s for s in BATCH_SIZES[world] if max(s) < 50], (7, 40)):
        whole, parts = batch(sizes, torch.float64, width)
        for name, loss in LOSSES.items():
            with sslfast.use_backend("reference"):
                truth = loss_and_gradients(loss, whole[:3])
            found = loss_and_gradients(lambda *x, f=loss: f(*x, gather_distributed=True), parts[rank][:3])
            of_global_batch(f"{name}, {sizes}, {width}", found, truth, rank, sizes, 1e-10)


@case
def local_invariance(rank: int, world: int) -> None:
    """It is this rank's alone; the other terms are everyone's."""
    sizes = SIZES[world][0]
    _, parts = batches(sizes, 6)
    mine = parts[rank]
    found = loss_and_gradients(lambda a, b: vicreg(a, b, gather_distributed=True, invariance="local"), mine)
    others = loss_and_gradients(lambda a, b: vicreg(a, b, 0.0, gather_distributed=True), mine)
    alone = loss_and_gradients(lambda a, b: 25 * torch.nn.functional.mse_loss(a, b), mine)
    for mine, *terms in zip(found, others, alone, strict=True):
        torch.testing.assert_close(mine, sum(terms))


def loss_and_gradients(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@case
def moment_losses_under_ddp(rank: int, world: int) -> None:
    """The averaged gradients of an encoder."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 12)).double()
    scale = torch.tensor(1.1, dtype=torch.float64)
    for sizes in BATCH_SIZES[world][:1]:
        (x, y, *_), parts = batch(sizes, torch.float64, width=6)
        replica = DistributedDataParallel(model)
        for name, loss in LOSSES.items():
            model.zero_grad()
            with sslfast.use_backend("reference"):
                loss(*model(torch.stack([x, y])), scale).backward()
            truth = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
            loss(*replica(torch.stack(parts[rank][:2])), scale, gather_distributed=True).backward()
            for p, true in zip(model.parameters(), truth, strict=True):
                torch.testing.assert_close(p.grad, true, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@case
def moment_losses_as_lightly(rank: int, world: int) -> None:
    """lightly's own gather, for even batches."""
    if world != 2:
        return  # importing lightly takes longer than the comparison
    pairs = (
        ("barlow_twins_loss", "BarlowTwinsLoss", lambda: BarlowTwinsLoss(gather_distributed=True, statistics="local")),
        ("vicreg_loss", "VICRegLoss", lambda: VICRegLoss(gather_distributed=True)),
        ("tico_loss", "TiCoLoss", lambda: TiCoLoss(gather_distributed=True)),
    )
    for (module, name, ours), width in itertools.product(pairs, (3, 20)):
        theirs = peers.lightly_loss(module, name, gather_distributed=True)  # Unavailable skips the case, and is counted
        inputs = batch([4] * world, torch.float64, width)[1][rank][:2]
        found, expected = (loss_and_gradients(loss, inputs) for loss in (ours(), theirs))
        found[0], expected[0] = mean_over_ranks(found[0]), mean_over_ranks(expected[0])
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
