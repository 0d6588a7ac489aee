"""Before anything large is sent: the ranks tell each other what they are about to do, and all refuse if it differs.

A collective in which the ranks differ hangs or corrupts memory; one small all-gather of integers turns that into the
same clear error on every rank.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._checks import FLOATS
from .collectives import Ranks

_DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_CALLS = ("shard", "gather", "similarity_terms", "similarity_logsigmoid", "second_moment")
Trait = bool | float | str
REFUSED = -1  # in place of the number of rows
SHOWN = 8  # ranks named for one value of an error


def sizes_of(
    ranks: Ranks, call: str, x: Tensor, traits: Mapping[str, Trait], check: Callable[[], None] | None = None
) -> tuple[int, ...]:
    """The rows of ``x`` on each rank, once all ranks are known to make the same call.

    Args:
        call: the method's name.
        x: [n, ...] on this rank; width (numbers a row) and dtype must be the same on all.
        traits: what else must be the same, by the words that an error uses: truth values, numbers, or words of at most
            eight ASCII letters. A call always names the same traits.
        check: raises if this rank's inputs are bad. The other ranks then raise too, instead of waiting for it.

    Raises:
        ValueError: the ranks disagree; the same message on every rank.
        RuntimeError: the inputs of another rank were refused there.
    """
    problem: Exception | None = None
    try:
        if check is not None:
            check()
        mine = _described(call, x, traits)
    except (TypeError, ValueError) as error:
        problem = error
        mine = [REFUSED] + [0] * (3 + len(traits))
    table = ranks.all_gather(
        torch.tensor([mine + [0] * (_LENGTH - len(mine))], device=ranks.meeting_device(x.device)), (1,) * ranks.size
    ).tolist()
    if problem is not None:
        raise problem
    refused = [rank for rank, row in enumerate(table) if row[0] == REFUSED]
    if refused:
        raise RuntimeError(f"{call}: the inputs of {named(refused)} were refused there; see the error of that process")
    names: tuple[tuple[str, Callable[[int], object]], ...] = (
        ("the call", lambda code: _CALLS[code]),
        ("the width", int),
        ("the dtype", lambda code: _DTYPES[code]),
        *((name, _decoder(value)) for name, value in traits.items()),
    )
    for place, (name, shown) in enumerate(names, start=1):
        values = [row[place] for row in table]
        if len(set(values)) > 1:
            each = "; ".join(
                f"{shown(value)} on {named([rank for rank, v in enumerate(values) if v == value])}"
                for value in dict.fromkeys(values)
            )
            raise ValueError(f"{call}: the ranks disagree on {name}: {each}")
    return tuple(row[0] for row in table)


_LENGTH = 12  # integers a rank sends, whatever the call, so that even different calls meet


def _described(call: str, x: Tensor, traits: Mapping[str, Trait]) -> list[int]:
    if x.dim() == 0:
        raise ValueError(f"{call} takes a tensor of rows [n, ...], got a tensor without dimensions")
    if len(x) == 0:
        raise ValueError(f"every rank needs at least one row, got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{call} takes floating-point, integer and boolean tensors, got {x.dtype}")
    return [
        len(x),
        _CALLS.index(call),
        x[0].numel(),
        _DTYPES.index(x.dtype),
        *(_encoded(value) for value in traits.values()),
    ]


def _encoded(value: Trait) -> int:
    if isinstance(value, str):
        return int.from_bytes(value.encode("ascii").rjust(8), "big")
    if isinstance(value, float):
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return int(value)


def _decoder(value: Trait) -> Callable[[int], object]:
    """What undoes :func:`_encoded` for values like this one, for an error to show."""
    if isinstance(value, str):
        return lambda code: repr(code.to_bytes(8, "big").decode("ascii").strip())
    if isinstance(value, float):
        return lambda code: struct.unpack("d", struct.pack("q", code))[0]
    return bool


def named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN])
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
