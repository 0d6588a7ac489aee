"""CAPI: the student predicts, for masked patches, the teacher's assignments to clusters, balanced by position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import FLOATS, accumulator, ids_checked
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.sinkhorn import check_iterations, check_number
from .._inputs import check_gather
from .cross_entropy import Pairing, mean_of_pairs
from .diagnostics import Diagnosed, PrototypeDiagnostics, prototype_diagnostics, with_diagnostics


def capi(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_index: Tensor | None = None,
    *,
    teacher_temperature: float = 0.06,
    student_temperature: float = 0.12,
    sinkhorn_iterations: int = 3,
    gather_distributed: bool = False,
) -> Tensor:
    """Cross entropy of the predicted tokens against assignments of the teacher's, which are balanced by position.

        q_·s· = sinkhorn(teacher_·s·, τt), of the B tokens at each position s on its own
        loss = mean over images b and predicted tokens p of −Σ_k q_b,s(b,p),k log softmax(student_bp/τs)_k

    The assignments are never stored: :func:`sinkhorn_bias` makes K numbers for each position, and the teacher's rows
    are read where they lie, those that are predicted.

    The clustering head learns by the same loss, from its own assignments: ``capi(logits, logits)``. For tokens that are
    balanced all together, without regard to their position, give logits [B·S, 1, K].

    Args:
        teacher_logits: [B, S, K], scores of K clusters for the S tokens of B images; no gradient. float32, float64,
            bfloat16 or float16; any strides, though other layouts than this are copied.
        student_logits: [B, P, K], of the P tokens that are predicted in each image.
        teacher_index: [B, P] int64, s(b, p): the positions of these among the S. Checked on the CPU, and on a GPU with
            ``SSLFAST_CHECK_IDS=1``; elsewhere one out of range gives NaN. ``None`` (default): all, P = S.
        teacher_temperature, student_temperature: τt (default 0.06) and τs (default 0.12), not zero.
        sinkhorn_iterations: of :func:`sinkhorn` (default 3).
        gather_distributed: a position's tokens are those of all ranks, and the mean over ranks of the loss is that over
            all predicted tokens, for uneven batches too; ``False``: of this rank's alone.

    Returns:
        [] float32 (float64 for float64 logits). Differentiable in ``student_logits``, twice through the reference; the
        assignments are constants.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or an index do not fit, or a temperature is zero. Over ranks also
            where they disagree on S, K, a temperature or the number of iterations.

    Source: Darcet et al. 2025, "Cluster and Predict Latent Patches for Improved Masked Image Modeling", section 3;
    value as facebookresearch/capi's and lightly 1.6.0's ``CAPILoss`` without their ε of 1e-8 in each denominator.

    Example:
        >>> teacher, student = torch.eye(4).view(2, 2, 4), torch.zeros(2, 1, 4)
        >>> loss = sslfast.capi(teacher, student, torch.tensor([[0], [1]]))
        >>> round(loss.item(), 4)  # a uniform student: ln 4
        1.3863
    """
    return _capi(
        teacher_logits,
        student_logits,
        teacher_index,
        (student_temperature, teacher_temperature),
        sinkhorn_iterations,
        gather_distributed=gather_distributed,
    )[0]


@over_ranks()
def _capi(
    teacher_logits: Tensor,
    student_logits: Tensor,
    teacher_index: Tensor | None,
    temperatures: tuple[float, float],
    iterations: int,
    *,
    gather_distributed: bool,
    diagnostics: bool = False,
) -> Diagnosed:
    student, teacher = _checked(teacher_logits, student_logits, teacher_index)
    for name, temperature in zip(("student_temperature", "teacher_temperature"), temperatures, strict=True):
        check_number(name, temperature, student)
    scope, iterations = scope_of(gather_distributed), check_iterations(iterations)
    with torch.no_grad():
        bias = scope.sinkhorn_bias(teacher, temperatures[1], iterations).unsqueeze(0)  # [1, S, K]
    rows, every = student.flatten(0, 1), teacher.flatten(0, 1)  # [B·P, K], [B·S, K]
    weights = None
    if gather_distributed:
        weight = scope.shard(rows).weight
        weights = torch.full((len(rows),), weight, dtype=accumulator(rows), device=rows.device)
    meets = None if teacher_index is None else _rows_of(teacher_index, teacher.shape[1])
    loss = mean_of_pairs([rows[None]], [every[None]], bias, Pairing(False, False, temperatures), weights, None, meets)
    return loss, prototype_diagnostics(loss, [every[None]], bias, temperatures[1]) if diagnostics else None


def _rows_of(index: Tensor, length: int) -> Tensor:
    """Rows [B·P] of the teacher's [B·S, K]; −1, which is none, for an index out of range."""
    first = length * torch.arange(len(index), device=index.device)
    return torch.where((index >= 0) & (index < length), index + first[:, None], -1).flatten()


