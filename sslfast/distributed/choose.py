"""Which scope a loss's arguments name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _library
from .collectives import Ranks
from .scope import Scope, check_strategy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def scope_of(gather_distributed: bool, strategy: str = "gather", group: ProcessGroup | None = None) -> Scope:
    """The scope that a loss's arguments name. Make one for each call of a loss: that is cheap.

    Args:
        gather_distributed: ``False``: the local batch, whatever the other arguments.
        strategy: ``"gather"`` (every rank holds the columns of all) or ``"ring"`` (columns visit rank after rank; no
            rank ever holds the global batch).
        group: the process group (default: all processes).

    Returns:
        The local scope also where the group has only one process.

    Raises:
        ValueError: ``strategy`` is neither of the two.
        RuntimeError: ``gather_distributed=True`` without an initialised process group, or from a process outside it.
        NotImplementedError: several ranks, inside forward-mode differentiation.

    Example:
        >>> scope = sslfast.distributed.scope_of(gather_distributed=False)
        >>> scope.shard(torch.zeros(8, 4))
        Shard(local=8, offset=0, total=8, sizes=(8,))
    """
    check_strategy(strategy)
    if not gather_distributed:
        return Scope()

    # Imported where they are used: what they are made of imports PyTorch's compiler.
    from .gather import GatherScope
    from .ring import RingScope

    ranks = Ranks(group)
    if ranks.size == 1:
        return Scope()
    if _library.in_forward_mode():
        raise NotImplementedError("sslfast: gather_distributed=True over several ranks has no forward-mode derivative")
    return RingScope(ranks) if strategy == "ring" else GatherScope(ranks)
