"""What the scopes send: rows gathered and summed back to their owners, sums over ranks, and blocks round a ring.

Every function is a collective: all ranks of the group call it, in the same order. Tensors travel as bytes, so any dtype
does. Sums of rows are made by the receiver, in rank order: the result is the same from run to run, and 16-bit gradients
are added in float32 though they travel in 16 bits. (`total` is the backend's own all-reduce, in the backend's order.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Renamed in torch 2.13, where the older name warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Block = Sequence[Tensor | None]


class Ranks:
    """A process group as this rank sees it.

    Args:
        group: ``None`` for all processes.

    Raises:
        RuntimeError: torch.distributed is absent or its process group is not initialised, or this process is not in
            ``group``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "gather_distributed=True needs an initialised process group: call torch.distributed."
                "init_process_group first, or pass gather_distributed=False for the local batch alone"
            )
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise RuntimeError(f"gather_distributed=True: process {dist.get_rank()} is not in the group it was given")
        config = str(dist.distributed_c10d.get_backend_config(group))  # "cpu:gloo,cuda:nccl"
        self.backends = dict(part.split(":", 1) for part in config.split(",") if ":" in part)

    def _carrier(self, device: torch.device) -> torch.device:
        """Where tensors of ``device`` are sent from: gloo carries those of a GPU through the host's memory."""
        return torch.device("cpu") if self.backends.get(device.type) == "gloo" else device

    def meeting_device(self, device: torch.device) -> torch.device:
        """Where a few integers that the host waits for are exchanged: the CPU if the group has a backend for it."""
        return torch.device("cpu") if "cpu" in self.backends else device

    def why_no_ring(self, device: torch.device) -> str | None:
        """The reason blocks cannot travel from rank to rank safely, or ``None`` if they can."""
        backend = self.backends.get(device.type, "none")
        if (device.type, backend) in (("cpu", "gloo"), ("cuda", "nccl")):
            return None
        return f"point-to-point messages of {device.type} tensors over backend {backend!r}"

    # ----------------------------------------------------------------------------------------------- on plain tensors

    def all_gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """``x`` [n, ...] of all ranks in rank order, [total, ...]; shorter ones are padded on the way."""
        most = max(sizes)
        carrier = self._carrier(x.device)
        mine = x.to(carrier).contiguous()
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        every = mine.new_empty(self.size * most, *mine.shape[1:])
        _all_gather(_bytes(every), _bytes(mine), group=self.group)
        if min(sizes) < most:
            every = torch.cat([part[:size] for part, size in zip(every.split(most), sizes, strict=True)])
        return every.to(x.device)

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """``sent[r]`` rows of ``x`` go to rank r, ``received[r]`` rows come from it; in rank order."""
        mine = x.to(self._carrier(x.device)).contiguous()
        every = mine.new_empty(sum(received), *mine.shape[1:])
        dist.all_to_all_single(_bytes(every), _bytes(mine), list(received), list(sent), group=self.group)
        return every.to(x.device)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def all_reduce_largest(self, x: Tensor) -> Tensor:
        """The largest of each number of ``x`` over the ranks."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, how: Any) -> Tensor:
        total = x.to(self._carrier(x.device), copy=True).contiguous()
        dist.all_reduce(total, how, group=self.group)
        return total.to(x.device)

    def post(self, block: Block, arriving: Block) -> _Message:
        """Start to send ``block`` to the next rank and to receive ``arriving`` from the previous one."""
        after, before = (self._global((self.rank + step) % self.size) for step in (1, -1))
        outgoing = [_bytes(t) for t in block if t is not None]
        incoming = [_bytes(t) for t in arriving if t is not None]
        operations = [dist.P2POp(dist.isend, t, after, self.group) for t in outgoing]
        operations += [dist.P2POp(dist.irecv, t, before, self.group) for t in incoming]
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Message(works, (*outgoing, *incoming))

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class _Message:
    """Sends and receives under way; it keeps their memory alive until they have been waited for."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Under gloo the host waits; under NCCL the current stream does."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = (), ()


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor [n, ...] as [n, bytes of a row], sharing memory."""
    width = x[0].numel()
    return x.as_strided((len(x), width), (width, 1)).view(torch.uint8)  # a dimension of one may have any stride


# ------------------------------------------------------------------------------------------------------ with gradient


def recorded(function: Any, *inputs: Any) -> Any:
    """``function.apply``, which torch leaves without types."""
    return function.apply(*inputs)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
        ctx.sizes, ctx.ranks = sizes, ranks
        return ranks.all_gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return parts_of_mine(grad, ctx.sizes, ctx.ranks).sum(0), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Ranks) -> Tensor:
        ctx.sent, ctx.received, ctx.ranks = sent, received, ranks
        return ranks.all_to_all(x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return recorded(_AllToAll, grad, ctx.received, ctx.sent, ctx.ranks), None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return recorded(_Total, grad, ctx.ranks), None


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return recorded(_Total, grad.contiguous(), ctx.ranks) / ctx.ranks.size, None


def averaged(x: Tensor, ranks: Ranks) -> Tensor:
    """``x``, the same number on every rank; its gradient is the mean of the ranks', as DDP would make it."""
    return recorded(_Averaged, x, ranks)


