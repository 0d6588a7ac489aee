"""What operations give back where it is more than one tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SimilarityTerms(NamedTuple):
    """What one pass over the tiles gives; ``None`` where it was not asked for.

    ``row_lse`` [M], ``col_lse`` [N], ``positive`` [M] (logit of each row's positive), ``hardest`` [M] (largest logit of
    a row among the columns that are neither excluded nor its positive; without gradient; −inf where there is none).

    Example:
        >>> terms = sslfast.similarity_terms(torch.eye(2), torch.eye(2), 2.0, positives=torch.arange(2))
        >>> terms.positive.tolist(), terms.col_lse is None
        ([2.0, 2.0], True)
    """

    row_lse: Tensor
    col_lse: Tensor | None
    positive: Tensor | None
    hardest: Tensor | None


class SecondMoment(NamedTuple):
    """What a second-moment matrix M (one for each of R pairs of batches) says.

    Attributes:
        off_diagonal: [R], Σ_{i≠j} M_ij².
        diagonal: [R, D], M_ii.
        distance: [], ‖a − b‖²_F, or 0.

    Example:
        >>> moment = sslfast.second_moment(torch.eye(2), torch.zeros(2, 2), center=False)
        >>> moment.diagonal.tolist(), moment.distance.item()
        ([[1.0, 1.0], [0.0, 0.0]], 2.0)
    """

    off_diagonal: Tensor
    diagonal: Tensor
    distance: Tensor
