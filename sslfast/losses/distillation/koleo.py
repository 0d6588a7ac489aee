"""KoLeo: rows spread out, each away from its nearest neighbour; half a Gram product forward, O(N·D) backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import check_matrix, is_real, whole_number, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.koleo import koleo as koleo_of_batch, unit_rows
from ...ops.nearest_neighbours import neighbours_of
from ...ops.neighbour_distance import neighbour_distance
from .._inputs import check_gather

EPS = 1e-8


@over_ranks()
def koleo(
    x: Tensor,
    topk: int = 1,
    *,
    loss_group_size: int | None = None,
    eps: float = EPS,
    gather_distributed: bool = False,
) -> Tensor:
    """The Kozachenko–Leonenko regulariser of rows on the sphere, mean over the N rows and their neighbours.

        x̂_i = x_i / max(‖x_i‖, eps),   d_ic = ‖x̂_i − x̂_n + eps‖ for the c-th nearest neighbour n ≠ i of row i
        loss = −(1/(N·topk)) Σ_ic log(d_ic + eps)

    Gradients reach both ends of each pair. 16-bit rows are float32 numbers from the start, so that eps is never 0 and
    the loss never infinite. Of identical rows d is ``√D·eps``, and the loss and its gradient are what the formula says:
    those of two rows that are each other's neighbours cancel; a third one has a gradient of up to ``1/(N·√D·eps)``.

    Args:
        x: [N, D], N ≥ 2; float32, float64, bfloat16 or float16; any strides.
        topk: how many neighbours of each row (default 1).
        loss_group_size: neighbours are looked for among so many consecutive rows of the global batch, in which each row
            is; it divides their number (default: among all).
        eps: the smallest norm, and what is added to each component of a difference and to each distance (default 1e-8).
        gather_distributed: neighbours among the rows of all ranks; ``False``: among this rank's.

    Returns:
        [] float32 (float64 for float64 rows). Over several ranks the mean of the losses is that of the global batch.

    Raises:
        TypeError, ValueError: x is not a matrix of floating-point numbers; fewer than two rows (of all ranks together);
            topk is not from 1 to the number of other rows; loss_group_size does not divide the rows; eps is not
            positive.

    Source: Sablayrolles et al. 2019, "Spreading vectors for similarity search", section 3.1; value as DINOv2's
    ``KoLeoLoss``, with groups as DINOv3's ``KoLeoLossDistributed``. A row is no neighbour of itself whatever its
    similarities are; DINOv2 puts −1 in their place, so that of two opposite rows each is its own neighbour.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # each other's neighbours, at distance 2
        >>> round(sslfast.koleo(x).item(), 4)
        -0.6931
    """
    check_matrix("x", x)
    if not is_real(eps) or not eps > 0:
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    scope = scope_of(gather_distributed)
    shard = scope.shard(x)
    if shard.total < 2:
        raise ValueError(f"koleo needs at least two rows, got {shard.total}: one row has no neighbour")
    group = _checked_group(loss_group_size, shard.total)
    others = "other rows" if loss_group_size is None else "other rows of a group"
    topk = whole_number("topk", topk, 1, group - 1, others)
    if shard.world_size == 1 and group == shard.total:
        return koleo_of_batch(x, topk, float(eps))
    with without_autocast(x):
        rows = unit_rows(x, float(eps))
        every = scope.gather(rows)
        index = _neighbours(rows.detach(), every.detach(), shard.offset, group, topk)
        distance = neighbour_distance(rows, None if every is rows else every, index, float(eps))  # [n, topk]
        return (distance + eps).log().sum() * (-shard.weight / topk)


def _checked_group(size: Any, total: int) -> int:
    if size is None:
        return total
    size = whole_number("loss_group_size", size, 2, total, "rows")
    if total % size:
        raise ValueError(f"loss_group_size must divide the number of rows, {total}, got {size}")
    return size


def _neighbours(rows: Tensor, every: Tensor, first: int, group: int, count: int) -> Tensor:
    """The nearest neighbours [n, count] of rows that stand in ``every`` from ``first`` on, each within its group."""
    found = []
    for begin in range(first // group * group, first + len(rows), group):
        start, stop = max(begin, first), min(begin + group, first + len(rows))
        keys = every[begin : begin + group]
        if stop - start == group:
            index = neighbours_of(keys, None, count).index
        else:
            own, ids = (torch.arange(*span, device=rows.device) for span in ((start, stop), (begin, begin + group)))
            index = neighbours_of(rows[start - first : stop - first], keys, count, own, ids).index
        found.append(index + begin)
    return torch.cat(found)


class KoLeoLoss(nn.Module):
    """:func:`koleo` with its options kept.

    Args:
        topk: how many neighbours of each row (default 1).
        loss_group_size: as :func:`koleo` (default: neighbours among all rows).
        eps: as :func:`koleo` (default 1e-8).
        gather_distributed: as :func:`koleo`.

    Shapes:
        ``x``: [N, D], normalised inside; output: [].

    Raises:
        As :func:`koleo`, when called.

    Example:
        >>> criterion = sslfast.KoLeoLoss()
        >>> round(criterion(torch.eye(4)).item(), 4)  # −log √2
        -0.3466
    """

    def __init__(
        self,
        topk: int = 1,
        loss_group_size: int | None = None,
        eps: float = EPS,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.topk = topk
        self.loss_group_size = loss_group_size
        self.eps = eps
        self.gather_distributed = gather_distributed

    def forward(self, x: Tensor) -> Tensor:
        """The loss of rows [N, D]."""
        return koleo(
            x,
            self.topk,
            loss_group_size=self.loss_group_size,
            eps=self.eps,
            gather_distributed=self.gather_distributed,
        )

    def extra_repr(self) -> str:
        return (
            f"topk={self.topk}, loss_group_size={self.loss_group_size}, eps={self.eps}, "
            f"gather_distributed={self.gather_distributed}"
        )
