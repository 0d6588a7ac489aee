"""The loss of predicted features against a teacher's at masked positions, gathered and normalised row by row.

    loss = mean ℓ(pred[s, b, k] − LN(teacher[b, ids[s, b, k]])),      dpred = g/count · ℓ'(…)

Neither the normalised teacher [B, L, D] nor its gathered rows [S, B, K, D] are stored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import FLOATS, accumulator, ids_checked, real_number, without_autocast
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
LOSSES = ("smooth_l1", "mse")
SQUARED, ABSOLUTE, SMOOTH = 0, 1, 2  # enum LossKind of csrc/common/patch_target.h
LARGEST_ON_CUDA = 46 << 10  # bytes of a teacher's row in shared memory


def _forward_fake(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty((), dtype=accumulator(pred))


def _backward_fake(grad_loss: Tensor, pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, teacher, ids, *ctx.options = inputs
    ctx.save_for_backward(pred, teacher, ids)


def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if not ctx.needs_input_grad[0]:
        return nothing
    pred, teacher, ids = ctx.saved_tensors
    if torch.is_grad_enabled() and (pred.requires_grad or grad_loss.requires_grad):

        def function(pred: Tensor) -> Tensor:
            return by_reference(pred, teacher, ids, *ctx.options)

        (dpred,) = _library.second_order(function, (pred,), (True,), grad_loss)
    else:
        dpred = torch.ops.sslfast.masked_feature_loss_backward(grad_loss, pred, teacher, ids, *ctx.options)
    return (dpred, *nothing[1:])


_ARGUMENTS = "Tensor pred, Tensor teacher, Tensor ids, int kind, float beta, bool layer_norm, float eps"
_library.define(f"masked_feature_loss({_ARGUMENTS}) -> Tensor", _forward_fake)
_library.define(f"masked_feature_loss_backward(Tensor grad_loss, {_ARGUMENTS}) -> Tensor", _backward_fake)
_library.autograd("masked_feature_loss", _backward, _setup_context)


def by_reference(
    pred: Tensor, teacher: Tensor, ids: Tensor, kind: int, beta: float, layer_norm: bool, eps: float
) -> Tensor:
    """The reference with the kernels' precision, also inside an autocast region."""
    wide = accumulator(pred)
    name = "mse" if kind == SQUARED else "smooth_l1"
    with without_autocast(pred):
        given = eps if layer_norm else None
        return reference.masked_feature_loss(pred.to(wide), teacher.to(wide), ids, name, beta, given)


def why_not(backend: str, pred: Tensor) -> str | None:
    """The reason ``backend`` cannot serve ``pred``, or ``None`` if it can."""
    if backend == "cuda" and pred.is_cuda and pred.shape[-1] * accumulator(pred).itemsize > LARGEST_ON_CUDA:
        return f"a row of {pred.shape[-1]} features does not fit the shared memory of a block"
    return _devices.why_not("masked_feature_loss", "pred", backend, pred)


def masked_feature_loss(
    pred: Tensor,
    teacher: Tensor,
    ids: Tensor,
    *,
    loss: str = "smooth_l1",
    beta: float = 1.0,
    layer_norm: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    """Mean loss of predicted features against the teacher's at the given positions, layer-normalised first.

    Args:
        pred: [S, B, K, D], the predictions for S masks of each of B images; or [S·B, K, D], mask by mask, as I-JEPA
            concatenates them; or [B, K, D] for one mask. float32, float64, bfloat16 or float16; any strides.
        teacher: [B, L, D], any of these dtypes; receives no gradient. A slice of rows is read where it lies.
        ids: [S, B, K] or [B, K] int64, positions 0 to L − 1. Checked on the CPU, and on a GPU with
            ``SSLFAST_CHECK_IDS=1``; elsewhere one out of range gives NaN.
        loss: "smooth_l1" (default; ``d²/(2·beta)`` up to ``|d| = beta``, then ``|d| − beta/2``) or "mse".
        beta: of the smooth L1 loss (default 1); 0 makes it the L1 loss.
        layer_norm: normalise each of the teacher's rows over its D features, without scale and shift (default).
        eps: added to the variance (default 1e-5).

    Returns:
        [], the mean over all S·B·K·D differences; float32 (float64 for float64 ``pred``). Differentiable in ``pred``,
        twice through the reference. Without a position it is NaN, as the mean of nothing.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit; it is named.

    Source: Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
    and the training loop of facebookresearch/ijepa; V-JEPA's L1 is ``beta=0``.

    Example:
        >>> pred, teacher = torch.zeros(2, 2, 8), torch.ones(2, 4, 8)
        >>> ids = torch.tensor([[0, 2], [1, 3]])
        >>> sslfast.masked_feature_loss(pred, teacher, ids, layer_norm=False).item()
        0.5
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    beta, eps = real_number("beta", beta), real_number("eps", eps)
    for name, value in (("beta", beta), ("eps", eps)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    pred, ids = _checked(pred, teacher, ids)
    teacher = teacher.detach()
    kind = SQUARED if loss == "mse" else SMOOTH if beta > 0 else ABSOLUTE
    backend = _backends.serve("masked_feature_loss", pred, "cuda", why_not)
    if backend == "reference":
        return by_reference(pred, teacher, ids, kind, beta, layer_norm, eps)
    result: Tensor = _library.run("masked_feature_loss", pred, teacher, ids, kind, beta, layer_norm, eps)
    return result


def _checked(pred: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``pred`` as [S·B, K, D] and ``ids`` as [S·B, K]."""
    for name, x in (("pred", pred), ("teacher", teacher), ("ids", ids)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if name != "ids" and x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.device != pred.device:
            raise ValueError(f"{name} must be on pred's device {pred.device}, got {x.device}")
    if teacher.dim() != 3 or 0 in teacher.shape[1:]:
        raise ValueError(f"teacher must be [B, L, D], L and D at least 1, got shape {tuple(teacher.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    batch, length, width = teacher.shape
    if ids.dim() not in (2, 3) or ids.shape[-2] != batch:
        raise ValueError(f"ids must be [{batch}, K] or [S, {batch}, K], got shape {tuple(ids.shape)}")
    flat = ids.flatten(0, -2)  # [S·B, K]
    wanted = {(*ids.shape, width), (*flat.shape, width)}
    if tuple(pred.shape) not in wanted:
        shapes = " or ".join(str(list(shape)) for shape in sorted(wanted, key=len, reverse=True))
        raise ValueError(f"pred must be {shapes} for these ids and this teacher, got {list(pred.shape)}")
    if ids.numel() and ids_checked(ids):
        low, high = (int(i) for i in torch.aminmax(ids))
        if low < 0 or high >= length:
            raise ValueError(f"ids must be positions of the teacher, 0 to {length - 1}, got {low} to {high}")
    return pred.flatten(0, -3), flat
