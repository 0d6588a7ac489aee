"""DINO's and iBOT's losses from the features of a head, with the teacher's centre or Sinkhorn's balance inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import accumulator, readable, without_autocast
from ...distributed.agreement import over_ranks
from ...ops.prototype_cross_entropy import prototype_cross_entropy
from ...ops.types import NormalizedPrototypes
from ._targets import TeacherTargets
from .ibot import check_mask, token_weights
from .teacher_bias import check_teacher, logits_of, prototype_sinkhorn


class PrototypeLoss(TeacherTargets):
    """DINO's and iBOT's loss from features, :func:`sslfast.prototype_cross_entropy`, and the teacher's bias with it.

        p = softmax(g·uᵀ/τt + β),   β = −center/τt, or that of Sinkhorn–Knopp
        loss = mean over rows and over pairs t ≠ v of −Σ_k p_tk log softmax(h_v·wᵀ/τs)_k
        center ← m·center + (1 − m)·(mean of the teacher's logits), after the loss

    Args:
        output_dim: K (default 65,536).
        teacher_temp, student_temp: τt and τs (defaults 0.04 and 0.1).
        center_momentum: m (default 0.9).
        centering: "center" (default), or "sinkhorn": all rows of all the teacher's views are balanced together, as
            DINOv2 and DINOv3 do; there is no centre then.
        sinkhorn_iterations: of "sinkhorn" (default 3).
        gather_distributed: centre and assignments are those of all ranks' rows, and the mean over ranks of the loss is
            that of the global batch, uneven ranks too; ``False``: of this rank's alone.

    ``center`` [1, K] is a buffer; a checkpoint's [1, 1, K] is taken too.

    Shapes:
        student: [V_s, B, D]; teacher: [V_t, B, D], the first V_t the same crops (DINO). Or both [N, D] with a ``mask``
        [B, H, W] or [B, L], True where masked (iBOT): the features of the masked tokens in the mask's order; N may be
        larger than their number, and the host does not wait for the number. Output: [].

    Raises:
        TypeError, ValueError: shapes do not fit one another or K, a mask on the CPU has more tokens than there are
            rows, or an argument is out of range.

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", algorithm 1; Zhou et al.
    2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", equation 2.

    Example:
        >>> student, teacher = sslfast.DINOHead(32, 64), sslfast.DINOHead(32, 64).requires_grad_(False)
        >>> criterion = sslfast.PrototypeLoss(64, centering="sinkhorn")
        >>> crops = torch.randn(4, 8, 32)
        >>> loss = criterion(student(crops), teacher(crops[:2]), student.prototypes, teacher.prototypes)
        >>> loss.shape
        torch.Size([])
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
    ) -> None:
        temperatures = student_temp, teacher_temp
        super().__init__(
            (1, output_dim), temperatures, center_momentum, centering, sinkhorn_iterations, gather_distributed, False
        )

    @over_ranks()
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_prototypes: Tensor | NormalizedPrototypes,
        teacher_prototypes: Tensor | NormalizedPrototypes | None = None,
        mask: Tensor | None = None,
        teacher_temp: float | None = None,
        *,
        update_center: bool = True,
    ) -> Tensor:
        """The loss of features; its arguments as :func:`sslfast.prototype_cross_entropy`'s.

        Args:
            teacher_prototypes: default: the student's.
            mask: iBOT's, see above: each image counts once, whatever the number of its masked tokens.
            teacher_temp: τt of this call.
            update_center: move the centre now (default). ``False``, for all micro-batches of a step: the rows wait for
                one :meth:`update_center` after them.
        """
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        u = student_prototypes if teacher_prototypes is None else teacher_prototypes
        if not isinstance(teacher, Tensor) or teacher.dim() != (3 if mask is None else 2):
            wanted = "[views, samples, features] without a mask" if mask is None else "[rows, features] with a mask"
            got = tuple(teacher.shape) if isinstance(teacher, Tensor) else type(teacher).__name__
            raise ValueError(f"teacher must be {wanted}, got {got}")
        rows = teacher.detach().reshape(-1, teacher.shape[-1])
        check_teacher(rows, u)
        k = len(u.direction if isinstance(u, NormalizedPrototypes) else u)
        if k != self.center.shape[-1]:
            raise ValueError(f"prototypes must be {self.center.shape[-1]}, as output_dim says, got {k}")
        weights = self._weights(teacher, mask)
        if self.centering == "center":
            bias = self.center / -temperature
        else:
            bias = prototype_sinkhorn(
                rows,
                u,
                temperature,
                self.sinkhorn_iterations,
                row_weights=None if mask is None else weights,
                gather_distributed=self.gather_distributed,
            )
        loss = prototype_cross_entropy(
            student,
            teacher,
            student_prototypes,
            teacher_prototypes,
            student_temperature=self.student_temp,
            teacher_temperature=temperature,
            teacher_bias=bias,
            row_weights=weights,
        )
        if self.centering == "center":
            self._take_in_features(rows, u, None if mask is None else weights, update_center)
        return loss

    def _weights(self, teacher: Tensor, mask: Tensor | None) -> Tensor | None:
        """Of the samples, or of the masked tokens."""
        kind = accumulator(teacher)
        if mask is None:
            if not self.gather_distributed:
                return None
            samples = teacher.shape[1]
            return teacher.new_full((samples,), self.scope().shard(teacher[0]).weight, dtype=kind)
        check_mask(mask, teacher)
        weights, count = token_weights(mask, len(teacher), kind)
        if readable(mask) and int(count) > len(teacher):
            raise ValueError(f"mask has {int(count)} masked tokens, more than the {len(teacher)} rows of features")
        counted = torch.arange(len(teacher), device=teacher.device) < count
        return torch.where(counted, weights * self.scope().shard(mask).weight, 0.0)

    @torch.no_grad()
    def _take_in_features(
        self, rows: Tensor, prototypes: Tensor | NormalizedPrototypes, weights: Tensor | None, now: bool
    ) -> None:
        """The teacher's logits are linear in its features, and so are their sums."""
        with without_autocast(rows):
            kind = accumulator(rows)
            count: Tensor | int = len(rows)
            if weights is not None:
                rows, count = torch.where((weights != 0)[:, None], rows, 0), (weights != 0).sum().to(kind)
            total = logits_of(rows.sum(0, dtype=kind), prototypes)
        self.take_in_sum(total.to(self.center.dtype), count, now)
