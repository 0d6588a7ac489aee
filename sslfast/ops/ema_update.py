"""Exponential moving averages of many tensors in place, ``t ← m t + (1 − m) s``: one pass over memory.

Two kernels of a library, ``t *= m`` and ``t += (1 − m) s``, move 20 bytes a float32 number; one pass moves 12.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "ema_update", "averages")


def _fake(
    averages: list[Tensor], students: list[Tensor], rounded: list[Tensor], momentum: float, moving: Tensor | None
) -> None:
    return None


_library.define(
    "ema_update_(Tensor(a!)[] averages, Tensor[] students, Tensor(b!)[] rounded, float momentum, Tensor? moving) -> ()",
    _fake,
)
_library.mutates("ema_update_", 0, 2)


def _memory_order(x: Tensor) -> torch.memory_format | None:
    """In which of PyTorch's orders the elements lie without gaps, or ``None``."""
    if x.is_contiguous():
        return torch.contiguous_format
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return order if order is not None and x.is_contiguous(memory_format=order) else None


def _flat(*tensors: Tensor) -> bool:
    """The tensors' elements lie in the same order without gaps: as flat memory they are vectors."""
    order = _memory_order(tensors[0])
    return order is not None and all(_memory_order(t) == order for t in tensors[1:])


def _copied_apart(average: Tensor, student: Tensor, copy: Tensor | None) -> bool:
    """Whether a rounded copy is of dtypes that the kernels do not write in the same pass."""
    wide = torch.float64 in (student.dtype, copy.dtype if copy is not None else None)
    return copy is not None and (average.dtype != torch.float32 or wide)


def ema_update(
    averages: Sequence[Tensor], students: Sequence[Tensor], momentum: float | Tensor, rounded: Sequence[Tensor] = ()
) -> None:
    """``t ← m t + (1 − m) s`` for each average and its student, in place; ``rounded`` receive the new averages.

    The arguments are those of ``sslfast.nn.ema_update_``, which has checked them: floating-point tensors, pair by pair
    of one shape and device; ``momentum`` a number, or a [] tensor of float64 on their device.
    """
    groups: dict[Any, list[int]] = {}
    apart, copied = [], []
    for i, (average, student) in enumerate(zip(averages, students, strict=True)):
        copy = rounded[i] if rounded else None
        if not _flat(average, student, *([] if copy is None else [copy])):
            apart.append(i)
            continue
        if _copied_apart(average, student, copy):
            copied.append(i)
            copy = None
        key = average.device, average.dtype, student.dtype, None if copy is None else copy.dtype
        groups.setdefault(key, []).append(i)
    for (_, _, _, copy_dtype), members in groups.items():
        copies = [] if copy_dtype is None else [rounded[i] for i in members]
        _update([averages[i] for i in members], [students[i] for i in members], momentum, copies)
    for i in apart:
        reference.ema_update([averages[i]], [students[i]], momentum, [rounded[i]] if rounded else ())
    for i in copied:
        rounded[i].copy_(averages[i])


def _update(averages: list[Tensor], students: list[Tensor], momentum: float | Tensor, rounded: list[Tensor]) -> None:
    """One call of a kernel: tensors of one device and, list by list, of one dtype."""
    if _backends.serve("ema_update", averages[0], "cuda", why_not) == "reference":
        reference.ema_update(averages, students, momentum, rounded)
    elif isinstance(momentum, Tensor):
        _library.call("ema_update_", averages, students, rounded, 0.0, momentum)
    else:
        _library.call("ema_update_", averages, students, rounded, momentum, None)
