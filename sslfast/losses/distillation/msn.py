"""MSN and PMSN: masked views predict the assignment of the whole image, and all prototypes are used as a prior says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..._checks import FLOATS, accumulator, check_matrix, real_number, whole_number
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.l2_normalize import l2_normalize
from ...ops.mean_assignment import mean_assignment
from ...ops.sinkhorn import assigned, check_number
from .._inputs import check_fits, check_gather, in_one_dtype
from .diagnostics import Diagnosed, PrototypeDiagnostics, prototype_diagnostics, with_diagnostics

Prior = Callable[[Tensor], Tensor]  # the regulariser, a function of the mean assignment
Distribution = Tensor | Callable[[Tensor], Tensor]


class MSNOptions(NamedTuple):
    """Of :func:`msn`, with its defaults."""

    temperature: float = 0.1
    target_sharpen_temperature: float = 0.25
    sinkhorn_iterations: int = 3
    regularization_weight: float = 1.0
    entropy_weight: float = 0.0

    def checked(self, like: Tensor) -> MSNOptions:
        """With plain numbers; temperatures fit ``like``'s device."""
        check_number("temperature", self.temperature, like)
        check_number("target_sharpen_temperature", self.target_sharpen_temperature, like)
        return self._replace(
            sinkhorn_iterations=whole_number("sinkhorn_iterations", self.sinkhorn_iterations, 0),
            regularization_weight=real_number("regularization_weight", self.regularization_weight),
            entropy_weight=real_number("entropy_weight", self.entropy_weight),
        )


def msn(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    target_sharpen_temperature: float = 0.25,
    sinkhorn_iterations: int = 3,
    regularization_weight: float = 1.0,
    entropy_weight: float = 0.0,
    gather_distributed: bool = False,
) -> Tensor:
    """Cross entropy of anchors' assignments to prototypes against their targets', and me-max: a mean that is spread.

        p_n = softmax_k(â_n·ĉ_k/τ),   t_b = softmax_k(ẑ_b·ĉ_k/(τ·T)), then Sinkhorn's iterations
        loss = mean_n [−Σ_k t_bk ln p_nk] + λ(ln K − H(p̄)) + μ mean_n H(p_n),      b = n mod B,   p̄ = mean_n p_n

    All rows are normalised inside. One product makes the anchors' logits; they are read once for all three terms, and
    once backward. In the log domain nothing becomes infinite, where the probabilities of upstream's
    ``log(p ** −t)`` do at ``p = 0`` (in 16 bits often).

    Args:
        anchors: [V·B, D], V masked views of B images, view after view; float32, float64, bfloat16 or float16.
        targets: [B, D], the teacher's embeddings of the images; no gradient.
        prototypes: [K, D]; learn through the anchors' side alone.
        temperature: τ (default 0.1).
        target_sharpen_temperature: T (default 0.25), which sharpens the targets: ``t ∝ softmax(·/τ)^(1/T)``.
        sinkhorn_iterations: of :func:`sinkhorn` with ``start="rows"`` on the targets; 0: none (default 3).
        regularization_weight: λ of me-max (default 1).
        entropy_weight: μ of the rows' mean entropy, which makes each assignment certain (default 0).
        gather_distributed: targets are balanced over the rows of all ranks, and p̄ and the mean are those of all ranks'
            anchors: over them the mean of the losses, and of the gradients, is that of the global batch.
            ``False``: this rank's. (lightly's ``gather_distributed`` balances the targets alone.)

    Returns:
        [] float32 (float64 for float64 embeddings). Differentiable in anchors and prototypes, twice through the
        reference.

    Raises:
        TypeError, ValueError: an argument does not fit, the anchors are not a multiple of the targets, or a temperature
            is zero; it is named. Over ranks also where they disagree on K, D, the iterations or the weights.

    Source: Assran et al. 2022, "Masked Siamese Networks for Label-Efficient Learning", equation 1; value as
    facebookresearch/msn's ``init_msn_loss`` and lightly 1.6.0's ``MSNLoss``.

    Example:
        >>> x = torch.eye(4)
        >>> loss = sslfast.msn(x.repeat(2, 1), x, x, temperature=0.5)  # two anchor views; all prototypes used alike
        >>> round(loss.item(), 4)
        0.3428
    """
    options = MSNOptions(
        temperature, target_sharpen_temperature, sinkhorn_iterations, regularization_weight, entropy_weight
    )
    return msn_loss(anchors, targets, prototypes, options, mean_entropy, gather_distributed=gather_distributed)[0]


