"""Cases of test_distributed.py: lightly's losses with ``gather_distributed=True``, with sslfast in them and without."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sslfast
from benchmarks import peers
from distributed_common import batch, case, mean_over_ranks
from sslfast.adapters import _serve

ROWS = 5
GATHERING = {
    "NTXentLoss": "ntx_ent_loss",
    "DCLLoss": "dcl_loss",
    "VICRegLoss": "vicreg_loss",
    "TiCoLoss": "tico_loss",
}


def _loss(module: str, name: str, **options: Any) -> Any:
    return peers.lightly_loss(module, name, gather_distributed=True, **options)  # Unavailable skips the case


def _regions(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Two regions of each image in two views, and their masks."""
    masks = torch.arange(2 * len(a)).view(-1, 2) % 3
    return a.view(-1, 2, 3), b.view(-1, 2, 3), masks, masks.flip(1)


def _banked() -> Any:
    torch.manual_seed(1)
    return _loss("ntx_ent_loss", "NTXentLoss", memory_bank_size=(16, 6))


def _vicregl(*inputs: Tensor) -> Tensor:
    """Two global views [n, 6], whose local features are parts of them."""
    criterion = _loss("vicregl_loss", "VICRegLLoss", num_matches=(3, 2))
    features = [(x, x.view(-1, 2, 3, 1) * torch.tensor([1.0, 0.3], dtype=x.dtype)) for x in inputs]
    places = torch.arange(12, dtype=inputs[0].dtype).sqrt().view(1, 2, 3, 2).expand(len(inputs[0]), -1, -1, -1)
    return criterion(features, [places, places.flip(1) + 0.1])


def _stateful(make: Callable[[], Any], steps: int = 3) -> Callable[..., Tensor]:
    """The last of several steps' losses, in which all inputs of each count, and the state after them."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        criterion = make()
        losses = [criterion(a * (i + 1) + b, b) for i in range(steps)]
        state = criterion.C if hasattr(criterion, "C") else criterion.memory_bank.bank
        return torch.stack([*losses, state.mean()]).sum()

    return call


def _capi(a: Tensor, b: Tensor) -> Tensor:
    """Two tokens an image, and three clusters; none so far from all of them that lightly's epsilon counts."""
    return _loss("capi_loss", "CAPILoss")(a.view(-1, 2, 3) / 20, (a + b).view(-1, 2, 3))


def value_and_gradients(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = call(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@case
def lightly_with_sslfast_in_it(rank: int, world: int) -> None:
    """Each rank's value and gradients are lightly's own on that rank."""
    if world != 2:
        return  # importing lightly takes longer than the comparison
    calls: dict[str, Callable[..., Tensor]] = {
        "NTXentLoss": _loss("ntx_ent_loss", "NTXentLoss", temperature=0.2),
        "a bank": _stateful(_banked),
        "DCLLoss": _loss("dcl_loss", "DCLLoss"),
        "DCLWLoss": _loss("dcl_loss", "DCLWLoss", sigma=0.3),
        "DetConSLoss": lambda a, b: _loss("detcon_loss", "DetConSLoss")(*_regions(a, b)),
        "DetConBLoss": lambda a, b: _loss("detcon_loss", "DetConBLoss")(*_regions(a, b)[:2], *_regions(b, a)),
        "BarlowTwinsLoss": _loss("barlow_twins_loss", "BarlowTwinsLoss"),
        "VICRegLoss": _loss("vicreg_loss", "VICRegLoss"),
        "TiCoLoss": _stateful(lambda: _loss("tico_loss", "TiCoLoss")),
        "CAPILoss": _capi,
    }
    for name, call in calls.items():
        for dtype in (torch.float32, torch.float64):
            if name in ("a bank", "CAPILoss") and dtype == torch.float64:
                continue  # lightly's bank is float32, and its epsilon left to it
            inputs = batch([ROWS] * world, dtype, 6)[1][rank][:2]
            own = value_and_gradients(copy.deepcopy(call), inputs)
            with sslfast.patch("lightly"), warnings.catch_warnings():
                warnings.filterwarnings("error", message="sslfast does not serve")
                found = value_and_gradients(copy.deepcopy(call), inputs)
            error = 1e-9 if dtype == torch.float64 else 1e-5
            for place, (mine, theirs) in enumerate(zip(found, own, strict=True)):
                near = {"rtol": error, "atol": error * max(1.0, theirs.abs().max().item())}
                torch.testing.assert_close(
                    mine, theirs, **near, msg=lambda m, n=name, p=place, t=dtype: f"{n}, {t}, {p}: {m}"
                )


@case
def barlow_twins_of_lightly_with_uneven_batches(rank: int, world: int) -> None:
    """lightly's C is the mean of the ranks', not of the rows: left to it, on every rank."""
    if world != 2:
        return
    loss = _loss("barlow_twins_loss", "BarlowTwinsLoss")
    left_to_lightly(loss, batch([5, 3], torch.float64, 6)[1][rank][:2], "different numbers of rows")


def left_to_lightly(loss: Callable[..., Tensor], inputs: list[Tensor], why: str) -> None:
    """Under the patch its bits are lightly's, and a warning says why."""
    own = value_and_gradients(loss, inputs)
    with sslfast.patch("lightly"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _serve._told.clear()
        found = value_and_gradients(loss, inputs)
    assert any(why in str(w.message) for w in told)
    for mine, theirs in zip(found, own, strict=True):
        assert torch.equal(mine, theirs)


@case
def losses_of_lightly_that_gather_place_by_place(rank: int, world: int) -> None:
    """Places between rows and features would each need a collective: left to lightly, on every rank."""
    if world != 2:
        return
    vicreg = _loss("vicreg_loss", "VICRegLoss")
    inputs = batch([ROWS] * world, torch.float64, 6)[1][rank][:2]
    for call in (_vicregl, lambda a, b: vicreg(a.view(-1, 2, 3), b.view(-1, 2, 3))):
        left_to_lightly(call, inputs, "a collective for each place")


def _of_all_rows(name: str, sizes: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    """The mean of the ranks' losses by lightly's own code in one process: that of the global batch.

    But VICReg's invariance: each rank's own, however few its rows.
    """
    if name != "VICRegLoss":
        return peers.lightly_loss(GATHERING[name], name)(x, y)
    errors = [(a - b).square().mean() for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    rest = peers.lightly_loss(GATHERING[name], name, lambda_param=0)(x, y)
    return rest + 25 * sum(errors) / len(errors)


@case
def losses_of_lightly_with_uneven_batches(rank: int, world: int) -> None:
    """lightly's own gather refuses them; sslfast's loss is that of the global batch, down to one row on a rank."""
    if world != 2:
        return
    for sizes in ((8, 3), (3, 8), (5, 1), (1, 1)):
        whole, parts = batch(sizes, torch.float64, 6)
        mine = parts[rank][:2]
        for name, module in GATHERING.items():
            whole_loss = functools.partial(_of_all_rows, name, sizes)
            value, *gradients = value_and_gradients(whole_loss, whole[:2])
            loss = _loss(module, name)
            with sslfast.patch("lightly"), warnings.catch_warnings():
                warnings.filterwarnings("error", message="sslfast does not serve")
                found, *ours = value_and_gradients(loss, mine)
            told = f"{name}, {sizes}"
            torch.testing.assert_close(mean_over_ranks(found), value, msg=lambda m, t=told: f"{t}: {m}")
            for got, expected in zip(ours, gradients, strict=True):  # DDP takes the mean over ranks
                part = expected.split(list(sizes))[rank]
                torch.testing.assert_close(got / world, part, msg=lambda m, t=told: f"{t}: {m}")
