"""iBOT: the student's masked tokens predict the teacher's softmax of the same tokens, which it sees; iBOT++: all do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import accumulator, readable, real_number
from ...distributed.agreement import over_ranks
from ._targets import TeacherTargets
from .diagnostics import Diagnosed, PrototypeDiagnostics, with_diagnostics


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
        temperatures, shape = (student_temp, teacher_temp), (1, output_dim)
        options = (center_momentum, centering, sinkhorn_iterations, gather_distributed, diagnostics)
        super().__init__(shape, temperatures, *options)

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
        student, teacher = self.checked(student_out, teacher_out, teacher_temp)
        if len(student[0]) != 1 or len(teacher[0]) != 1:
            raise ValueError(f"teacher_out and student_out must be [N, K], got {tuple(teacher_out.shape)}")
        check_mask(mask, student[0])
        length = student[0].shape[1]
        rows: Tensor | None
        weights, rows = token_weights(mask, length, accumulator(student[0]))
        if readable(mask) and (masked := int(rows)) >= length:
            if masked > length:
                raise ValueError(f"mask has {masked} masked tokens, more than the {length} rows of logits")
            rows = None  # all count
        weights = self.scope().shard(mask).weight * weights
        return self.distilled(student, teacher, teacher_temp, update_center, weights=weights, rows=rows)


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    """iBOT++: :class:`IBOTPatchLoss` on all tokens, visible ones too, with lightly 1.6.0's ``forward``.

        CE_bn = −Σ_k p_bnk log softmax(student_bn/τs)_k,      p = softmax((teacher − center)/τt)
        loss = mean_b( mean of CE_bn over the image's masked tokens + visible_loss_weight · mean over its visible ones )

    With a ``visible_loss_weight`` of 0 it is iBOT's loss; a masked token counts no less for the visible ones beside it.
    Without a mask it is the mean over all tokens. The centre, or Sinkhorn's assignments, are those of all tokens.

    Args:
        output_dim, teacher_temp, student_temp, center_momentum, centering, sinkhorn_iterations, gather_distributed,
            diagnostics: as :class:`IBOTPatchLoss`.

    Shapes:
        ``teacher_out``, ``student_out``: [B, N, K], or [B·N, K] with a mask. ``mask``: [B, H, W] or [B, N], True where
        masked; ``None``: none. Output: [], or ``(loss, diagnostics)``.

    Raises:
        TypeError, ValueError: shapes do not fit, a matrix of logits comes without a mask, a weight that is not finite,
            or a temperature of zero.

    Source: "TIPSv2", 2026 (arXiv:2604.12012); value as lightly 1.6.0's ``IBOTPlusPlusPatchLoss``.

    Example:
        >>> criterion = sslfast.IBOTPlusPlusPatchLoss(4)
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> loss = criterion(torch.eye(4).view(2, 2, 4), torch.zeros(2, 2, 4), mask)
        >>> round(loss.item(), 4)  # a uniform student: 3/2 ln 4, since the second image has no visible token
        2.0794
    """

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None = None,
        teacher_temp: float | None = None,
        visible_loss_weight: float = 1.0,
        *,
        update_center: bool = True,
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of all tokens; ``teacher_temp`` and ``update_center`` as in :meth:`DINOLoss.forward`."""
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        return with_diagnostics(
            self._loss_of_all(teacher_out, student_out, mask, temperature, visible_loss_weight, update_center)
        )

    @over_ranks()
    def _loss_of_all(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None,
        teacher_temp: float,
        visible_loss_weight: float,
        update_center: bool,
    ) -> Diagnosed:
        student, teacher = self.checked(student_out, teacher_out, teacher_temp)
        if len(student) != 1 or len(teacher) != 1 or student_out.shape != teacher_out.shape:
            raise ValueError("teacher_out and student_out must be tensors of one shape, [B, N, K] or [B·N, K]")
        visible = real_number("visible_loss_weight", visible_loss_weight)
        if not math.isfinite(visible):
            raise ValueError(f"visible_loss_weight must be finite, got {visible}")
        if mask is None:
            if student_out.dim() != 3:
                raise ValueError("mask must be given with logits [B·N, K], or B is not known")
            mask = torch.ones(student_out.shape[:2], dtype=torch.bool, device=student_out.device)
        check_mask(mask, student[0])
        images, rows = len(mask), student_out[..., 0].numel()
        if mask.numel() != rows or student_out.dim() == 3 and images != len(student_out):
            raise ValueError(
                f"mask must have one entry for each token of logits {tuple(student_out.shape)}, got {tuple(mask.shape)}"
            )
        weights = all_token_weights(mask, visible, accumulator(student[0])) * self.scope().shard(mask).weight
        student, teacher = ([x.reshape(1, rows, -1) for x in views] for views in (student, teacher))
        return self.distilled(student, teacher, teacher_temp, update_center, weights=weights)


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


def all_token_weights(mask: Tensor, visible: float, kind: torch.dtype) -> Tensor:
    """Of all tokens, [B·N]: 1/(masked tokens of the image) where masked, ``visible``/(its visible tokens) elsewhere."""
    masked = mask.flatten(1)
    counts = masked.sum(1, keepdim=True)
    share, other = (1 / n.clamp(min=1).to(kind) for n in (counts, masked.shape[1] - counts))
    return torch.where(masked, share, visible * other).flatten()