def pmsn(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    target_sharpen_temperature: float = 0.25,
    sinkhorn_iterations: int = 3,
    regularization_weight: float = 1.0,
    power_law_exponent: float = 0.25,
    target_distribution: Distribution | None = None,
    entropy_weight: float = 0.0,
    gather_distributed: bool = False,
) -> Tensor:
    """:func:`msn` with another prior q for the use of prototypes: λ KL(q ‖ p̄) in place of me-max.

        q_k ∝ k^(−α), k = 1 … K, or as given;      KL(q ‖ p̄) = Σ_k q_k (ln q_k − ln p̄_k)

    A prototype that no anchor has anything of (p̄_k below 1e-30, of float64 1e-300) counts as having so much.

    Args:
        anchors, targets, prototypes, temperature, target_sharpen_temperature, sinkhorn_iterations,
        regularization_weight, entropy_weight, gather_distributed: as :func:`msn`.
        power_law_exponent: α (default 0.25); 0 for a uniform q.
        target_distribution: q in place of the power law: a tensor [K] that sums to 1, or a function that makes one of
            p̄ [K].

    Returns:
        As :func:`msn`.

    Raises:
        As :func:`msn`; also where q is not a floating-point tensor [K] on the embeddings' device.

    Source: Assran et al. 2022, "The Hidden Uniform Cluster Prior in Self-Supervised Learning"; value as
    lightly 1.6.0's ``PMSNLoss`` and ``PMSNCustomLoss``.

    Example:
        >>> x = torch.eye(4)
        >>> uniform = sslfast.pmsn(x, x, x, temperature=0.5, power_law_exponent=0.0)
        >>> round(uniform.item(), 4)
        0.3428
        >>> q = torch.tensor([0.7, 0.1, 0.1, 0.1])
        >>> round(sslfast.pmsn(x, x, x, temperature=0.5, target_distribution=q).item(), 4)
        0.7886
    """
    options = MSNOptions(
        temperature, target_sharpen_temperature, sinkhorn_iterations, regularization_weight, entropy_weight
    )
    prior = prior_of(power_law_exponent, target_distribution)
    return msn_loss(anchors, targets, prototypes, options, prior, gather_distributed=gather_distributed)[0]


# ---------------------------------------------------------------------------------------------------------- the priors


def floored(mean: Tensor) -> Tensor:
    """p̄ with a smallest number, the reciprocal of which can be divided by any temperature."""
    return mean.clamp_min(torch.finfo(mean.dtype).tiny * 1e8)


def mean_entropy(mean: Tensor) -> Tensor:
    """Me-max: ln K − H(p̄)."""
    p = floored(mean)
    return (p * p.log()).sum() + math.log(len(p))


def prior_of(power_law_exponent: float, distribution: Distribution | None) -> Prior:
    """KL(q ‖ p̄) of the power law, or of a distribution that is given."""
    exponent = real_number("power_law_exponent", power_law_exponent)
    if distribution is not None and not isinstance(distribution, Tensor) and not callable(distribution):
        raise TypeError(f"target_distribution must be a tensor or a function, got {type(distribution).__name__}")

    def divergence(mean: Tensor) -> Tensor:
        if distribution is None:
            q = torch.arange(1, len(mean) + 1, dtype=mean.dtype, device=mean.device) ** -exponent
            q = q / q.sum()
        else:
            q = distribution if isinstance(distribution, Tensor) else distribution(mean)
            _check_distribution(q, mean)
            q = q.to(mean.dtype)
        return (torch.xlogy(q, q) - q * floored(mean).log()).sum()

    return divergence


def _check_distribution(q: Tensor, mean: Tensor) -> None:
    if not isinstance(q, Tensor) or q.dtype not in FLOATS:
        raise TypeError(f"target_distribution must be a floating-point tensor, got {getattr(q, 'dtype', type(q))}")
    if q.shape != mean.shape:
        raise ValueError(f"target_distribution must have shape ({len(mean)},), got {tuple(q.shape)}")
    if q.device != mean.device:
        raise ValueError(f"target_distribution must be on the embeddings' device {mean.device}, got {q.device}")


# ------------------------------------------------------------------------------------------------------------ the loss


@over_ranks()
def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    options: MSNOptions,
    prior: Prior,
    *,
    gather_distributed: bool,
    targets_alone: bool = False,
    diagnostics: bool = False,
) -> Diagnosed:
    """The loss with any prior. ``targets_alone``: only they are balanced over the ranks, as lightly does."""
    a, z, c = _checked(anchors, targets, prototypes)
    options = options.checked(a)
    scope = scope_of(gather_distributed)
    of_anchors = Scope() if targets_alone else scope
    shard = of_anchors.shard(
        a,
        {
            "the number of prototypes": len(c),
            "sinkhorn_iterations": options.sinkhorn_iterations,
            "regularization_weight": options.regularization_weight,
        },
    )
    sharp = options.temperature * options.target_sharpen_temperature
    c = l2_normalize(c)
    with torch.no_grad():
        teacher = (l2_normalize(z) @ c.detach().T).unsqueeze(1)  # [B, 1, K]
        if options.sinkhorn_iterations:
            bias = scope.sinkhorn_bias(teacher, sharp, options.sinkhorn_iterations, row_start=True)
        else:
            bias = teacher.new_zeros(teacher.shape[1:], dtype=accumulator(teacher))
        target = assigned(teacher, bias, sharp).squeeze(1)
    sums, cross_entropy, entropy = mean_assignment(l2_normalize(a) @ c.T, target, None, options.temperature)
    loss = cross_entropy.sum() * shard.weight
    found = prototype_diagnostics(loss, [teacher.transpose(0, 1)], bias[None], sharp) if diagnostics else None
    if options.regularization_weight:
        loss = loss + options.regularization_weight * prior(of_anchors.total(sums) / shard.total)
    if options.entropy_weight:
        loss = loss + options.entropy_weight * shard.weight * entropy.sum()
    return loss, found


