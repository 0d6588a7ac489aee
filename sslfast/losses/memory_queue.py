"""``MemoryQueue``: the last K keys, for the losses that compare with a queue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_matrix
from ..distributed.agreement import over_ranks
from ..distributed.choose import scope_of
from ..ops.nearest_neighbours import nearest_neighbours
from ._inputs import check_fits, check_gather


class MemoryQueue(nn.Module):
    """A ring buffer of keys, ``queue`` [K, D], with the place of its oldest key, ``pointer`` [] int64.

    Both are buffers: they move with the module and are part of the ``state_dict``. It starts full, with random unit
    rows that are the same on every rank. Its dtype is float32 until the module is cast.

    A loss that was computed from ``queue`` may run its backward after the next :meth:`enqueue` (the order of MoCo's
    reference code): its gradient is that of the keys it saw, and no copy of the queue is made for it. That holds for
    first derivatives of losses in which only the queries learn, which is what a queue is for; ``create_graph=True``
    after an enqueue is an error.

    Args:
        size: K, how many keys are kept.
        dim: D, their width.
        gather_distributed: enqueue the keys of all ranks, in rank order, so that every rank holds the same queue
            (default: this rank's alone).

    Raises:
        ValueError: size or dim is not positive; ``gather_distributed`` without torch.distributed.

    Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.1. Unlike
    MoCo's code, any number of keys may be enqueued, and unlike lightly 1.6.0's ``MemoryBankModule``, no key is dropped
    where the buffer wraps around.

    Example:
        >>> queue = sslfast.MemoryQueue(size=3, dim=2)
        >>> queue.enqueue(torch.eye(2))
        >>> queue.queue[:2].tolist(), queue.pointer.item()
        ([[1.0, 0.0], [0.0, 1.0]], 2)
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, gather_distributed: bool = False) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_gather(gather_distributed)
        same_everywhere = torch.Generator("cpu").manual_seed(0)
        rows = nn.functional.normalize(torch.randn(size, dim, generator=same_everywhere, device="cpu"), dim=1)
        self.register_buffer("queue", rows.to(torch.get_default_device()))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.gather_distributed = gather_distributed

    @over_ranks()
    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys with ``keys`` [N, D], in order; of more than K keys the last K stay.

        They are stored as given (normalise them as the loss does), in the queue's dtype, without gradient. Nothing
        waits for the device.

        Raises:
            TypeError, ValueError: ``keys`` is not a matrix of floating-point numbers, is elsewhere, or its width is not
                the queue's.
        """
        check_matrix("keys", keys)
        size, dim = self.queue.shape
        if keys.shape[1] != dim:
            raise ValueError(f"keys must be as wide as the queue, {dim} features, got {keys.shape[1]}")
        if keys.device != self.queue.device:
            raise ValueError(f"keys must be on the queue's device {self.queue.device}, got {keys.device}")
        if self.gather_distributed:
            keys = scope_of(True).gather(keys.detach().contiguous())
        count = keys.shape[0]
        first = max(count - size, 0)
        places = (self.pointer + torch.arange(first, count, device=keys.device)) % size
        self.queue.index_copy_(0, places, keys[first:].detach().to(self.queue.dtype))
        self.pointer.copy_((self.pointer + count) % size)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """The queue's key with the largest cosine to each row of ``z`` [N, D]: [N, D], as it is stored, in z's dtype.

        NNCLR's positives (Dwibedi et al. 2021, "With a Little Help from My Friends"): ``nt_xent(queue.nearest(z0),
        p1)``, then ``enqueue(z0)``. As lightly 1.6.0's ``NNMemoryBankModule``, whose matrix [N, K] is not stored here.

        Raises:
            TypeError, ValueError: ``z`` is not a matrix of floating-point numbers of the queue's width and device.
        """
        check_matrix("z", z)
        rows = z.to(self.queue.dtype)
        check_fits("z", rows, "the queue", self.queue)
        return self.queue[nearest_neighbours(rows, self.queue, normalize=True).index[:, 0]].to(z.dtype)

    def extra_repr(self) -> str:
        return f"size={self.queue.shape[0]}, dim={self.queue.shape[1]}"


def memory_bank(size: int | Sequence[int], gather_distributed: bool) -> MemoryQueue | None:
    """The bank that lightly's ``memory_bank_size`` names: ``(K, D)``, or 0 for none.

    Raises:
        ValueError: it is negative, a bare number above 0, or not two numbers.
    """
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if any(number < 0 for number in sizes):
        raise ValueError(f"memory_bank_size must not be negative, got {size!r}")
    if sizes == (0,):
        return None
    if len(sizes) != 2:
        raise ValueError(
            f"memory_bank_size={size!r} does not give the keys' width: it must be (K, D), or 0 for no memory bank"
        )
    return MemoryQueue(*sizes, gather_distributed=gather_distributed) if sizes[0] else None