def gather_rows(x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """The rows ``x`` [n, ...] of all ranks, [total, ...]; the gradient of a row is summed over the ranks.

    The backward sends each rank its part of every rank's gradient, (W − 1)·n·D numbers a rank as the forward does.
    """
    return recorded(_GatherRows, x, sizes, ranks) if x.is_floating_point() else ranks.all_gather(x, sizes)


def parts_of_mine(x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """What each rank has for this rank's rows, [W, n, ...], from what it has for all rows, ``x`` [total, ...]."""
    mine = sizes[ranks.rank]
    return recorded(_AllToAll, x, sizes, (mine,) * ranks.size, ranks).view(ranks.size, mine, *x.shape[1:])


def total(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of ``x`` over the ranks; the gradient is summed over the ranks too."""
    return recorded(_Total, x, ranks)


# -------------------------------------------------------------------------------------------------------- round a ring


def travel(
    ranks: Ranks,
    sizes: Sequence[int],
    block: Block,
    visit: Callable[[int, Block], list[Tensor]],
    merge: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Send every rank's ``block`` once round the ring, collecting results for it that come home with it.

    On every hop the next block is on its way while ``visit`` works on the present one; what was collected for a block
    follows it one step behind. Two visiting blocks are held at a time, whatever the number of ranks.

    Args:
        sizes: rows of each rank's block.
        block: this rank's tensors [n, ...]; entries may be ``None`` (on all ranks alike).
        visit: ``visit(owner, block)`` works on one rank's block and returns the results for that block, [rows, ...]
            each, or an empty list (on all ranks and hops alike).
        merge: ``merge(earlier, latest)`` puts the results of earlier ranks and of this one together.

    Returns:
        The merged results of all ranks for this rank's own block.
    """
    size = ranks.size
    block = [None if t is None else t.contiguous() for t in block]
    spare = [[None if t is None else t.new_empty(max(sizes), *t.shape[1:]) for t in block] for _ in range(2)]
    collected: list[Tensor] = []
    following: _Message | None = None
    for hop in range(size):
        owner, next_owner = (ranks.rank - hop) % size, (ranks.rank - hop - 1) % size
        leading: _Message | None = None
        coming: Block = ()
        if hop < size - 1:
            coming = [None if t is None else t[: sizes[next_owner]] for t in spare[hop % 2]]
            leading = ranks.post(block, coming)
        latest = visit(owner, block)
        if following is not None:
            following.wait()
            latest = merge(collected, latest)
        if latest:
            latest = [t.contiguous() for t in latest]
            collected = [t.new_empty(sizes[next_owner], *t.shape[1:]) for t in latest]
            following = ranks.post(latest, collected)
        if leading is not None:
            leading.wait()
            block = coming
    if following is not None:
        following.wait()
    return collected
