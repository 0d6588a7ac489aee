"""What the losses over prototypes share: views of logits, checked and of one dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import FLOATS

Views = Tensor | Sequence[Tensor]


def checked_views(name: str, views: Views) -> list[Tensor]:
    """``views`` as tensors [v, B, K]: of one matrix [B, K], of stacked ones [V, B, K], or of a sequence of matrices.

    Raises:
        TypeError, ValueError: they are something else, or do not fit one another.
    """
    parts = [views] if isinstance(views, Tensor) else list(views) if isinstance(views, Sequence) else None
    if not parts or not all(isinstance(x, Tensor) for x in parts):
        wanted = "a tensor [B, K] or [V, B, K], or a sequence of matrices [B, K]"
        raise TypeError(f"{name} must be {wanted}, got {_told(views)}")
    for x in parts:
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() != 2 and not (x.dim() == 3 and isinstance(views, Tensor)):
            raise ValueError(f"{name} must be matrices [B, K], or one tensor [V, B, K], got shape {tuple(x.shape)}")
        if x.shape[-1] == 0 or (x.dim() == 3 and len(x) == 0):
            raise ValueError(f"{name} must have at least one view and one prototype, got shape {tuple(x.shape)}")
        if x.shape[-2:] != parts[0].shape[-2:]:
            raise ValueError(
                f"the views of {name} must have the same shape, got {tuple(parts[0].shape)} and {tuple(x.shape)}"
            )
        if x.device != parts[0].device:
            raise ValueError(f"the views of {name} must be on one device, got {parts[0].device} and {x.device}")
    return [x if x.dim() == 3 else x.unsqueeze(0) for x in parts]


def _told(views: object) -> str:
    return "an empty sequence" if isinstance(views, Sequence) and not views else type(views).__name__


def count_of(views: Sequence[Tensor]) -> int:
    return sum(x.shape[0] for x in views)


def matching_views(name: str, views: Views, other_name: str, other: Views) -> tuple[list[Tensor], list[Tensor]]:
    """Both as tensors [v, B, K] of one shape, device and dtype (the wider of all); the second ones detached.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    first, second = checked_views(name, views), [x.detach() for x in checked_views(other_name, other)]
    if first[0].shape[1:] != second[0].shape[1:]:
        raise ValueError(
            f"{name} and {other_name} must have the same rows and prototypes, "
            f"got {tuple(first[0].shape[1:])} and {tuple(second[0].shape[1:])}"
        )
    if first[0].device != second[0].device:
        raise ValueError(
            f"{name} and {other_name} must be on the same device, got {first[0].device} and {second[0].device}"
        )
    widest = first[0].dtype
    for x in (*first, *second):
        widest = torch.promote_types(widest, x.dtype)
    return [x.to(widest) for x in first], [x.to(widest) for x in second]
