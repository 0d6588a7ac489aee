"""What random numbers are keyed by, beside the sample: seed, epoch and the number of the view."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._checks import warn_once, whole_number
from .streams import EACH


class Key(NamedTuple):
    """In range; ``seed`` as the signed 64 bits that the schemas take."""

    seed: int
    epoch: int
    view: int


def seed_of(seed: int) -> int:
    """Any 64 bits, signed or not, as signed ones."""
    try:
        number = whole_number("seed", seed, -(2**63), 2**64 - 1)
    except ValueError:
        raise ValueError(f"seed must be a 64-bit whole number, got {seed!r}") from None
    return number - 2**64 if number >= 2**63 else number


def key_of(seed: int, epoch: int, view: int = 0, views: int = EACH) -> Key:
    """The three, checked.

    Raises:
        ValueError: one is no whole number or out of its range; views are numbered below ``views``.
    """
    return Key(seed_of(seed), whole_number("epoch", epoch, 0, 2**32 - 1), whole_number("view", view, 0, views - 1))


def epoch_of(epoch: int | None, ids: object) -> int:
    """``epoch``, or 0 where there is none; samples that have ids would then repeat themselves, of which it warns."""
    if epoch is not None:
        return epoch
    if ids is not None and not torch.compiler.is_compiling():
        warn_once(
            "ids were given and no epoch: every epoch then repeats the same random choices. "
            "Pass epoch=<the current epoch>, or epoch=0 if that is meant"
        )
    return 0
