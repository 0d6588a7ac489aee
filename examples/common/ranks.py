"""One process, or several that torchrun started: ``torchrun --nproc-per-node 2 -m examples.pretrain``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def group() -> Iterator[None]:
    """The process group of all processes (gloo) inside the block, if torchrun started them."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's rank, and how many there are: (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean(x: Tensor) -> Tensor:
    """``x`` averaged over the ranks."""
    _, world = place()
    if world == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world
