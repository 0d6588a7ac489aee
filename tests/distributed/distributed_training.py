"""Steps of training over ranks: every rank's gradients are those of one process on the global batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sslfast
from distributed_common import STRATEGIES, case
from helpers import within_budget
from sslfast.losses.contrastive.group_nt_xent import group_nt_xent

SIZES = {1: (9,), 2: (7, 4), 4: (3, 1, 8, 5)}


def encoder() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5)).double()


def views(world: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(sum(SIZES[world]), 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def mine(rank: int, world: int, batches: list[Tensor]) -> list[Tensor]:
    return [batch.split(SIZES[world])[rank] for batch in batches]


def reductions(ddp: DistributedDataParallel) -> list[int]:
    """Grows by one for every bucket that ``ddp`` averages."""
    found: list[int] = []

    def hook(state: Any, bucket: Any) -> Any:
        found.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / dist.get_world_size())

    hook.__annotations__.clear()  # they are strings, which DDP does not read
    ddp.register_comm_hook(None, hook)
    return found


@case
def grad_cache_under_ddp(rank: int, world: int) -> None:
    """As many chunks as the rows of a rank need; the gradients are averaged once in a step."""
    model, alone = encoder(), encoder()
    sslfast.nt_xent(*map(alone, views(world)), 0.2).backward()
    ddp = DistributedDataParallel(model)
    buckets = reductions(ddp)
    criterion = sslfast.NTXentLoss(0.2, gather_distributed=True)
    for step in (1, 2):
        ddp.zero_grad()
        sslfast.grad_cache_step(ddp, mine(rank, world, views(world)), criterion, chunk=2)
        assert len(buckets) == step
        for (name, p), true in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert p.grad is not None and true.grad is not None
            within_budget(name, p.grad, true.grad, true.grad, torch.float64, 1e-2)


# ---------------------------------------------------------------------------------------- numbers that the loss learns


def _regions(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Two regions of each image in two views, and their masks."""
    masks = torch.arange(2 * len(a)).view(len(a), 2) % 3
    return *(x.view(len(x), 2, x.shape[1] // 2) for x in (a, b)), masks, masks.flip(1)


def _unit(*views: Tensor) -> list[Tensor]:
    return [F.normalize(view) for view in views]


QUEUE = torch.randn(11, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
Learning = Callable[..., Tensor]
LEARNING: dict[str, Learning] = {
    "nt_xent": lambda a, b, t, **over: sslfast.nt_xent(a, b, t, **over),
    "NTXentLoss": lambda a, b, t, gather_distributed=False, **over: sslfast.NTXentLoss(
        nn.Parameter(t.detach()), gather_distributed=gather_distributed, **over
    )(a, b),
    "info_nce": lambda a, b, t, **over: sslfast.info_nce(a, b, t, **over),
    "symmetric_info_nce": lambda a, b, t, **over: sslfast.symmetric_info_nce(a, b, t, **over),
    "dcl": lambda a, b, t, **over: sslfast.dcl(a, b, t, **over),
    "dclw": lambda a, b, t, **over: sslfast.dclw(a, b, t, **over),
    "direct_clr": lambda a, b, t, **over: sslfast.direct_clr(a, b, t, loss_dim=4, **over),
    "macl": lambda a, b, t, **over: sslfast.macl(a, b, t, **over),
    "det_con_s": lambda a, b, t, **over: sslfast.det_con_s(*_regions(a, b), t, **over),
    "co2": lambda a, b, t, strategy="gather", **over: sslfast.co2(a, b, None, t, **over),
    "moco": lambda a, b, t, **over: sslfast.moco(a, b, QUEUE, t, **over),
    "moco_v3": lambda a, b, t, **over: sslfast.moco_v3(a, b, t, **over),
    "sup_con": lambda a, b, t, **over: sslfast.sup_con(torch.stack(_unit(a, b), 1), temperature=t, **over),
    "clip": lambda a, b, t, **over: sslfast.clip(*_unit(a, b), 1 / t, **over),
    "sig_lip": lambda a, b, t, **over: sslfast.sig_lip(*_unit(a, b), 1 / t, t - 2, **over),
    "multiple_negatives_ranking": lambda a, b, t, **over: sslfast.multiple_negatives_ranking(a, b, scale=1 / t, **over),
}


@case
def learnt_numbers_outside_ddp(rank: int, world: int) -> None:
    """Every rank has the gradient of the global batch, though nobody averages it; a second time, too."""
    whole = views(world)
    for name, loss in LEARNING.items():
        if name == "NTXentLoss":
            continue  # its parameter is its own; it is below
        one = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        (true,) = torch.autograd.grad(loss(*whole, one), one)
        for strategy in STRATEGIES:
            t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
            loss(*mine(rank, world, whole), t, gather_distributed=True, strategy=strategy).backward()
            assert t.grad is not None
            within_budget(f"{name}, {strategy}", t.grad, true, true, torch.float64, 1e-2)
    criterion = sslfast.NTXentLoss(nn.Parameter(torch.tensor(0.4, dtype=torch.float64)), gather_distributed=True)
    alone = sslfast.NTXentLoss(nn.Parameter(torch.tensor(0.4, dtype=torch.float64)))
    for module, batch in ((criterion, mine(rank, world, whole)), (alone, whole)):
        module(*batch).backward()
    within_budget(
        "NTXentLoss", criterion.temperature.grad, alone.temperature.grad, alone.temperature.grad, torch.float64
    )
    if world > 1:  # twice differentiable
        t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        both = []
        for batch, over in ((mine(rank, world, whole), {"gather_distributed": True}), (whole, {})):
            (first,) = torch.autograd.grad(sslfast.nt_xent(*batch, t, **over), t, create_graph=True)
            both.append(torch.autograd.grad(first, t)[0])
        within_budget("second derivative", both[0], both[1], both[1], torch.float64)


@case
def ranks_that_do_not_all_learn(rank: int, world: int) -> None:
    if world == 1:
        return
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=rank != 1)
    with pytest.raises(ValueError, match="disagree on how many of the loss's own parameters learn: 1 on rank.* 0 on"):
        sslfast.nt_xent(*mine(rank, world, views(world)), t, gather_distributed=True)


# ------------------------------------------------------------------------------------------------- ranks that refuse


# Not of two views, or taking ranks without a row; their refusals are cases of their own.
ELSEWHERE = {"sigreg", "le_jepa", "le_wm", "visreg", "swav", "sinkhorn", "sinkhorn_bias"}
ELSEWHERE |= {"prototype_sinkhorn", "center_update_"}
ELSEWHERE |= {"k_means", "self_labelling", "capi", "prototype_usage"}


def _calls() -> dict[str, Callable[..., Any]]:
    """Every public loss over ranks, of two views."""
    found: dict[str, Callable[..., Any]] = {}
    for name in sslfast.__all__:
        function = getattr(sslfast, name)
        if name in ELSEWHERE or not inspect.isfunction(function):
            continue
        if "gather_distributed" in inspect.signature(function).parameters:
            found[name] = function
    special = {
        "byol": lambda a, b, **over: sslfast.byol(a, b, b, a, **over),
        "sim_siam": lambda a, b, **over: sslfast.sim_siam(a, b, b, a, **over),
        "moco": lambda a, b, **over: sslfast.moco(a, b, QUEUE.to(a.dtype), **over),
        "re_ssl": lambda a, b, **over: sslfast.re_ssl(a, b, QUEUE.to(a.dtype), **over),
        "sup_con": lambda a, b, **over: sslfast.sup_con(torch.stack([a, b], 1), **over),
        "clip": lambda a, b, **over: sslfast.clip(a, b, 2.0, **over),
        "sig_lip": lambda a, b, **over: sslfast.sig_lip(a, b, 2.0, **over),
        "uniformity": lambda a, b, **over: sslfast.uniformity(a, **over),
        "koleo": lambda a, b, **over: sslfast.koleo(a, **over),
        "det_con_s": lambda a, b, **over: sslfast.det_con_s(*_regions(a, b), **over),
        "det_con_b": lambda a, b, **over: sslfast.det_con_b(*_regions(a, b)[:2], *_regions(a, b), **over),
        "emp_ssl": lambda a, b, **over: sslfast.emp_ssl([a, b], **over),
        "msn": lambda a, b, **over: sslfast.msn(a, b, QUEUE.to(a.dtype), **over),
        "pmsn": lambda a, b, **over: sslfast.pmsn(a, b, QUEUE.to(a.dtype), **over),
        "frossl": lambda a, b, **over: sslfast.frossl([a, b], **over),
        "mmcr": lambda a, b, **over: sslfast.mmcr(torch.stack([a, b], 1), torch.stack([b, a], 1), **over),
        "vicregl": lambda a, b, **over: sslfast.vicregl([(a, _places(a)), (b, _places(b))], [_grid(a)] * 2, **over),
        "contrastive_diagnostics": sslfast.contrastive_diagnostics,
    }
    modules = {
        "NTXentLoss": lambda a, b, **over: sslfast.NTXentLoss(**over)(a, b),
        "DirectCLRLoss": lambda a, b, **over: sslfast.DirectCLRLoss(4, **over)(a, b),
        "CO2Regularizer": lambda a, b, **over: sslfast.CO2Regularizer(1, 0.2, (11, 6), **over).double()(a, b),
        "NTXentLoss with a bank": lambda a, b, **over: sslfast.NTXentLoss(0.2, (11, 6), **over).double()(a, b),
        "InfoNCELoss": lambda a, b, **over: sslfast.InfoNCELoss(**over)(a, b),
        "MultipleNegativesRankingLoss": lambda a, b, **over: sslfast.MultipleNegativesRankingLoss(**over)(a, b),
        "MemoryQueue": lambda a, b, **over: sslfast.MemoryQueue(11, 6, **over).double().enqueue(a),
        "group_nt_xent": lambda a, b, **over: group_nt_xent(torch.cat([a, b]), torch.arange(len(a)).repeat(2), **over),
    }
    return {**found, **special, **modules}


def _places(a: Tensor) -> Tensor:
    return a[:, None, None, :].expand(-1, 2, 2, -1).contiguous()


def _grid(a: Tensor) -> Tensor:
    return torch.rand(len(a), 2, 2, 2, dtype=a.dtype if a.is_floating_point() else torch.float32)


ONE_TENSOR = (
    "MemoryQueue",
    "group_nt_xent",
    "koleo",
    "mmcr",
    "sup_con",
    "uniformity",
)  # made of the views, or of the first
REFUSED = {
    "no rows": lambda a, b: (a[:0], b[:0]),
    "one view shorter": lambda a, b: (a, b[:-1]),
    "integers": lambda a, b: (a.long(), b.long()),
}


@case
def a_rank_that_refuses_its_input(rank: int, world: int) -> None:
    """The others are told at once, and the group goes on."""
    if world == 1:
        return
    a, b = mine(rank, world, views(world))
    for (name, call), (what, spoil) in ((c, r) for c in _calls().items() for r in REFUSED.items()):
        if what == "one view shorter" and name in ONE_TENSOR:
            continue
        _refused_by_one(
            f"{name}: {what}", rank, lambda x, y, call=call: call(x, y, gather_distributed=True), (a, b), spoil
        )
    for name in ("nt_xent", "dcl", "dclw", "direct_clr", "macl", "det_con_s", "info_nce", "moco", "moco_v3", "sup_con"):
        number = float("nan") if rank == 1 else 0.2
        call = _calls()[name]
        for strategy in STRATEGIES:
            over = {"temperature": number, "gather_distributed": True, "strategy": strategy}
            _refused_by_one(f"{name}: NaN", rank, lambda x, y, call=call, over=over: call(x, y, **over), (a, b))
    assert torch.isfinite(sslfast.nt_xent(a, b, gather_distributed=True))
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == world


def _refused_by_one(
    what: str,
    rank: int,
    call: Callable[..., Any],
    inputs: tuple[Tensor, Tensor],
    spoil: Callable[..., tuple[Tensor, Tensor]] = lambda a, b: (a, b),
) -> None:
    start = time.monotonic()
    try:
        call(*(spoil(*inputs) if rank == 1 else inputs))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        told = isinstance(error, RuntimeError) and "the inputs of rank 1 were refused there" in str(error)
        assert told == (rank != 1), f"{what}: {error!r}"
    else:
        raise AssertionError(f"{what}: nothing was raised")
    assert time.monotonic() - start < 20, what
    dist.barrier()  # no rank is an exchange behind the others
