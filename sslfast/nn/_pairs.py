"""Which tensor of a teacher belongs to which of its student, by name, and whether the two fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .._checks import FLOATS

Tensors = nn.Module | Sequence[Tensor]
SHOWN = 5  # names of a message


class Pairs(NamedTuple):
    """What is averaged, and what is copied from the second list to the first."""

    averages: list[Tensor]
    students: list[Tensor]
    rounded: list[Tensor]  # as many as averages, or none
    targets: list[Tensor]
    sources: list[Tensor]


def match(teacher: Tensors, student: Tensors, rounded: Tensors | None, buffers: str) -> Pairs:
    """The tensors pair by pair.

    Raises:
        TypeError, ValueError: names that only one side has, shapes or devices that differ, dtypes without an average,
            or memory that two sides share.
    """
    sides = {"teacher": teacher, "student": student} | ({} if rounded is None else {"rounded": rounded})
    modules = [isinstance(side, nn.Module) for side in sides.values()]
    if any(modules) and not all(modules):
        kinds = ", ".join(f"{name} is {type(side).__name__}" for name, side in sides.items())
        raise TypeError(f"teacher, student and rounded must be modules, or all of them sequences of tensors: {kinds}")
    pairs = Pairs([], [], [], [], [])
    _add(pairs, {name: _parameters(name, side) for name, side in sides.items()}, "parameter", copied=False)
    if buffers != "skip" and all(modules):
        named = {name: dict(side.named_buffers()) for name, side in sides.items() if isinstance(side, nn.Module)}
        _add(pairs, named, "buffer", copied=buffers == "copy")
    return pairs


def _parameters(name: str, side: Tensors) -> dict[str, Tensor]:
    if isinstance(side, nn.Module):
        return dict(side.named_parameters())
    if isinstance(side, (Tensor, str, Mapping)) or not isinstance(side, Iterable):
        raise TypeError(f"{name} must be a module or a sequence of tensors, got {type(side).__name__}")
    found = {f"{name}[{i}]": t for i, t in enumerate(side)}
    for like, t in found.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{like} must be a torch.Tensor, got {type(t).__name__}")
    return {str(i): t for i, t in enumerate(found.values())}


def _add(pairs: Pairs, sides: dict[str, dict[str, Tensor]], kind: str, copied: bool) -> None:
    _check_names(sides, kind)
    teachers, others = sides["teacher"], {side: of for side, of in sides.items() if side != "teacher"}
    misfits = [
        f"{name} {tuple(t.shape)} and {tuple(of[name].shape)}"
        for of in others.values()
        for name, t in teachers.items()
        if of[name].shape != t.shape
    ]
    if misfits:
        raise ValueError(f"teacher and student must have {kind}s of the same shapes, got {_some(misfits)}")
    real = not torch.compiler.is_compiling()
    for name, t in teachers.items():
        found = [of[name] for of in others.values()]
        if copied or not t.is_floating_point():
            pairs.targets.extend([t, *found[1:]])
            pairs.sources.extend([found[0]] * len(found))
            continue
        for side, o in zip(others, found, strict=True):
            if t.dtype not in FLOATS or o.dtype not in FLOATS or o.device != t.device:
                _refuse(kind, name, t, side, o)
            if kind == "parameter" and (o is t or (real and _same_memory(t, o))):
                raise ValueError(
                    f"teacher and {side} must not share memory, but parameter {name} is the same: "
                    "make the teacher by copy.deepcopy(student)"
                )
        pairs.averages.append(t)
        pairs.students.append(found[0])
        pairs.rounded.extend(found[1:])


def _check_names(sides: dict[str, dict[str, Tensor]], kind: str) -> None:
    """Every side has the same names."""
    wanted = sides["teacher"].keys()
    for side, of in sides.items():
        if of.keys() == wanted:
            continue
        missing = [name for name in wanted if name not in of]
        extra = [name for name in of if name not in wanted]
        parts = [f"{side} lacks {_some(missing)}"] * bool(missing)
        parts += [f"{side} has {_some(extra)}, which teacher lacks"] * bool(extra)
        hint = ""
        if any(name.startswith(("module.", "_orig_mod.")) for name in (*missing, *extra)):
            hint = "; of a wrapped model pass what is inside: .module, ._orig_mod"
        elif kind == "buffer":
            hint = "; buffers='skip' leaves buffers alone"
        raise ValueError(f"teacher and {side} must have {kind}s of the same names: {', '.join(parts)}{hint}")


def _refuse(kind: str, name: str, t: Tensor, side: str, other: Tensor) -> NoReturn:
    for owner, x in (("teacher", t), (side, other)):
        if x.dtype not in FLOATS:
            raise TypeError(f"{owner}'s {kind} {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    raise ValueError(f"{side}'s {kind} {name} must be on the teacher's device {t.device}, got {other.device}")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """A teacher in its student's memory would follow every step; fake and empty tensors have no memory to share."""
    if isinstance(a, FakeTensor) or a.is_meta or a.numel() == 0:
        return False
    return a.data_ptr() == b.data_ptr()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
