"""DINO: every view of the student predicts the teacher's softmax of the other views."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator
from ...distributed.agreement import over_ranks
from ._targets import TeacherTargets
from ._views import Views
from .diagnostics import Diagnosed, PrototypeDiagnostics, with_diagnostics


class DINOLoss(TeacherTargets):
    """DINO's loss over prototypes, with the constructor and ``forward`` of lightly 1.6.0's class.

        p_t = softmax((teacher_t − center)/τt)
        loss = mean over rows and over pairs t ≠ s of −Σ_k p_tk log softmax(student_s/τs)_k
        center ← m·center + (1 − m)·(mean of the teacher's logits), after the loss

    Args:
        output_dim: K (default 65,536).
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: τt rises linearly from the first to the second in
            so many epochs (defaults 0.04, 0.04, 30), where ``forward`` is told the epoch.
        student_temp: τs (default 0.1).
        center_momentum: m (default 0.9).
        centering: "center" (default), or "sinkhorn": the targets are :func:`sinkhorn`'s assignments of all teacher rows
            together, as DINOv2 and DINOv3 do; there is no centre then.
        sinkhorn_iterations: of "sinkhorn" (default 3).
        gather_distributed: centre and assignments are those of all ranks' rows, weighted by rows, and the mean over
            ranks of the loss is that of the global batch; ``False``: of this rank's alone.
        diagnostics: return :class:`PrototypeDiagnostics` beside the loss.

    The value is DINO's, DINOv3's and lightly's mean over pairs; DINOv2's ``DINOLoss`` is the sum over pairs.
    ``center`` [1, 1, K] is a buffer; a checkpoint's [1, K] is taken too.

    Shapes:
        views of the teacher and of the student: sequences of [B, K], or [V, B, K]; output: [], or ``(loss,
        diagnostics)``.

    Raises:
        TypeError, ValueError: views do not fit one another or K, one view of each, a temperature of zero, or an
            argument out of range.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", algorithm 1.

    Example:
        >>> criterion = sslfast.DINOLoss(4)
        >>> teacher = [torch.eye(4), torch.eye(4)]
        >>> round(criterion(teacher, [*teacher, torch.zeros(4, 4)]).item(), 4)
        0.6932
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "center",
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
        diagnostics: bool = False,
    ) -> None:
        temperatures, shape = (student_temp, teacher_temp), (1, 1, output_dim)
        options = (center_momentum, centering, sinkhorn_iterations, gather_distributed, diagnostics)
        super().__init__(shape, temperatures, *options)
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs

    def temperature_at(self, epoch: int) -> float:
        """τt in this epoch: the warm-up's line, and ``teacher_temp`` after it."""
        last = self.warmup_teacher_temp_epochs - 1
        if epoch > last or last < 1:
            return self.teacher_temp if epoch > last else self.warmup_teacher_temp
        return self.warmup_teacher_temp + (self.teacher_temp - self.warmup_teacher_temp) * epoch / last

    def forward(
        self,
        teacher_out: Views,
        student_out: Views,
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        update_center: bool = True,
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of T views of the teacher and S of the student, the first T the same crops.

        Args:
            teacher_temp: τt of this call, in place of the schedule's.
            epoch: from 0; without it τt is ``teacher_temp``.
            update_center: move the centre now (default). ``False``, for all micro-batches of a step: the logits wait
                for one :meth:`update_center` after them.
        """
        if teacher_temp is None:
            teacher_temp = self.teacher_temp if epoch is None else self.temperature_at(epoch)
        return with_diagnostics(self._loss(teacher_out, student_out, teacher_temp, update_center))

    @over_ranks()
    def _loss(self, teacher_out: Views, student_out: Views, teacher_temp: float, update_center: bool) -> Diagnosed:
        student, teacher = self.checked(student_out, teacher_out, teacher_temp)
        batch, weights = student[0].shape[1], None
        if self.gather_distributed:
            weight = self.scope().shard(student[0][0]).weight
            weights = torch.full((batch,), weight, dtype=accumulator(student[0]), device=student[0].device)
        return self.distilled(student, teacher, teacher_temp, update_center, weights=weights, ignore_diagonal=True)
