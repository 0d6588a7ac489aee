"""Losses that are weighted sums of second moments: on a GPU one operator, elsewhere and over ranks sum by sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...distributed.scope import Scope
from ...ops.moment_losses import Loss, weighted
from ...ops.second_moment import moment_loss


def fused(scope: Scope, a: Tensor, b: Tensor | None, loss: Loss, **options: Any) -> Tensor | None:
    """The loss from one operator: every launch that a small batch does without is time. ``None`` where there is none.

    Args:
        options: those of :func:`sslfast.second_moment`.
    """
    return moment_loss(a, b, loss, **options) if type(scope) is Scope else None


def summed(
    scope: Scope, a: Tensor, b: Tensor | None, loss: Loss, *, rows: int, statistics: str = "global", **options: Any
) -> Tensor:
    """The loss by :func:`fused` or from its parts. ``rows`` of the scope; "hinge" is for centred moments, not scaled,
    of each batch with itself: their diagonals are what it is a function of."""
    found = fused(scope, a, b, loss, **options)
    if found is not None:
        return found
    moment = scope.second_moment(a, b, statistics=statistics, **options)
    return weighted(moment, moment.diagonal, rows, loss)
