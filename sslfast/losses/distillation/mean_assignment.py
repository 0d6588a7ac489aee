"""The mean of rows' assignments to prototypes, which MSN's regulariser is a function of."""

from __future__ import annotations

from torch import Tensor

from ...ops.mean_assignment import mean_assignment as assignment_sums
from ...ops.sinkhorn import as_count, check_logits
from .cross_entropy import checked_weights


def mean_assignment(
    logits: Tensor,
    temperature: float = 0.1,
    *,
    row_weights: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The mean over rows of the softmax over prototypes, ``p̄_k = Σ_n w_n softmax_k(logits_n/τ)``.

    No softmax is stored: the logits are read once, and once backward, which writes their gradient. What a mean-entropy
    term is made of: ``torch.special.entr(p̄).sum()``.

    Args:
        logits: [B, K], of stored numbers; float32, float64, bfloat16 or float16; any strides.
        temperature: τ, a number, not zero (default 0.1).
        row_weights: [B], w (default 1/B each), without gradient.
        rows: [] or [1], whole number on the logits' device: only so many of the first rows count, which the host does
            not read; the default weights are then 1/rows.

    Returns:
        [K] float32 (float64 for float64 logits), of this rank's rows. Differentiable in the logits, twice through the
        reference. Of no row it is NaN; with ``row_weights`` 0.

    Raises:
        TypeError, ValueError: an argument does not fit; it is named.

    Source: Assran et al. 2022, "Masked Siamese Networks for Label-Efficient Learning", section 3.

    Example:
        >>> mean = sslfast.mean_assignment(torch.eye(2)[[0, 0, 0, 1]], temperature=1.0)
        >>> [round(p, 4) for p in mean.tolist()]
        [0.6155, 0.3845]
    """
    check_logits(logits, temperature, rows)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, K], got shape {tuple(logits.shape)}")
    count = as_count(rows)
    weights = None if row_weights is None else checked_weights(row_weights, logits, len(logits))
    sums = assignment_sums(logits, None, weights, temperature, count)[0]
    return sums if weights is not None else sums / (len(logits) if count is None else count)
