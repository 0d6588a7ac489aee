"""Losses over the batches of all ranks, on torch.distributed."""

from .scope import Scope, Shard, scope_of

__all__ = ["Scope", "Shard", "scope_of"]
