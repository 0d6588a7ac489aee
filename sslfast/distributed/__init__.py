"""Losses over the batches of all ranks, on torch.distributed."""

from .choose import scope_of
from .scope import Scope, Shard

__all__ = ["Scope", "Shard", "scope_of"]
