"""What the losses of a list of views check."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._checks import check_matrix, check_same
from .._inputs import in_one_dtype


def checked_views(z_views: Sequence[Tensor]) -> list[Tensor]:
    """At least two views [N, D] of one shape, dtype and device."""
    if isinstance(z_views, Tensor) or not isinstance(z_views, Sequence):
        raise TypeError(f"z_views must be a list of views [N, D], got {type(z_views).__name__}")
    if len(z_views) < 2:
        raise ValueError(f"z_views must contain at least two views, got {len(z_views)}")
    for i, z in enumerate(z_views):
        check_matrix(f"z_views[{i}]", z)
    views = [z for z in in_one_dtype(*z_views) if z is not None]
    for i, z in enumerate(views[1:], start=1):
        check_same("z_views[0]", views[0], f"z_views[{i}]", z)
    return views
