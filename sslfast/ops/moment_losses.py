"""Losses that are weighted sums of second moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .types import SecondMoment

PENALTIES = ("none", "identity", "hinge", "trace")


class Loss(NamedTuple):
    """A weighted sum, ``off·Σ_r off_diagonal_r + distance·‖a − b‖² + columns·penalty``.

    The penalty of the columns is

        "identity"  Σ_i (M_ii/N − 1)²
        "hinge"     Σ_i max(0, 1 − sqrt(Σ_n c_ni²/(N − 1) + floor)), c the centred columns of each batch, not scaled
        "trace"     Σ_i M_ii

    Attributes:
        off, distance, columns: the weights.
        penalty: one of the three, or "none".
        floor: added to the variances of "hinge".
    """

    off: float = 0.0
    distance: float = 0.0
    columns: float = 0.0
    penalty: str = "none"
    floor: float = 0.0


def penalty_of(moment: SecondMoment, squares: Tensor, rows: int, loss: Loss) -> Tensor:
    """The penalty, in plain PyTorch; ``squares`` [V, D] are Σ of squared deviations."""
    if loss.penalty == "identity":
        return (moment.diagonal / rows - 1).square().sum()
    if loss.penalty == "hinge":
        return torch.relu(1 - (squares / (rows - 1) + loss.floor).sqrt()).sum()
    return moment.diagonal.sum()


def weighted(moment: SecondMoment, squares: Tensor, rows: int, loss: Loss) -> Tensor:
    """The loss, in plain PyTorch; [] in the dtype of the sums."""
    total = loss.off * moment.off_diagonal.sum()
    if loss.distance:
        total = total + loss.distance * moment.distance
    if loss.penalty != "none":
        total = total + loss.columns * penalty_of(moment, squares, rows, loss)
    return total