def _checked(teacher: Tensor, student: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """The student's logits and the teacher's, detached, in the wider dtype of the two."""
    for name, x in (("teacher_logits", teacher), ("student_logits", student)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.dim() != 3 or 0 in x.shape:
            raise ValueError(f"{name} must be [images, tokens, clusters], none of them 0, got {tuple(x.shape)}")
        if x.device != teacher.device:
            raise ValueError(f"{name} must be on teacher_logits' device {teacher.device}, got {x.device}")
    (images, length, clusters), tokens = teacher.shape, student.shape[1]
    if student.shape[::2] != (images, clusters) or (index is None and tokens != length):
        tokens_too = ", tokens" if index is None else ""
        raise ValueError(
            f"student_logits must have teacher_logits' images{tokens_too} and clusters, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if index is not None:
        _check_index(index, (images, tokens), length, teacher.device)
    widest = torch.promote_types(teacher.dtype, student.dtype)
    return student.to(widest), teacher.detach().to(widest)


def _check_index(index: Tensor, shape: tuple[int, int], length: int, device: torch.device) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"teacher_index must be an int64 tensor, got {got}")
    if index.shape != shape or index.device != device:
        raise ValueError(
            f"teacher_index must have shape {shape} and be on the logits' device {device}, got {tuple(index.shape)} on "
            f"{index.device}"
        )
    if ids_checked(index):
        low, high = (int(i) for i in torch.aminmax(index))
        if low < 0 or high >= length:
            raise ValueError(f"teacher_index must be positions 0 to {length - 1}, got {low} to {high}")


class CAPILoss(nn.Module):
    """The module form of :func:`capi`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        teacher_temperature, student_temperature, sinkhorn_iterations, gather_distributed: as :func:`capi`.
        diagnostics: return :class:`PrototypeDiagnostics` of all the teacher's tokens beside the loss.

    Shapes:
        ``teacher_logits``: [B, S, K]; ``student_logits``: [B, P, K]; ``teacher_index``: [B, P]; output: [], or ``(loss,
        diagnostics)``.

    Raises:
        As :func:`capi`.

    Example:
        >>> criterion = sslfast.CAPILoss()
        >>> teacher, student = torch.eye(6).view(2, 3, 6), torch.zeros(2, 2, 6)
        >>> round(criterion(teacher, student, torch.tensor([[0, 2], [1, 2]])).item(), 4)  # ln 6
        1.7918
    """

    def __init__(
        self,
        teacher_temperature: float = 0.06,
        student_temperature: float = 0.12,
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
        *,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.teacher_temperature = teacher_temperature
        self.student_temperature = student_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.gather_distributed = gather_distributed
        self.diagnostics = diagnostics

    def forward(
        self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None = None
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of the predicted tokens against the teacher's, all or those at ``teacher_index``."""
        return with_diagnostics(
            _capi(
                teacher_logits,
                student_logits,
                teacher_index,
                (self.student_temperature, self.teacher_temperature),
                self.sinkhorn_iterations,
                gather_distributed=self.gather_distributed,
                diagnostics=self.diagnostics,
            )
        )

    def extra_repr(self) -> str:
        return (
            f"teacher_temperature={self.teacher_temperature}, student_temperature={self.student_temperature}, "
            f"sinkhorn_iterations={self.sinkhorn_iterations}, gather_distributed={self.gather_distributed}"
        )
