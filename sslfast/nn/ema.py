"""A teacher that is the exponential moving average of its student, in one pass over all parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS, check_share, readable, warn_once, whole_number
from ..ops.ema_update import ema_update
from ._pairs import Pairs, match

BUFFERS = ("copy", "average", "skip")
HALVES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def ema_update_(
    teacher: nn.Module | Sequence[Tensor],
    student: nn.Module | Sequence[Tensor],
    momentum: float | Tensor,
    *,
    buffers: str = "copy",
    rounded: nn.Module | Sequence[Tensor] | None = None,
) -> None:
    """Move a teacher towards its student, in place: ``t ← m t + (1 − m) s`` for every parameter, in one pass.

    Args:
        teacher: what is averaged: a module, whose parameters are matched with the student's **by name**, or a sequence
            of tensors, matched by place. Each keeps its dtype and memory; arithmetic is float32 (float64 for float64).
        student: of the same kind, names and shapes, after the optimizer's step; of any floating-point dtype.
        momentum: m in [0, 1], near 1: how much of the teacher stays. A number, or a tensor of one element, on the
            teacher's device: a CUDA graph, and a compiled function, then follows it as it changes.
        buffers: of modules, such as the statistics of batch normalisation: ``"copy"`` them from the student (default),
            ``"average"`` those of a floating-point dtype and copy the others, or ``"skip"`` them, as most code does; a
            teacher in ``eval()`` then normalises by statistics of its own, which it has only from ``train()``.
        rounded: a 16-bit copy of a float32 teacher, a module or a sequence as the teacher is, which receives the new
            averages in the same pass, and the buffers.

    Averages are best kept in float32 beside a student of 16 bits: in bfloat16, of 8 bits, an average stands still as
    soon as (1 − m)|s − t| is below 2⁻⁹ |t|, which for m = 0.999 is nearly always. It warns of that once.

    Raises:
        TypeError, ValueError: names or shapes that differ, each named; a momentum outside [0, 1]; ``buffers`` none of
            the three; complex numbers; a teacher and a student that share memory, or lie on different devices.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models", equation 2.

    Example:
        >>> student, teacher = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> expected = 0.9 * teacher.weight + 0.1 * student.weight
        >>> sslfast.nn.ema_update_(teacher, student, 0.9)
        >>> torch.allclose(teacher.weight, expected)
        True
    """
    if buffers not in BUFFERS:
        raise ValueError(f"buffers must be one of {', '.join(BUFFERS)}, got {buffers!r}")
    pairs = match(teacher, student, rounded, buffers)
    m = _momentum(momentum, pairs)
    if rounded is None and not torch.compiler.is_compiling() and any(t.dtype in HALVES for t in pairs.averages):
        warn_once(
            "sslfast.nn.ema_update_: averages in 16 bits stand still once a step is below half of their last place; "
            "keep the teacher in float32, and pass its 16-bit copy as rounded="
        )
    ema_update(pairs.averages, pairs.students, m, pairs.rounded)
    if pairs.targets:
        torch._foreach_copy_(pairs.targets, pairs.sources)


def _momentum(momentum: float | Tensor, pairs: Pairs) -> float | Tensor:
    """A number; or a [] tensor of float64 where its value cannot be read without waiting."""
    if not isinstance(momentum, Tensor):
        return check_share("momentum", momentum)
    if momentum.numel() != 1 or momentum.dtype not in FLOATS:
        raise ValueError(
            "momentum must be a number or a one-element floating-point tensor, "
            f"got shape {tuple(momentum.shape)}, dtype {momentum.dtype}"
        )
    if readable(momentum):
        return check_share("momentum", momentum)
    if pairs.averages and any(t.device != momentum.device for t in pairs.averages):
        raise ValueError(f"momentum must be on the teacher's device, got {momentum.device}")
    return momentum.detach().reshape(()).to(torch.float64)


class ExponentialMovingAverage(nn.Module):
    """A teacher: a copy of the student that :meth:`update` moves towards it, and that takes no gradient.

    ``module`` is the teacher as it is called, in the student's dtypes. Where the student has parameters of 16 bits,
    ``average`` is the same module with these in float32: what is averaged, and rounded into ``module`` in the same
    pass. Else it is ``None``. Both are in the ``state_dict``, with the number of updates, so that training continues
    with the next momentum.

    Args:
        student: copied (``copy.deepcopy``), never kept.
        momentum: m in [0, 1] (default 0.996), or a function of the number of the update, from 0 on, such as
            ``lambda step: sslfast.nn.cosine_schedule(step, 10_000, 0.996, 1.0)``.
        buffers: as :func:`ema_update_`.

    Casts of the whole (``.half()``, ``.to(torch.bfloat16)``) would cast ``average`` too: cast the student before.

    Raises:
        As :func:`ema_update_`.

    Example:
        >>> student = torch.nn.Linear(3, 2)
        >>> teacher = sslfast.nn.ExponentialMovingAverage(student, momentum=0.99)
        >>> teacher.update(student)  # after each optimizer step
        >>> teacher(torch.ones(1, 3)).requires_grad, teacher.updates
        (False, 1)
    """

    def __init__(
        self, student: nn.Module, momentum: float | Callable[[int], float] = 0.996, *, buffers: str = "copy"
    ) -> None:
        super().__init__()
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be a torch.nn.Module, got {type(student).__name__}")
        if not callable(momentum):
            momentum = check_share("momentum", momentum)
        if buffers not in BUFFERS:
            raise ValueError(f"buffers must be one of {', '.join(BUFFERS)}, got {buffers!r}")
        self.momentum = momentum
        self.buffers_policy = buffers
        self.updates = 0
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.average: nn.Module | None = None
        if any(p.dtype in HALVES for p in student.parameters()):
            widened: Any = copy.deepcopy(self.module)
            self.average = widened._apply(lambda t: t.float() if t.dtype in HALVES else t)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives, without a graph."""
        return self.module(*args, **kwargs)

    def update(self, student: nn.Module, step: int | None = None) -> None:
        """Take in the student as it is now.

        Args:
            student: of the same names and shapes as the copy.
            step: the number of this update (default: that of the updates so far), from 0 on, which the schedule is
                given. The next one follows on it.
        """
        number = self.updates if step is None else whole_number("step", step, 0)
        m = self.momentum(number) if callable(self.momentum) else self.momentum
        average = self.module if self.average is None else self.average
        ema_update_(
            average,
            student,
            m,
            buffers=self.buffers_policy,
            rounded=None if self.average is None else self.module,
        )
        self.updates = number + 1

    def get_extra_state(self) -> dict[str, int]:
        """The number of updates, which the ``state_dict`` holds."""
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """The number of updates of a ``state_dict``."""
        self.updates = state["updates"]

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_policy!r}, updates={self.updates}"
