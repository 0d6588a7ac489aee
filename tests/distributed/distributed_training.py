"""Steps of training over ranks: every rank's gradients are those of one process on the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sslfast
from distributed_common import case
from helpers import within_budget

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
