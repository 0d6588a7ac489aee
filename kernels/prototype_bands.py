"""prototype_cross_entropy by the library's products: a band of samples at a time, with an epilogue on stored logits.

    s = h wᵀ,   t = g uᵀ                    of all views of the band's samples, float32
    Σ weight·H and its gradient ds          distillation_cross_entropy: s and t are read once each way
    dh = ds w,   dw += dsᵀ h                ds in the features' dtype

A row's softmax is its own, so a band gives its part of every gradient at once: four products where streaming needs
eight, and each logit passes through memory. A band has at most ``BAND_BYTES``, or one sample.

The cost model of ``_gradient_forms.py``, for each logit of the student, with ρ views of the teacher for one of its:

    streamed: 4·(1 + ρ)·2·D / STREAMED_SHARE                  log-sum-exp, and attention with its gradient
    banded:   (3 + ρ)·2·D / BANDED_SHARE  +  (bytes of s and ds + ρ·bytes of t)·BALANCE
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends
from ._common import architecture
from ._configs import SIMILARITY_OWNER, config_for
from ._gradient_forms import BALANCE, BAND_BYTES, BANDED_SHARE, STREAMED_SHARE, product

# A float32 logit is written, read forward and read backward, the teacher's twice forward; its gradient is written,
# copied to 16 bits, and read by both products.
STUDENT_BYTES = {2: 4 + 4 + 4 + 4 + (4 + 2) + 2 * 2, 4: 4 + 4 + 4 + 4 + 2 * 4}
TEACHER_BYTES = 4 + 2 * 4 + 4


def costs(features: int, itemsize: int, ratio: float, block_k: int) -> dict[str, float]:
    """The cost model's operations for one logit of the student by each form; ``ratio``: ρ."""
    step = 2.0 * features
    traffic = (STUDENT_BYTES[itemsize] + ratio * TEACHER_BYTES) * BALANCE[itemsize]
    return {
        "streamed": 4 * (1 + ratio) * step / STREAMED_SHARE[itemsize, features <= block_k],
        "banded": (3 + ratio) * step / BANDED_SHARE[itemsize] + traffic,
    }


def form(student: Tensor, teacher: Tensor) -> str:
    """The form that is forced, or the cheaper one by :func:`costs`, for views [V, B, D] of both."""
    forced = _backends.forced_gradient_form()
    if forced is not None:
        return forced
    features, itemsize = student.shape[2], student.element_size()
    config = config_for(SIMILARITY_OWNER, architecture(student), itemsize, features)
    found = costs(features, itemsize, teacher.shape[0] / student.shape[0], config.block_k)
    return min(found, key=found.__getitem__)


def prototype_bands(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    temperatures: tuple[float, float],
    ignore_diagonal: bool,
    need_student: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``Σ_b weight_b Σ_(t,s) H_b``, over all pairs of views or those with t ≠ s, and its gradients dh and dw, float32.

    Args:
        student, teacher: [V_s, B, D], [V_t, B, D].
        prototypes, teacher_prototypes: [K, D], of the same dtype.
        bias: [K] float32. weights: [B] float32.
        temperatures: (τs, τt).
    """
    (views, samples, d), targets, k = student.shape, len(teacher), len(prototypes)
    options = (*temperatures, ignore_diagonal, False, None, None)
    level = None if bias is None else bias.view(1, 1, k)
    # Of float16 all bits are used: differences of softmaxes are at most 1, times a weight, the teachers and 1/τ.
    unit: Any = 1.0
    if student.dtype == torch.float16:
        largest = weights.abs().amax().clamp(min=1e-30)
        unit = 2.0**14 * abs(temperatures[0]) / (targets * largest)
    band = max(1, BAND_BYTES // (4 * k * (2 * views + targets) + 2 * k * views))
    loss = weights.new_zeros(())
    dh = student.new_empty(student.shape, dtype=torch.float32) if need_student else None
    dw = prototypes.new_empty(prototypes.shape, dtype=torch.float32) if need_prototypes else None
    for first in range(0, samples, band):
        some = slice(first, min(first + band, samples))
        h, g = (x[:, some].reshape(-1, d) for x in (student, teacher))
        s, t = (x.new_empty((len(x), k), dtype=torch.float32) for x in (h, g))
        product(s, h, prototypes.T)
        product(t, g, teacher_prototypes.T)
        logits = [s.view(views, -1, k)], [t.view(targets, -1, k)]
        of_row, *statistics = torch.ops.sslfast.distillation_cross_entropy(*logits, level, *options)
        loss = loss + torch.dot(of_row, weights[some])
        if dh is None and dw is None:
            continue
        (ds,) = torch.ops.sslfast.distillation_cross_entropy_backward(
            weights[some] * unit, *logits, level, *statistics, *options
        )
        ds = ds.view(-1, k).to(student.dtype)
        if dh is not None:
            part = h.new_empty(h.shape, dtype=torch.float32)
            product(part, ds, prototypes)
            dh[:, some] = part.view(views, -1, d)
        if dw is not None:
            product(dw, ds.T, h, add=first > 0)
    if student.dtype == torch.float16:
        dh, dw = (None if x is None else x.div_(unit) for x in (dh, dw))
    return loss, dh, dw
