"""InfoNCE: queries against the batch's keys, with extra negatives; smoothed, debiased, or of rows and columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import accumulator
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope, Shard
from ...ops.types import Pairs, SimilarityTerms, Want
from ._info_nce_inputs import Formula, Inputs, Negatives, check_diagnostics, checked
from ._inputs import ContrastiveLoss, inverse, row_dots, softplus
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of, excluded_pairs, with_diagnostics


@over_ranks()
def info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    positives: Tensor | None = None,
    negatives: Negatives | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """InfoNCE of queries against keys, mean over the M queries; the M × N matrix is never stored.

        ℓ_i = log Σ_{j ∈ C(i)} exp(s_ij) − (1/|P(i)|) Σ_{p ∈ P(i)} s_ip,        s_ij = q_i·k_j / τ

    ``C(i)`` holds all keys and all negatives of row ``i``; every positive stays in it. Variants are
    :func:`smoothed_info_nce`, :func:`debiased_info_nce` and :func:`symmetric_info_nce`, their combinations
    :class:`InfoNCELoss`; which of them is which package's loss is in ``docs/info_nce.md``.

    Args:
        q, k: [M, D], [N, D]; float32, float64, bfloat16 or float16.
        temperature: τ, finite and not zero (default 0.07); or a one-element tensor, which receives its gradient.
        positives: [M] or [M, P] integers, rows of (this rank's) ``k``; −1 for none. Default: row ``i`` of q has row
            ``i`` of k. With several the loss is the mean over them (SupCon's L_out); a row with none adds 0 to the sum.
        negatives: [K, D], more columns for every row; or [M, H, D], row ``i``'s own; or one of each. Without gradient
            if they want none.
        ids: ``(row_ids, col_ids)``, [M] and [N] integers, one numbering over all ranks: pairs of q and k with equal ids
            leave the denominator (a positive's own logit is still subtracted).
        normalize: divide each row by its norm first (default).
        gather_distributed: contrast with the keys and the shared negatives of all ranks; ``False``: this rank's. All
            ranks must pass the same kinds of arguments.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch.

    Raises:
        TypeError, ValueError: shapes, widths, dtypes or devices do not fit, the temperature is zero or not finite.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", equation 4.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> round(sslfast.info_nce(q, k, temperature=0.5).item(), 4)
        0.3408
        >>> several = torch.tensor([[0, 1], [1, -1], [2, -1], [3, -1]])  # rows of k; row 0 of q has two
        >>> round(sslfast.info_nce(q, k, temperature=0.5, positives=several).item(), 4)
        0.5908
    """
    inputs = checked(q, k, positives, negatives, ids, normalize=normalize)
    return diagnosed_info_nce(inputs, temperature, Formula(), scope_of(gather_distributed, strategy))[0]


@over_ranks()
def smoothed_info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    label_smoothing: float = 0.1,
    *,
    positives: Tensor | None = None,
    negatives: Negatives | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """:func:`info_nce` whose target is 1 − ε on the positives and ε spread evenly over ``C(i)``.

    Args:
        label_smoothing: ε in [0, 1), as in ``F.cross_entropy`` (default 0.1).
        The others, the result and the errors are those of :func:`info_nce`.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> round(sslfast.smoothed_info_nce(q, k, temperature=0.5, label_smoothing=0.2).item(), 4)
        0.6408
    """
    inputs = checked(q, k, positives, negatives, normalize=normalize)
    scope = scope_of(gather_distributed, strategy)
    return diagnosed_info_nce(inputs, temperature, Formula(label_smoothing=label_smoothing), scope)[0]


@over_ranks()
def debiased_info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
    *,
    positives: Tensor | None = None,
    negatives: Negatives | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """:func:`info_nce` with the sum of the negatives corrected for the positives among them.

    It becomes ``max((Σ_{j≠p} e^{s_ij} − n τ⁺ e^{s_ip}) / (1 − τ⁺), n e^{−1/|τ|})`` with ``n = |C(i)| − 1``.

    Args:
        temperature: τ (default 0.5).
        tau_plus: τ⁺ in [0, 1), the probability that a negative is a positive (default 0.1).
        positives: [M], one a row.
        The others, the result and the errors are those of :func:`info_nce`.

    Source: Chuang et al. 2020, "Debiased Contrastive Learning", equations 7 and 8 with one positive sample.

    Example:
        >>> q, k = torch.eye(4), torch.eye(4)
        >>> round(sslfast.debiased_info_nce(q, k, temperature=0.5, tau_plus=0.1).item(), 4)
        0.1113
    """
    inputs = checked(q, k, positives, negatives, normalize=normalize)
    scope = scope_of(gather_distributed, strategy)
    return diagnosed_info_nce(inputs, temperature, Formula(tau_plus=tau_plus), scope)[0]


@over_ranks()
def symmetric_info_nce(
    q: Tensor,
    k: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    label_smoothing: float = 0.0,
    tau_plus: float = 0.0,
    ids: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """The mean of :func:`info_nce` of rows against columns and of columns against rows, from one pass.

    :func:`clip` is this loss of rows as they are, with a scale in place of the temperature.

    Args:
        q, k: [N, D] each, row ``i`` of both a pair.
        label_smoothing, tau_plus: as :func:`smoothed_info_nce` and :func:`debiased_info_nce` (default 0: neither).
        The others, the result and the errors are those of :func:`info_nce`.

    Source: memeff's ``MemoryEfficientCLIPLoss`` has the same three; see also :func:`clip`.

    Example:
        >>> round(sslfast.symmetric_info_nce(torch.eye(4), torch.eye(4), temperature=0.5).item(), 4)
        0.3408
    """
    inputs = checked(q, k, ids=ids, normalize=normalize)
    formula = Formula(label_smoothing, tau_plus, symmetric=True)
    return diagnosed_info_nce(inputs, temperature, formula, scope_of(gather_distributed, strategy))[0]


@over_ranks("temperature")
def diagnosed_info_nce(
    x: Inputs, temperature: float | Tensor, formula: Formula, scope: Scope, diagnostics: bool = False
) -> Diagnosed:
    formula.check(x)
    if diagnostics:
        check_diagnostics(x)
    scale = inverse(temperature, x.q)
    rows, keys = scope.shard(x.q), scope.shard(x.k)
    columns = _positive_columns(x, rows, keys)  # [M]
    pairs = Pairs(x.q, x.k, scale, None, x.row_ids, x.col_ids, columns)
    # The negatives alone: taking e^{s_ip} out of a sum that it dominates would lose them.
    if formula.tau_plus:
        pairs = pairs._replace(row_ids=columns, col_ids=keys.ids(x.q.device))
    terms = scope.terms(pairs, Want(formula.symmetric, diagnostics))
    row_lse, hardest, own_sum = _with_extra_negatives(terms, x, scale, scope)
    assert terms.positive is not None
    positive = terms.positive if x.positives is None else _mean_positive(terms.positive, x.positives, x, scale)
    count = keys.total  # |C(i)|
    if x.shared is not None:
        count += scope.shard(x.shared).total
    if x.own is not None:
        count += x.own.shape[1]

    def each(lse: Tensor, q: Tensor, mean_key: Tensor | None, own_mean: Tensor | float) -> Tensor:
        ell = _debiased(lse, positive, scale, formula.tau_plus, count - 1) if formula.tau_plus else lse - positive
        if mean_key is None:
            return ell
        return ell + formula.label_smoothing * (positive - scale * (q * mean_key).sum(1) - own_mean)

    smooth = formula.label_smoothing > 0
    mean_key = _mean_row(scope, count, x.k, x.shared) if smooth else None
    ell = each(row_lse, x.q, mean_key, own_sum / count)  # [M]
    if x.positives is not None:
        ell = ell.masked_fill((x.positives < 0).all(1), 0.0)
    if formula.symmetric:
        assert terms.col_lse is not None
        mean_query = _mean_row(scope, count, x.q) if smooth else None
        ell = (ell + each(terms.col_lse, x.k, mean_query, 0.0)) / 2
    loss = rows.weight * ell.sum()
    if not diagnostics:
        return loss, None
    whole = torch.logaddexp(row_lse, positive) if formula.tau_plus else row_lse
    in_sums: int | Tensor = rows.local * count
    if x.row_ids is not None and x.col_ids is not None:
        in_sums = in_sums - excluded_pairs(x.row_ids, scope.gather(x.col_ids))
    return loss, diagnostics_of(SimilarityTerms(whole, None, positive, hardest), scale, in_sums)


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
    if x.shared is not None:
        pairs = Pairs(x.q, x.shared, scale)
        shared = scope.terms(pairs)
        row_lse = torch.logaddexp(row_lse, shared.row_lse)
        if hardest is not None:
            with torch.no_grad():  # a pass of its own: the one with a gradient may not hold on to a queue
                hardest_shared = scope.terms(pairs, Want(hardest=True)).hardest
            assert hardest_shared is not None
            hardest = torch.maximum(hardest, hardest_shared)
    if x.own is None:
        return row_lse, hardest, hard_sum
    own = scale * row_dots(x.q, x.own)  # [M, H]
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


class InfoNCELoss(ContrastiveLoss):
    """The module form of :func:`info_nce`, and of its variants in any combination.

    Args:
        temperature: as :func:`info_nce` (default 0.07); a tensor or ``nn.Parameter`` moves with the module.
        label_smoothing: as :func:`smoothed_info_nce` (default 0: none).
        tau_plus: as :func:`debiased_info_nce` (default 0: not debiased).
        symmetric: as :func:`symmetric_info_nce` (default: rows alone).
        normalize, gather_distributed, strategy: as :func:`info_nce`.
        diagnostics: return ``(loss, Diagnostics)``, of the rows. Needs one positive in every row.

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

    @over_ranks()
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        *,
        positives: Tensor | None = None,
        negatives: Negatives | None = None,
        ids: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of M queries against N keys."""
        inputs = checked(q, k, positives, negatives, ids, normalize=self.normalize)
        formula = Formula(self.label_smoothing, self.tau_plus, self.symmetric)
        return with_diagnostics(diagnosed_info_nce(inputs, self.temperature, formula, self.scope(), self.diagnostics))
