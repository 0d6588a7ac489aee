"""iBOT: the student's masked tokens predict the teacher's softmax of the same tokens, which it sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator, readable
from ...distributed.agreement import over_ranks
from ...ops.sinkhorn import check_number
from ._targets import TeacherTargets
from ._views import matching_views
from .cross_entropy import Pairing, mean_of_pairs
from .diagnostics import Diagnosed, PrototypeDiagnostics, prototype_diagnostics, with_diagnostics


class IBOTPatchLoss(TeacherTargets):
    """iBOT's loss on masked tokens as DINOv2 computes it, with lightly 1.6.0's constructor and ``forward``.

        p = softmax((teacher − center)/τt)
        loss = (1/B) Σ_r 1/#masked(image of r) · −Σ_k p_rk log softmax(student_r/τs)_k

    Args:
        output_dim: K (default 65,536).
        teacher_temp, student_temp: τt and τs (defaults 0.04 and 0.1).
        center_momentum: of the centre (default 0.9).
        centering, sinkhorn_iterations, gather_distributed, diagnostics: as :class:`DINOLoss`. Ranks may have different
            numbers of masked tokens, or none: the centre is weighted by tokens, the loss by images.

    Shapes:
        ``teacher_out``, ``student_out``: [N, K], the masked tokens in the mask's order; N may be larger than their
        number, as in a buffer of a fixed size: the rows beyond are ignored, and the host does not wait for the number.
        ``mask``: [B, H, W] or [B, L], True where masked. Output: [], or ``(loss, diagnostics)``.

    Raises:
        TypeError, ValueError: shapes do not fit, a mask on the CPU has more tokens than there are rows, or a
            temperature of zero.

    Source: Zhou et al. 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", equation 2; Oquab et al. 2023,
    "DINOv2", and its ``iBOTPatchLoss.forward_masked``.

    Example:
        >>> criterion = sslfast.IBOTPatchLoss(4)
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> loss = criterion(torch.eye(4)[:3], torch.zeros(3, 4), mask)
        >>> round(loss.item(), 4)  # a uniform student: ln 4
        1.3863
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "center",
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
        diagnostics: bool = False,
    ) -> None:
        super().__init__((1, output_dim), center_momentum, centering, sinkhorn_iterations, gather_distributed)
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.diagnostics = diagnostics

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
        *,
        update_center: bool = True,
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of masked tokens; ``teacher_temp`` and ``update_center`` as in :meth:`DINOLoss.forward`."""
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        return with_diagnostics(self._loss(teacher_out, student_out, mask, temperature, update_center))

    @over_ranks()
    def _loss(
        self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float, update_center: bool
    ) -> Diagnosed:
        student, teacher = matching_views("student_out", student_out, "teacher_out", teacher_out)
        if len(student[0]) != 1 or len(teacher[0]) != 1:
            raise ValueError(f"teacher_out and student_out must be [N, K], got {tuple(teacher_out.shape)}")
        check_number("student_temp", self.student_temp, student[0])
        check_number("teacher_temp", teacher_temp, student[0])
        check_mask(mask, student[0])
        length = student[0].shape[1]
        rows: Tensor | None
        weights, rows = token_weights(mask, length, accumulator(student[0]))
        if readable(mask) and (masked := int(rows)) >= length:
            if masked > length:
                raise ValueError(f"mask has {masked} masked tokens, more than the {length} rows of logits")
            rows = None  # all count
        weights = self.scope().shard(mask).weight * weights
        with torch.no_grad():
            bias = self.bias_of(teacher, teacher_temp, rows)
        pairing = Pairing(False, False, (self.student_temp, teacher_temp))
        loss = mean_of_pairs(student, teacher, bias, pairing, weights, rows)
        found = prototype_diagnostics(loss, teacher, bias, teacher_temp, rows) if self.diagnostics else None
        self.take_in(teacher, update_center, rows)
        return loss, found


def check_mask(mask: Tensor, like: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2 or len(mask) == 0:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a bool tensor [B, H, W] or [B, L] with B at least 1, got {got}")
    if mask.device != like.device:
        raise ValueError(f"mask must be on the logits' device {like.device}, got {mask.device}")


def token_weights(mask: Tensor, length: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of ``length`` rows 1/(masked tokens of the row's image), and how many of them are masked tokens, [] int64.

    ``mask``: [B, ...], the rows in its order. No value is read by the host.
    """
    counts = mask.flatten(1).sum(1)  # [B]
    ends = counts.cumsum(0)
    image = torch.searchsorted(ends, torch.arange(length, device=mask.device), right=True).clamp(max=len(mask) - 1)
    return counts.clamp(min=1).to(kind).reciprocal()[image], ends[-1]
