"""What DINO's and iBOT's losses share: the teacher's centre or its Sinkhorn bias, temperatures, what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import accumulator, check_share
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.sinkhorn import check_iterations, check_number
from .._inputs import check_gather
from ._views import Views, matching_views
from .cross_entropy import Pairing, as_bias, mean_of_pairs, stacked
from .diagnostics import Diagnosed, prototype_diagnostics

CENTERINGS = ("center", "sinkhorn")


class TeacherTargets(nn.Module):
    """The frame of a loss whose targets are ``softmax((teacher − center)/τt)``, or Sinkhorn's assignments.

    ``center`` is a moving average of the teacher's mean logits. What ``forward`` was told not to take in at once waits
    for :meth:`update_center`, so that several small batches move it as one large one.
    """

    teacher_temp: float
    student_temp: float
    center: Tensor
    waiting_sum: Tensor
    waiting_rows: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        temperatures: tuple[float, float],
        center_momentum: float,
        centering: str,
        sinkhorn_iterations: int,
        gather_distributed: bool,
        diagnostics: bool,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        if centering not in CENTERINGS:
            raise ValueError(f"centering must be one of {', '.join(map(repr, CENTERINGS))}, got {centering!r}")
        self.student_temp, self.teacher_temp = temperatures
        self.center_momentum = check_share("center_momentum", center_momentum)
        self.centering = centering
        self.sinkhorn_iterations = check_iterations(sinkhorn_iterations)
        self.gather_distributed = gather_distributed
        self.diagnostics = diagnostics
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("waiting_sum", torch.zeros(shape[-1]), persistent=False)
        self.register_buffer("waiting_rows", torch.zeros(()), persistent=False)
        self.waiting = False  # logits for an update to come

    def scope(self) -> Scope:
        return scope_of(self.gather_distributed)

    def checked(self, student_out: Views, teacher_out: Views, teacher_temp: float) -> tuple[list[Tensor], list[Tensor]]:
        """Views [v, B, K] of the student and of the teacher, which temperatures can divide."""
        student, teacher = matching_views("student_out", student_out, "teacher_out", teacher_out)
        check_number("student_temp", self.student_temp, student[0])
        check_number("teacher_temp", teacher_temp, student[0])
        return student, teacher

    def distilled(
        self,
        student: list[Tensor],
        teacher: list[Tensor],
        teacher_temp: float,
        update_center: bool,
        *,
        weights: Tensor | None,
        rows: Tensor | None = None,
        ignore_diagonal: bool = False,
    ) -> Diagnosed:
        """The loss of checked views with these row weights; then the centre takes them in."""
        with torch.no_grad():
            bias = self.bias_of(teacher, teacher_temp, rows)
        pairing = Pairing(ignore_diagonal, False, (self.student_temp, teacher_temp))
        loss = mean_of_pairs(student, teacher, bias, pairing, weights, rows)
        found = prototype_diagnostics(loss, teacher, bias, teacher_temp, rows) if self.diagnostics else None
        self.take_in(teacher, update_center, rows)
        return loss, found

    def bias_of(self, teacher: list[Tensor], temperature: float, rows: Tensor | None = None) -> Tensor:
        """The bias [1, 1, K] that makes targets of the teacher's logits over τt."""
        like = teacher[0]
        if self.center.shape[-1] != like.shape[-1]:
            raise ValueError(f"logits must have {self.center.shape[-1]} prototypes, got {like.shape[-1]}")
        if self.centering == "center":
            return as_bias(self.center / -temperature, like)
        logits = stacked(teacher).unsqueeze(1)  # [T·B, 1, K]: one view, or all rows of all views count
        bias = self.scope().sinkhorn_bias(logits, temperature, self.sinkhorn_iterations, rows=rows)
        return as_bias(bias.flatten(), like)

    @torch.no_grad()
    def take_in(self, teacher: list[Tensor], now: bool, rows: Tensor | None = None) -> None:
        """Moves the centre by the teacher's logits [v, B, K], or keeps them for the next :meth:`update_center`."""
        if self.centering == "center":
            self.take_in_sum(*_row_sum(teacher, accumulator(self.center), rows), now)

    @torch.no_grad()
    def take_in_sum(self, total: Tensor, count: Tensor | int, now: bool) -> None:
        """As :meth:`take_in`, of rows of logits with this sum [K]."""
        if now and not self.waiting:
            self._move(total, count)
            return
        self.waiting = True
        self.waiting_sum += total
        self.waiting_rows += count
        if now:
            self.update_center()

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor | None = None) -> None:
        """Move the centre by the logits of all calls since the last time, weighted by rows, of all ranks if so made.

        Args:
            teacher_out: [..., K], teacher's logits to be taken in before; default: those of ``forward`` alone.
        """
        if teacher_out is not None:
            self.take_in([teacher_out.detach().reshape(1, -1, teacher_out.shape[-1])], now=False)
        self._move(self.waiting_sum, self.waiting_rows)
        self.waiting_sum.zero_()
        self.waiting_rows.zero_()
        self.waiting = False

    def _move(self, total: Tensor, rows: Tensor | int) -> None:
        """The centre towards the mean of rows with this sum; without a row anywhere it stays."""
        if self.gather_distributed:
            count = rows if isinstance(rows, Tensor) else torch.full((), rows, dtype=total.dtype, device=total.device)
            total, rows = self.scope().row_totals(total, count)
        weight = 1 - self.center_momentum
        if isinstance(rows, int):
            if rows:
                self.center.mul_(self.center_momentum).add_(total.view_as(self.center), alpha=weight / rows)
            return
        moved = self.center * self.center_momentum + (total / rows).view_as(self.center) * weight
        self.center.copy_(torch.where(rows == 0, self.center, moved))

    def extra_repr(self) -> str:
        return (
            f"output_dim={self.center.shape[-1]}, teacher_temp={self.teacher_temp}, student_temp={self.student_temp}, "
            f"centering={self.centering!r}, gather_distributed={self.gather_distributed}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        self._adopt_center(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _adopt_center(self, state_dict: dict[str, Any], prefix: str) -> None:
        """A centre of another package: under its key, or with other dimensions of one."""
        nested = prefix + "center.center"  # lightly's IBOTPatchLoss
        if nested in state_dict:
            state_dict[prefix + "center"] = state_dict.pop(nested)
        stored = state_dict.get(prefix + "center")
        if isinstance(stored, Tensor) and stored.numel() == self.center.numel():
            state_dict[prefix + "center"] = stored.reshape(self.center.shape)


def _row_sum(views: list[Tensor], kind: torch.dtype, rows: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """The sum over the rows [K] of views [v, B, K], of which the first ``rows`` count, and the number of these."""
    total: Tensor | None = None
    for x in views:
        if rows is not None:
            x = torch.where((torch.arange(x.shape[1], device=x.device) < rows)[:, None], x, 0.0)
        part = x.sum((0, 1), dtype=kind)
        total = part if total is None else total + part
    assert total is not None
    batch: Tensor | int = views[0].shape[1] if rows is None else rows
    return total, sum(x.shape[0] for x in views) * batch
