"""SwAV: each view predicts the other views' Sinkhorn assignments to prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...ops.sinkhorn import check_iterations, check_number
from .._inputs import check_gather
from ._views import matching_views
from .cross_entropy import Pairing, mean_of_pairs
from .diagnostics import Diagnosed, PrototypeDiagnostics, prototype_diagnostics, with_diagnostics

Scores = Sequence[Tensor]


def swav(
    high_resolution_outputs: Scores,
    low_resolution_outputs: Scores = (),
    queue_outputs: Scores | None = None,
    *,
    temperature: float = 0.1,
    sinkhorn_iterations: int = 3,
    sinkhorn_epsilon: float = 0.05,
    sinkhorn_gather_distributed: bool = False,
) -> Tensor:
    """The swapped prediction of assignments, a mean over rows and over pairs of a high-resolution view and another.

        q_i = sinkhorn(scores_i and queue_i, ε), the rows of scores_i
        loss = mean over rows and over pairs i ≠ v of −Σ_k q_ik log softmax(scores_v/τ)_k

    The assignments are never stored: :func:`sinkhorn_bias` makes K numbers of each view's scores.

    Args:
        high_resolution_outputs: H scores [B, K] of features and prototypes, of the views that are assigned.
        low_resolution_outputs: L scores [B, K] of the other crops, which predict only (default: none).
        queue_outputs: H scores [Q, K] of a queue's features, which take part in the balance; ``None``: no queue. (The
            order of a batch and its queue makes no difference: swav puts the queue first, lightly last.)
        temperature: τ (default 0.1).
        sinkhorn_iterations, sinkhorn_epsilon: of :func:`sinkhorn` (defaults 3 and 0.05).
        sinkhorn_gather_distributed: balance over the rows of all ranks, as swav does; ``False``: of this rank's.

    Returns:
        [] float32 (float64 for float64 scores), a mean over this rank's rows. Differentiable in the scores as
        predictions; the assignments are constants.

    Raises:
        TypeError, ValueError: views do not fit one another, fewer than two of them, or a temperature of zero.

    Source: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", equation
    2; value as facebookresearch/swav's training loop and lightly 1.6.0's ``SwaVLoss``.

    Example:
        >>> round(sslfast.swav([torch.eye(4), torch.eye(4)]).item(), 4)
        0.0001
    """
    return _swav(
        high_resolution_outputs,
        low_resolution_outputs,
        queue_outputs,
        (temperature, sinkhorn_epsilon),
        sinkhorn_iterations,
        gather_distributed=sinkhorn_gather_distributed,
    )[0]


@over_ranks()
def _swav(
    high: Scores,
    low: Scores,
    queue: Scores | None,
    temperatures: tuple[float, float],
    iterations: int,
    *,
    gather_distributed: bool,
    diagnostics: bool = False,
) -> Diagnosed:
    high = [high] if isinstance(high, Tensor) else list(high)
    student, teacher = matching_views("the views", [*high, *low], "high_resolution_outputs", high)
    if len(student) < 2:
        raise ValueError(f"swav needs at least two views, got {len(student)}")
    for name, temperature in zip(("temperature", "sinkhorn_epsilon"), temperatures, strict=True):
        check_number(name, temperature, student[0])
    scores = _with_queue(teacher, queue)
    scope, iterations = scope_of(gather_distributed), check_iterations(iterations)
    with torch.no_grad():
        bias = torch.stack([scope.sinkhorn_bias(x, temperatures[1], iterations) for x in scores])  # [H, 1, K]
    loss = mean_of_pairs(student, teacher, bias, Pairing(True, False, temperatures), None, None)
    return loss, prototype_diagnostics(loss, teacher, bias, temperatures[1]) if diagnostics else None


def _with_queue(teacher: list[Tensor], queue: Scores | None) -> list[Tensor]:
    """The scores that each view's assignments are balanced over, [B + Q, 1, K]."""
    rows = [x.transpose(0, 1) for x in teacher]
    if queue is None:
        return rows
    if len(queue) != len(rows):
        raise ValueError(f"queue_outputs must be one for each of {len(rows)} high-resolution views, got {len(queue)}")
    for x, more in zip(rows, queue, strict=True):
        if more.dim() != 2 or more.shape[1] != x.shape[2]:
            raise ValueError(f"queue_outputs must be [Q, {x.shape[2]}], got shape {tuple(more.shape)}")
    return [torch.cat([x, more.detach().to(x).unsqueeze(1)]) for x, more in zip(rows, queue, strict=True)]


class SwAVLoss(nn.Module):
    """The module form of :func:`swav`, with the constructor and ``forward`` of lightly 1.6.0's ``SwaVLoss``.

    Args:
        temperature, sinkhorn_iterations, sinkhorn_epsilon, sinkhorn_gather_distributed: as :func:`swav`.
        diagnostics: return :class:`PrototypeDiagnostics` beside the loss.

    Shapes:
        each output: [B, K], a queue's [Q, K]; result: [] (lightly's has shape [1]), or ``(loss, diagnostics)``.

    Raises:
        As :func:`swav`.

    Example:
        >>> criterion = sslfast.SwAVLoss()
        >>> high = [torch.eye(4), torch.eye(4)]
        >>> round(criterion(high, [torch.zeros(4, 4)]).item(), 4)
        0.6932
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
        *,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        check_gather(sinkhorn_gather_distributed)
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed
        self.diagnostics = diagnostics

    def forward(
        self,
        high_resolution_outputs: Scores,
        low_resolution_outputs: Scores = (),
        queue_outputs: Scores | None = None,
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of scores [B, K] of each view."""
        return with_diagnostics(
            _swav(
                high_resolution_outputs,
                low_resolution_outputs,
                queue_outputs,
                (self.temperature, self.sinkhorn_epsilon),
                self.sinkhorn_iterations,
                gather_distributed=self.sinkhorn_gather_distributed,
                diagnostics=self.diagnostics,
            )
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, sinkhorn_iterations={self.sinkhorn_iterations}, "
            f"sinkhorn_epsilon={self.sinkhorn_epsilon}, "
            f"sinkhorn_gather_distributed={self.sinkhorn_gather_distributed}"
        )
