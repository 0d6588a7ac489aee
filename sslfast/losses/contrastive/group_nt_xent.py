"""NT-Xent where a row has as many positives as its group has other rows, and they are summed inside the logarithm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator, check_integers, check_matrix, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.l2_normalize import l2_normalize
from ...ops.types import Pairs
from ._inputs import inverse


@over_ranks("temperature")
def group_nt_xent(
    z: Tensor,
    groups: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Contrastive loss with all rows of a group as positives, the form L_in: the sum over them, then its logarithm.

        ℓ_i = log Σ_{j≠i} exp(s_ij) − log Σ_{p∈P(i)} exp(s_ip),        s_ij = z_i·z_j / τ

    ``P(i)``: the other rows of i's group. With two rows in each group it is NT-Xent. (Khosla et al. also divide the sum
    by |P(i)|, a constant; :func:`sslfast.sup_con` is their L_out, the mean of the logarithms.) The N × N matrix is not
    stored; pairs within a group are, unless all groups are pairs: the sum of the groups' squared sizes.

    Args:
        z: [N, D] views of any number of images, in any order; float32, float64, bfloat16 or float16.
        groups: [N] integers, equal for rows that are positives of each other: an image's number, or its class. They
            are read on the host: on a GPU this waits for the device.
        temperature: τ, finite and not zero (default 0.1); or a one-element tensor, which receives its gradient.
        normalize: divide each row by its norm first (default).
        gather_distributed: contrast with the rows of all ranks, whose groups may span ranks; ``False``: this rank's.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs); infinite where a group has one row. Over several ranks the mean of
        their values is the loss of the global batch.

    Raises:
        TypeError, ValueError: ``z`` is no floating-point matrix, ``groups`` no vector of as many integers beside it,
            the temperature is zero or not finite.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", equation 3; value as solo-learn 1.0.6's
    ``simclr_loss_func``.
    """
    check_matrix("z", z)
    check_integers("groups", groups, len(z), z.device)
    if normalize:
        z = l2_normalize(z)
    scale = inverse(temperature, z)
    scope = scope_of(gather_distributed, strategy)
    shard = scope.shard(z)
    ids = shard.ids(z.device)
    members = group_members(scope.gather(groups.long()))
    pairs = Pairs(z, None, scale, row_ids=ids)
    if list(members) == [2]:  # the positive's logit and gradient are subtracted inside the tile
        couples = members[2]
        partner = torch.empty(shard.total, dtype=torch.int64, device=z.device)
        partner[couples.flatten()] = couples.flip(1).flatten()
        mine = partner[shard.offset : shard.offset + shard.local]
        terms = scope.terms(pairs._replace(positives=mine))
        assert terms.positive is not None
        return shard.weight * (terms.row_lse - terms.positive).sum()
    row_lse = scope.terms(pairs).row_lse
    return shard.weight * (row_lse - _log_positives(scope, z, scale, members)[ids]).sum()


def group_members(groups: Tensor) -> dict[int, Tensor]:
    """Rows by the size v of their group: ``{v: [groups of that size, v]}``, rows of a group in their order."""
    order = groups.argsort(stable=True)
    counts = torch.unique_consecutive(groups[order], return_counts=True)[1]
    firsts = counts.cumsum(0) - counts
    return {
        size: order[firsts[counts == size][:, None] + torch.arange(size, device=groups.device)]
        for size in counts.unique().tolist()
    }


def _log_positives(scope: Scope, z: Tensor, scale: Tensor, members: dict[int, Tensor]) -> Tensor:
    """[rows of all ranks], log-sum-exp of each row's positives."""
    with without_autocast(z):
        rows = scope.gather(z).to(accumulator(z))
        found = rows.new_full((len(rows),), float("-inf"))
        for size, group in members.items():
            if size == 1:
                continue
            block = rows[group]  # [G, v, D]
            logits = scale * block @ block.mT
            itself = torch.eye(size, dtype=torch.bool, device=z.device)
            lse = logits.masked_fill(itself, float("-inf")).logsumexp(-1)
            found = found.index_put((group.flatten(),), lse.flatten())
    return found
