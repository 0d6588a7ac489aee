"""Losses that are weighted sums of second moments: on a GPU one operator, elsewhere and over ranks sum by sum."""

from __future__ import annotations

from torch import Tensor

from ...distributed.scope import Scope
from ...ops.moment_losses import Loss, weighted
from ...ops.second_moment import moment_loss
from ...ops.types import MomentOptions


def fused(scope: Scope, a: Tensor, b: Tensor | None, loss: Loss, options: MomentOptions) -> Tensor | None:
    """The loss from one operator, for every launch that a small batch does without is time; ``None`` without one."""
    return moment_loss(a, b, loss, options) if type(scope) is Scope else None


def summed(scope: Scope, a: Tensor, b: Tensor | None, loss: Loss, options: MomentOptions, *, rows: int) -> Tensor:
    """The loss by :func:`fused` or from its parts. ``rows`` of the scope; "hinge" is for centred moments, not scaled,
    of each batch with itself: their diagonals are what it is a function of."""
    found = fused(scope, a, b, loss, options)
    if found is not None:
        return found
    moment = scope.moment(a, b, options)
    return weighted(moment, moment.diagonal, rows, loss)
