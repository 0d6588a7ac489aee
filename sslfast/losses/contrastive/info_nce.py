"""InfoNCE: rows against columns, with extra and per-row negatives, several positives, smoothing and debiasing."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..._checks import accumulator
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.types import SimilarityTerms
from ._info_nce_inputs import Inputs, check_options, checked
from ._inputs import ContrastiveLoss, inverse, row_dots, softplus
from .diagnostics import Diagnostics, diagnostics_of


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
    diagnostics: Literal[False] = False,
) -> Tensor: ...


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
    diagnostics: Literal[True],
) -> tuple[Tensor, Diagnostics]: ...


@overload
def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]: ...


def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    symmetric: bool = False,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
    diagnostics: bool = False,
) -> Tensor | tuple[Tensor, Diagnostics]:
    """InfoNCE of queries against keys, mean over the M queries; the M × N matrix is never stored.

        ℓ_i = log Σ_{j ∈ C(i)} exp(s_ij) − (1/|P(i)|) Σ_{p ∈ P(i)} s_ip,        s_ij = q_i·k_j / τ

    ``C(i)`` holds all keys, all shared negatives and row ``i``'s own hard negatives; every positive stays in it. Which
    options make which package's loss is in ``docs/info_nce.md``.

    Args:
        q, k: [M, D], [N, D]; float32, float64, bfloat16 or float16.
        temperature: τ, finite and not zero (default 0.07); or a one-element tensor, which receives its gradient.
        positives: [M] or [M, P] integers, rows of (this rank's) ``k``; −1 for none. Default: row ``i`` of q has row
            ``i`` of k. With several the loss is the mean over them (SupCon's L_out); a row with none adds 0 to the sum.
        negatives: [K, D], more columns for every row. Without gradient if they want none.
        hard_negatives: [M, H, D], row ``i``'s own.
        row_ids, col_ids: [M] and [N] integers, one numbering over all ranks: pairs of q and k with equal ids leave the
            denominator (a positive's own logit is still subtracted).
        label_smoothing: ε in [0, 1): the target is 1 − ε on the positives and ε spread evenly over ``C(i)``, as in
            ``F.cross_entropy``. Not with ids.
        tau_plus: τ⁺ in [0, 1), the probability that a negative is a positive: the sum of the negatives becomes
            ``max((Σ_{j≠p} e^{s_ij} − n τ⁺ e^{s_ip}) / (1 − τ⁺), n e^{−1/|τ|})`` with ``n = |C(i)| − 1``. One positive
            a row, not with ids.
        symmetric: the mean of this and the same over the columns, from one pass (CLIP). Needs M = N; not with
            positives or extra negatives.
        normalize: divide each row by its norm first (default).
        gather_distributed: contrast with the keys and the shared negatives of all ranks; ``False``: this rank's. All
            ranks must pass the same kinds of arguments.
        strategy: how, ``"gather"`` or ``"ring"``.
        diagnostics: also return :class:`Diagnostics` (of the rows). Needs one positive in every row.

    Returns:
        [] float32 (float64 for float64 inputs), or ``(loss, diagnostics)``. Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes, devices or options do not fit, an option is out of its range, the
            temperature is zero or not finite.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", equation 4;
    debiasing: Chuang et al. 2020, "Debiased Contrastive Learning", equations 7 and 8 with one positive sample.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> round(sslfast.info_nce(q, k, temperature=0.5).item(), 4)
        0.3408
        >>> several = torch.tensor([[0, 1], [1, -1], [2, -1], [3, -1]])  # rows of k; row 0 of q has two
        >>> round(sslfast.info_nce(q, k, temperature=0.5, positives=several).item(), 4)
        0.5908
    """
    x = checked(q, k, positives, negatives, hard_negatives, normalize)
    check_options(x, row_ids, label_smoothing, tau_plus, symmetric, diagnostics)
    scale = inverse(temperature, x.q)
    scope = scope_of(gather_distributed, strategy)
    rows, keys = scope.shard(x.q), scope.shard(x.k)
    columns = _positive_columns(x, rows, keys)  # [M]
    if tau_plus:  # the sum of the negatives alone: taking e^{s_ip} out of a sum that it dominates would lose them
        row_ids, col_ids = columns, keys.ids(x.q.device)
    terms = scope.similarity_terms(
        x.q,
        x.k,
        scale,
        row_ids=row_ids,
        col_ids=col_ids,
        columns=symmetric,
        positives=columns,
        hardest=diagnostics,
    )
    row_lse, hardest, hard_sum = _with_extra_negatives(terms, x, scale, scope)
    assert terms.positive is not None
    positive = terms.positive if x.positives is None else _mean_positive(terms.positive, x.positives, x, scale)
    count = keys.total  # |C(i)|
    if x.negatives is not None:
        count += scope.shard(x.negatives).total
    if x.hard_negatives is not None:
        count += x.hard_negatives.shape[1]

    def per_row(lse: Tensor, q: Tensor, mean_key: Tensor | None, hard_mean: Tensor | float) -> Tensor:
        ell = _debiased(lse, positive, scale, tau_plus, count - 1) if tau_plus else lse - positive
        if mean_key is None:
            return ell
        return ell + label_smoothing * (positive - scale * (q * mean_key).sum(1) - hard_mean)

    smooth = label_smoothing > 0
    mean_key = _mean_row(scope, count, x.k, x.negatives) if smooth else None
    ell = per_row(row_lse, x.q, mean_key, hard_sum / count)  # [M]
    if x.positives is not None:
        ell = ell.masked_fill((x.positives < 0).all(1), 0.0)
    if symmetric:
        assert terms.col_lse is not None
        mean_query = _mean_row(scope, count, x.q) if smooth else None
        ell = (ell + per_row(terms.col_lse, x.k, mean_query, 0.0)) / 2
    loss = rows.weight * ell.sum()
    if not diagnostics:
        return loss
    pairs = rows.local * count
    whole = torch.logaddexp(row_lse, positive) if tau_plus else row_lse
    found = diagnostics_of(SimilarityTerms(whole, None, positive, hardest), scale, pairs)
    if row_ids is not None and col_ids is not None and not tau_plus:
        found = _less_excluded(found, pairs, row_ids, scope.gather(col_ids))
    return loss, found


def _positive_columns(x: Inputs, rows: Shard, keys: Shard) -> Tensor:
    """[M], the global column of each row's (first) positive, −1 for none."""
    if x.positives is None:
        return keys.offset + torch.arange(rows.local, device=x.q.device)
    first = x.positives[:, 0]
    return torch.where(first < 0, first, first + keys.offset)


def _mean_positive(first: Tensor, positives: Tensor, x: Inputs, scale: Tensor) -> Tensor:
    """[M], mean logit of each row's positives, 0 where it has none; ``first`` [M] is that of their first column."""
    if positives.shape[1] == 1:
        return first
    others = scale * row_dots(x.q, x.k[positives[:, 1:].clamp(min=0)])  # [M, P − 1]
    logits = torch.cat([first[:, None], others], dim=1).masked_fill(positives < 0, 0.0)
    return logits.sum(1) / (positives >= 0).sum(1).clamp(min=1)


def _with_extra_negatives(
    terms: SimilarityTerms, x: Inputs, scale: Tensor, scope: Scope
) -> tuple[Tensor, Tensor | None, Tensor | float]:
    """Row LSE and hardest negative with the extra columns, and the sum of the hard negatives' logits."""
    row_lse, hardest, hard_sum = terms.row_lse, terms.hardest, 0.0
    if x.negatives is not None:
        shared = scope.similarity_terms(x.q, x.negatives, scale)
        row_lse = torch.logaddexp(row_lse, shared.row_lse)
        if hardest is not None:
            with torch.no_grad():  # a pass of its own: the one with a gradient may not hold on to a queue
                hardest_shared = scope.similarity_terms(x.q, x.negatives, scale, hardest=True).hardest
            assert hardest_shared is not None
            hardest = torch.maximum(hardest, hardest_shared)
    if x.hard_negatives is None:
        return row_lse, hardest, hard_sum
    own = scale * row_dots(x.q, x.hard_negatives)  # [M, H]
    if hardest is not None:
        hardest = torch.maximum(hardest, own.detach().amax(1))
    return torch.logaddexp(row_lse, own.logsumexp(1)), hardest, own.sum(1)


def _debiased(log_negatives: Tensor, positive: Tensor, scale: Tensor, tau_plus: float, n: int) -> Tensor:
    """``log(1 + N_g e^{−s_p})`` with ``N_g`` the debiased sum of ``n`` negatives, from logarithms alone."""
    if n == 0:
        return softplus(log_negatives - positive)
    gap = math.log(n * tau_plus) + positive - log_negatives  # log of the share that is taken for positives
    left = ~(gap >= 0)  # also where a NaN came in, which must come out
    # Where nothing is left the floor stands in; the number there must only not make NaN of a zero gradient.
    share = torch.log(-torch.expm1(torch.where(left, gap.clamp(max=-1e-30), -1.0)))
    log_ng = log_negatives + share - math.log1p(-tau_plus)
    floor = math.log(n) - scale.abs()
    return softplus(torch.where(left & ~(log_ng <= floor), log_ng, floor) - positive)


def _mean_row(scope: Scope, count: int, *blocks: Tensor | None) -> Tensor:
    """[D], the sum of the blocks' rows over all ranks, divided by ``count``."""
    sums = [scope.total(x.sum(0, dtype=accumulator(x))) for x in blocks if x is not None]
    return torch.stack(sums).sum(0) / count


def _less_excluded(found: Diagnostics, pairs: int, row_ids: Tensor, col_ids: Tensor) -> Diagnostics:
    """Uniformity over the pairs that the ids leave."""
    ordered = col_ids.sort().values
    ends = (torch.searchsorted(ordered, row_ids, right=right) for right in (True, False))
    excluded = (next(ends) - next(ends)).sum()
    share = (1 - excluded / pairs).to(found.uniformity.dtype)
    return found._replace(uniformity=found.uniformity - share.log())


class InfoNCELoss(ContrastiveLoss):
    """The module form of :func:`info_nce`.

    Args:
        temperature: as :func:`info_nce` (default 0.07); a tensor or ``nn.Parameter`` moves with the module.
        label_smoothing, tau_plus, symmetric, normalize, gather_distributed, strategy, diagnostics: as :func:`info_nce`.

    Shapes:
        ``q`` [M, D], ``k`` [N, D], and the tensors of :func:`info_nce` by name; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> criterion = sslfast.InfoNCELoss(temperature=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4), negatives=-torch.eye(4)).item(), 4)
        0.6045
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        label_smoothing: float = 0.0,
        tau_plus: float = 0.0,
        symmetric: bool = False,
        normalize: bool = True,
        gather_distributed: bool = False,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed, strategy, diagnostics)
        self.label_smoothing = label_smoothing
        self.tau_plus = tau_plus
        self.symmetric = symmetric
        self.normalize = normalize

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        positives: Tensor | None = None,
        negatives: Tensor | None = None,
        hard_negatives: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of M queries against N keys."""
        return info_nce(
            q,
            k,
            self.temperature,
            positives=positives,
            negatives=negatives,
            hard_negatives=hard_negatives,
            row_ids=row_ids,
            col_ids=col_ids,
            label_smoothing=self.label_smoothing,
            tau_plus=self.tau_plus,
            symmetric=self.symmetric,
            normalize=self.normalize,
            **self.shared(),
        )
