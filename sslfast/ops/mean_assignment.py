"""The mean of rows' softmaxes over prototypes, from stored logits, and in the same visit their cross entropy.

With ``p_n = softmax_k(x_n/τ)`` and targets t:

    sums = Σ_n w_n p_n    [K]           cross entropy = −Σ_k t_nk ln p_nk,   entropy = −Σ_k p_nk ln p_nk    [B] each
    dx_n = 1/τ · (w_n p_n ⊙ (v − <p_n, v>) + g_n (Σ_k t_nk p_n − t_n) − h_n p_n ⊙ (ln p_n + entropy_n))

for v, g and h, the gradients of the three. The logits are read once each way, and a gradient is written once. Saved:
four numbers for each row. Targets and weights get no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import accumulator, without_autocast
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "mean_assignment", "logits")
_STATS = 4


def _forward_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, prototypes = logits.shape
    like = functools.partial(logits.new_empty, dtype=accumulator(logits))
    return like(prototypes), like(batch), like(batch), like((batch, _STATS))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, weights, ctx.temperature, rows = inputs
    ctx.save_for_backward(logits, targets, weights, output[3], rows)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 4
    given = grads[:3]
    if all(grad is None for grad in given):
        return None, *nothing
    logits, targets, weights, stats, rows = ctx.saved_tensors
    if torch.is_grad_enabled() and (logits.requires_grad or any(g is not None and g.requires_grad for g in given)):

        def function(x: Tensor) -> tuple[Tensor, ...]:
            found = by_reference(x, targets, weights, ctx.temperature, rows)
            return tuple(out for out, grad in zip(found, given, strict=True) if grad is not None)

        return *_library.second_order(function, [logits], [True], [g for g in given if g is not None]), *nothing
    found = torch.ops.sslfast.mean_assignment_backward(*given, logits, targets, weights, stats, ctx.temperature, rows)
    return found, *nothing


_GIVEN = "Tensor logits, Tensor? targets, Tensor? weights"
_library.define(
    f"mean_assignment({_GIVEN}, float temperature, Tensor? rows)"
    " -> (Tensor sums, Tensor cross_entropy, Tensor entropy, Tensor stats)",
    _forward_fake,
)
_library.define(
    "mean_assignment_backward(Tensor? grad_sums, Tensor? grad_cross_entropy, Tensor? grad_entropy,"
    f" {_GIVEN}, Tensor stats, float temperature, Tensor? rows) -> Tensor",
    lambda sums, cross_entropy, entropy, logits, *_: logits.new_empty(logits.shape),
)
_library.autograd("mean_assignment", _backward, _setup_context)


def by_reference(
    logits: Tensor, targets: Tensor | None, weights: Tensor | None, temperature: float, rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference with the kernels' precision, also inside an autocast region."""
    with without_autocast(logits):
        return reference.mean_assignment(logits.to(accumulator(logits)), targets, weights, temperature, rows)


def mean_assignment(
    logits: Tensor,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 0.1,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(sums, cross_entropy, entropy)`` of checked logits, float32 (float64 for float64 logits).

    Args:
        logits: [B, K].
        targets: t, [R, K] in the accumulator's dtype; row n has row n mod R, and need not sum to 1. Without them the
            cross entropy is 0.
        weights: w, [B] in the accumulator's dtype, of the rows in the sums; default 1.
        temperature: τ.
        rows: [] int64, how many of the first rows count; the others give 0.

    Returns:
        The sums Σ_n w_n p_n [K], each row's cross entropy [B], each row's entropy [B].
    """
    if _backends.serve("mean_assignment", logits, "cuda", why_not) == "reference":
        return by_reference(logits, targets, weights, temperature, rows)
    sums, cross_entropy, entropy, _ = _library.run("mean_assignment", logits, targets, weights, temperature, rows)
    return sums, cross_entropy, entropy
