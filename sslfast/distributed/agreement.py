"""Before anything large is sent: the ranks tell each other what they are about to do, and all refuse if it differs.

A collective in which the ranks differ hangs or corrupts memory; one small all-gather of integers turns that into the
same clear error on every rank.
"""

from __future__ import annotations

import functools
import inspect
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import FLOATS
from .collectives import Ranks, averaged

_DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_CALLS = (
    "shard",
    "gather",
    "similarity_terms",
    "similarity_logsigmoid",
    "second_moment",
    "sinkhorn",
    "row_totals",
)
Trait = bool | int | float | str
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
            eight ASCII letters; how many parameters of the loss learn is added. A call always names the same traits.
        check: raises if this rank's inputs are bad. The other ranks then raise too, instead of waiting for it.

    Raises:
        ValueError: the ranks disagree; the same message on every rank.
        RuntimeError: the inputs of another rank were refused there.
    """
    _call.exchanges = _exchanges() + 1
    traits = {**traits, "how many of the loss's own parameters learn": getattr(_call, "learning", 0)}
    problem: Exception | None = None
    try:
        if check is not None:
            check()
        mine = _described(call, x, traits)
    except (TypeError, ValueError) as error:
        problem = error
        mine = [REFUSED]
    table = _exchanged(ranks, mine, x.device)
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


def _exchanged(ranks: Ranks, mine: list[int], device: torch.device) -> list[list[int]]:
    """The integers of every rank."""
    row = torch.tensor([mine + [0] * (_LENGTH - len(mine))], device=ranks.meeting_device(device))
    return ranks.all_gather(row, (1,) * ranks.size).tolist()


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
    if isinstance(value, int) and not isinstance(value, bool):
        return int
    if isinstance(value, str):
        return lambda code: repr(code.to_bytes(8, "big").decode("ascii").strip())
    if isinstance(value, float):
        return lambda code: struct.unpack("d", struct.pack("q", code))[0]
    return bool


def named(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:SHOWN])
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


# ------------------------------------------------------------------------------------- a loss, as the ranks call it


_call = threading.local()  # of this thread: exchanges so far, and how many parameters of the present loss learn
Loss = TypeVar("Loss", bound=Callable[..., Any])


def _exchanges() -> int:
    return getattr(_call, "exchanges", 0)


def over_ranks(*learnt: str) -> Callable[[Loss], Loss]:
    """A decorator for losses: functions of a ``scope`` or with a keyword ``gather_distributed``, or a module's method.

    - A rank that refuses its arguments before the first exchange, which every other rank makes, tells them so in that
      exchange: they raise, and do not wait for it.
    - Over ranks, every rank gets the mean of all ranks' gradients of the numbers that the loss is given, such as a
      temperature. That is the gradient of the global batch, also where no DistributedDataParallel averages it; where
      one does, the mean of equal numbers is that number.

    Args:
        learnt: the names of such arguments; ``"options.temperature"`` is one in a named tuple ``options``. Where one
            decorated loss calls another, it is enough that the inner one names them.
    """

    def decorate(loss: Loss) -> Loss:
        names = tuple(inspect.signature(loss).parameters)
        scope_at = names.index("scope") if "scope" in names else None
        is_method = names[0] == "self"

        @functools.wraps(loss)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_method:
                alone = not args[0].gather_distributed
            elif scope_at is None:
                alone = not kwargs.get("gather_distributed", False)
            else:
                scope = args[scope_at] if len(args) > scope_at else kwargs["scope"]
                alone = getattr(scope, "ranks", None) is None
            if alone:
                return loss(*args, **kwargs)
            return _together(loss, args, kwargs, learnt)

        # A code object of its own, with the loss's name: torch.compile keeps, and counts, its graphs by code objects.
        found: Any = call
        found.__code__ = found.__code__.replace(co_name=loss.__name__)
        return cast(Loss, found)

    return decorate


_signature = functools.lru_cache(inspect.signature)


def _together(loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], learnt: tuple[str, ...]) -> Any:
    arguments = _signature(loss).bind(*args, **kwargs).arguments
    before, outer = _exchanges(), getattr(_call, "learning", 0)
    try:
        if not (dist.is_available() and dist.is_initialized()):
            return loss(**arguments)  # which says what is missing
        ranks = _ranks_of(arguments)
        for name in learnt:
            holder, _, field = name.rpartition(".")
            number = getattr(arguments[holder], field) if holder else arguments.get(field)
            if isinstance(number, Tensor) and number.requires_grad and torch.is_grad_enabled():
                _call.learning = getattr(_call, "learning", 0) + 1
                number = averaged(number, ranks)
                arguments |= {holder: arguments[holder]._replace(**{field: number})} if holder else {field: number}
        return loss(**arguments)
    except Exception:
        if _exchanges() == before and dist.is_available() and dist.is_initialized():
            _refuse(_ranks_of(arguments), arguments)
        raise
    finally:
        _call.learning = outer


def _ranks_of(arguments: Mapping[str, Any]) -> Ranks:
    ranks = getattr(arguments.get("scope"), "ranks", None)
    return Ranks() if ranks is None else ranks


def _refuse(ranks: Ranks, arguments: Mapping[str, Any]) -> None:
    """Takes part in the exchange that the other ranks make first, and says in it that this rank does not go on."""
    if ranks.size == 1:
        return
    _call.exchanges = _exchanges() + 1
    devices = [x.device for x in arguments.values() if isinstance(x, Tensor) and x.device.type in ranks.backends]
    _exchanged(ranks, [REFUSED], devices[0] if devices else torch.device(next(iter(ranks.backends))))
