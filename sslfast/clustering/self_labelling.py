"""Self-labelling: labels of a whole data set that use every prototype alike, by Sinkhorn to convergence."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._checks import check_matrix, real_number, warn_once, whole_number, without_autocast
from ..distributed.agreement import over_ranks
from ..distributed.choose import scope_of
from ..distributed.scope import Scope
from ..ops.sinkhorn import column_sums, updated

CHUNK_BYTES = 64 * 2**20  # of logits in float64 at a time
TESTED = 10  # iterations from one look at the error to the next, as published


@over_ranks()
def self_labelling(
    outputs: Tensor,
    prototypes: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    sharpness: float = 25.0,
    tolerance: float = 0.1,
    max_iterations: int = 10_000,
    gather_distributed: bool = False,
) -> Tensor:
    """SeLa's labels: the assignment of all rows to prototypes, each with the same share, that agrees best with a model.

        P = softmax(logits)^λ;   r_k = (1/K)/Σ_n P_nk c_n,   c_n = (1/N)/Σ_k r_k P_nk    from c = 1/N on
        until Σ_n |c_n/c_n' − 1| ≤ tolerance, looked at in every tenth iteration;   label_n = argmax_k r_k P_nk

    Rows pass in chunks, in float64 and in the log domain, so that nothing overflows or vanishes; what is kept is one
    number for each prototype. From features the logits are never stored. Call it once for each head.

    Args:
        outputs: logits [N, K]; or, with ``prototypes``, features [N, D]; float32, float64, bfloat16 or float16.
        prototypes: [K, D], a head's weights: the logits are ``outputs @ prototypes.T + bias``.
        bias: [K], the head's, with ``prototypes`` only (default: none).
        sharpness: λ, positive (default 25): the larger, the harder the assignment.
        tolerance: not negative (default 0.1, as published). It is a sum over all rows.
        max_iterations: at least 1; a warning says if it was reached before the tolerance (default 10,000).
        gather_distributed: the rows of all ranks share the prototypes, uneven ones too; K numbers travel from each rank
            in each iteration. ``False``: this rank's alone.

    Returns:
        [N] int64, the label of each of this rank's rows. No gradient. The host reads the error in every tenth
        iteration.

    Raises:
        TypeError, ValueError: an argument does not fit; it is named. Over ranks also where they disagree on K or on an
            option.

    Source: Asano, Rupprecht and Vedaldi 2020, "Self-labelling via simultaneous clustering and representation learning",
    section 3.2, algorithm 1; labels as yukimasano/self-label's ``optimize_L_sk``.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.5, 0.0]])  # all prefer the first
        >>> sslfast.self_labelling(logits).tolist()
        [0, 0, 1, 1]
    """
    classes = _checked(outputs, prototypes, bias)
    sharpness, tolerance = real_number("sharpness", sharpness), real_number("tolerance", tolerance)
    if not (math.isfinite(sharpness) and sharpness > 0):
        raise ValueError(f"sharpness must be a positive number, got {sharpness}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    most = whole_number("max_iterations", max_iterations, 1)
    scope = scope_of(gather_distributed)
    traits = {"prototypes": classes, "sharpness": sharpness, "tolerance": tolerance, "max_iterations": most}
    with torch.no_grad(), without_autocast(outputs):
        shard = scope.shard(outputs, traits)
        rows = _Logits(outputs.detach(), prototypes, bias, classes)
        level = math.log(shard.total / classes)
        f = _first(rows, sharpness, scope) + level  # log r
        before: Tensor | None = None
        for step in range(most):
            if step > 0:
                before = f
                sums = _summed([column_sums(x[:, None], f[None], 1 / sharpness)[1] for x in rows])
                f = updated(f, torch.zeros_like(f), scope.total(sums)[0]) + level
            # Read by the host, as is needed to stop.
            if step % TESTED == 0 and float(scope.total(_error(rows, sharpness, before, f))) <= tolerance:
                break
        else:
            warn_once(f"self_labelling: after {most} iterations the error is still above tolerance={tolerance:g}")
        return torch.cat([(sharpness * x + f).argmax(1) for x in rows])


class _Logits:
    """Chunks of rows [n, K] in float64, made anew in each pass."""

    def __init__(self, outputs: Tensor, prototypes: Tensor | None, bias: Tensor | None, classes: int) -> None:
        self.outputs = outputs
        self.weights = None if prototypes is None else prototypes.detach().double()
        self.bias = None if bias is None else bias.detach().double()
        self.size = max(1, CHUNK_BYTES // (8 * classes))

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.outputs.split(self.size):
            x = part.double()
            x = x if self.weights is None else x @ self.weights.T
            yield x if self.bias is None else x + self.bias


def _summed(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _first(rows: _Logits, sharpness: float, scope: Scope) -> Tensor:
    """``−log Σ_n P_nk``, [K]; only here the rows' own normalisers count: later ones cancel in c."""
    parts = [torch.stack(column_sums(x.log_softmax(1)[:, None], None, 1 / sharpness)) for x in rows]
    every = scope.gather(torch.stack(parts))  # [chunks of all ranks, 2, 1, K]
    largest, sums = every[:, 0, 0], every[:, 1, 0]
    most = largest.amax(0)
    return updated(None, most, (torch.exp(largest - most) * sums).sum(0))


def _error(rows: _Logits, sharpness: float, before: Tensor | None, f: Tensor) -> Tensor:
    """``Σ_n |c_n/c_n' − 1|`` over this rank's rows, from the row sums, whose inverses c and c' are."""
    total = f.new_zeros(())
    for x in rows:
        old = sharpness * x.logsumexp(1) if before is None else (sharpness * x + before).logsumexp(1)
        total += torch.expm1((sharpness * x + f).logsumexp(1) - old).abs().nansum()
    return total


def _checked(outputs: Tensor, prototypes: Tensor | None, bias: Tensor | None) -> int:
    """K."""
    check_matrix("outputs", outputs)
    if prototypes is None:
        if bias is not None:
            raise ValueError("bias belongs to prototypes, and prototypes is None: logits have theirs added already")
        return outputs.shape[1]
    check_matrix("prototypes", prototypes)
    if prototypes.shape[1] != outputs.shape[1]:
        raise ValueError(f"prototypes must have outputs' {outputs.shape[1]} features, got {prototypes.shape[1]}")
    for name, x in (("prototypes", prototypes), ("bias", bias)):
        if isinstance(x, Tensor) and x.device != outputs.device:
            raise ValueError(f"{name} must be on outputs' device {outputs.device}, got {x.device}")
    if bias is not None and bias.shape != prototypes.shape[:1]:
        raise ValueError(f"bias must have shape ({len(prototypes)},), got {tuple(bias.shape)}")
    return len(prototypes)