def _checked(anchors: Tensor, targets: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype, targets without gradient."""
    for name, x in (("anchors", anchors), ("targets", targets), ("prototypes", prototypes)):
        check_matrix(name, x)
    a, z, c = in_one_dtype(anchors, targets.detach(), prototypes)
    assert a is not None and z is not None and c is not None
    check_fits("targets", z, "anchors", a)
    check_fits("prototypes", c, "anchors", a)
    if len(a) % len(z):
        raise ValueError(f"anchors must be a whole number of views of the {len(z)} targets, got {len(a)} rows")
    return a, z, c


class MSNLoss(nn.Module):
    """:func:`msn` with its options kept: the constructor and ``forward`` of lightly 1.6.0's ``MSNLoss``.

    Args:
        temperature, sinkhorn_iterations, regularization_weight, gather_distributed, entropy_weight: as :func:`msn`
            (defaults 0.1, 3, 1, ``False``, 0).
        diagnostics: return :class:`PrototypeDiagnostics` of the cross entropy and the targets beside the loss.

    Shapes:
        ``anchors``: [V·B, D]; ``targets``: [B, D]; ``prototypes``: [K, D]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`msn`, when called.

    Example:
        >>> criterion = sslfast.MSNLoss(temperature=0.5)
        >>> round(criterion(torch.eye(4), torch.eye(4), torch.eye(4)).item(), 4)
        0.3428
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
        *,
        entropy_weight: float = 0.0,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.regularization_weight = regularization_weight
        self.gather_distributed = gather_distributed
        self.entropy_weight = entropy_weight
        self.diagnostics = diagnostics

    def prior(self) -> Prior:
        """The regulariser, a function of the mean assignment."""
        return mean_entropy

    def forward(
        self, anchors: Tensor, targets: Tensor, prototypes: Tensor, target_sharpen_temperature: float = 0.25
    ) -> Tensor | tuple[Tensor, PrototypeDiagnostics]:
        """The loss of embeddings; ``target_sharpen_temperature``: T of :func:`msn`."""
        options = MSNOptions(
            self.temperature,
            target_sharpen_temperature,
            self.sinkhorn_iterations,
            self.regularization_weight,
            self.entropy_weight,
        )
        return with_diagnostics(
            msn_loss(
                anchors,
                targets,
                prototypes,
                options,
                self.prior(),
                gather_distributed=self.gather_distributed,
                diagnostics=self.diagnostics,
            )
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, sinkhorn_iterations={self.sinkhorn_iterations}, "
            f"regularization_weight={self.regularization_weight}, entropy_weight={self.entropy_weight}, "
            f"gather_distributed={self.gather_distributed}"
        )


class PMSNLoss(MSNLoss):
    """:func:`pmsn` with its options kept: the constructor and ``forward`` of lightly 1.6.0's ``PMSNLoss``.

    Args:
        temperature, sinkhorn_iterations, regularization_weight, power_law_exponent, gather_distributed,
        target_distribution, entropy_weight: as :func:`pmsn` (defaults 0.1, 3, 1, 0.25, ``False``, ``None``, 0). A
            tensor moves with the module, and is no part of its ``state_dict``.
        diagnostics: as :class:`MSNLoss`.

    Shapes:
        As :class:`MSNLoss`.

    Raises:
        As :func:`pmsn`.

    Example:
        >>> criterion = sslfast.PMSNLoss(temperature=0.5, target_distribution=torch.full((4,), 0.25))
        >>> round(criterion(torch.eye(4), torch.eye(4), torch.eye(4)).item(), 4)
        0.3428
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        power_law_exponent: float = 0.25,
        gather_distributed: bool = False,
        *,
        target_distribution: Distribution | None = None,
        entropy_weight: float = 0.0,
        diagnostics: bool = False,
    ) -> None:
        super().__init__(
            temperature,
            sinkhorn_iterations,
            regularization_weight,
            gather_distributed,
            entropy_weight=entropy_weight,
            diagnostics=diagnostics,
        )
        prior_of(power_law_exponent, target_distribution)  # which checks them
        self.power_law_exponent = power_law_exponent
        if isinstance(target_distribution, Tensor):
            self.register_buffer("target_distribution", target_distribution, persistent=False)
        else:
            self.target_distribution = target_distribution

    def prior(self) -> Prior:
        """KL(q ‖ p̄)."""
        return prior_of(self.power_law_exponent, self.target_distribution)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, power_law_exponent={self.power_law_exponent}"
