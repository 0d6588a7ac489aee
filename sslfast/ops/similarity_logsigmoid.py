"""The pairwise sigmoid loss (SigLIP) without the M × N matrix: value and gradient in one pass over the tiles.

    s_ij = scale·q_i·k_j + bias,   y_ij = +1 where row_id_i = col_id_j, else −1
    loss = −Σ_ij log σ(y_ij s_ij),   W_ij = d loss/d s_ij = −y_ij σ(−y_ij s_ij)
    dq = scale·W k,   dk = scale·Wᵀ q,   dscale = Σ_i q_i·(W k)_i,   dbias = Σ_ij W_ij

No normaliser couples the pairs, so the forward computes W as well and the backward only multiplies by the incoming
gradient: 3U in all (U = 2·M·N·D) on a CPU, nothing recomputed; on a GPU 3U in bands, and 4U for narrow rows, where
dq and dk are a launch each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, check_integers, check_keys, scalar_tensor

BACKENDS = ("cpu", "triton", "reference")


def _fake(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, row_ids: Tensor, col_ids: Tensor, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kind = accumulator(q)
    dq = q.new_empty(q.shape if need_q else (0,), dtype=kind)
    dk = q.new_empty(k.shape if need_k else (0,), dtype=kind)
    return q.new_empty((), dtype=kind), dq, dk, torch.empty_like(scale), torch.empty_like(bias)


def by_reference(
    q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor, row_ids: Tensor, col_ids: Tensor
) -> Tensor:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(q)
    with torch.autocast(q.device.type, enabled=False):
        return reference.similarity_logsigmoid(q.to(kind), k.to(kind), scale, bias, row_ids=row_ids, col_ids=col_ids)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    q, k, scale, bias, row_ids, col_ids, dq, dk, dscale, dbias = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (grad_loss, q, k, scale, bias)):

        def function(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return by_reference(q, k, scale, bias, row_ids, col_ids)

        found = _library.second_order(function, (q, k, scale, bias), needed, grad_loss)
        return (*found, None, None, None, None)
    return (
        (grad_loss * dq).to(q.dtype) if needed[0] else None,
        (grad_loss * dk).to(k.dtype) if needed[1] else None,
        grad_loss * dscale if needed[2] else None,
        grad_loss * dbias if needed[3] else None,
        None,
        None,
        None,
        None,
    )


for _name in ("similarity_logsigmoid", "similarity_logsigmoid_triton"):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor scale, Tensor bias, Tensor row_ids, Tensor col_ids, bool need_q,"
        " bool need_k) -> (Tensor loss, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
        _fake,
    )
    _library.autograd(_name, _backward, _setup_context)


def _triton(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_logsigmoid as kernel

    return kernel.similarity_logsigmoid(q.contiguous(), k.contiguous(), *rest)


_library.implement("similarity_logsigmoid_triton", _triton, "CUDA", "CPU")


def why_not(backend: str, q: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``q``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(q.device, "q")
    if backend == "triton":
        if q.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(q.device)
    return f"similarity_logsigmoid has no {backend} implementation"


def similarity_logsigmoid(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: float | Tensor = 0.0,
    *,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Tensor:
    """Sum of pairwise log-sigmoid losses, ``−Σ_ij log σ(y_ij·(scale·q_i·k_j + bias))``.

    ``y_ij`` is +1 where ``row_ids[i] == col_ids[j]`` (a positive pair) and −1 elsewhere. Time grows as M·N·D, extra
    memory as (M + N)·D: the M × N matrix is never stored.

    Args:
        q: [M, D]; k: [N, D]; float32, float64, bfloat16 or float16, any strides. Used as they are: normalise first.
        scale: multiplies the dot products; a float, or a one-element tensor, which receives its gradient.
        bias: added to every logit (default 0); a float, or a one-element tensor, which receives its gradient.
        row_ids, col_ids: [M] and [N] integers (default: the row's and column's number, so that row i and column i are
            the positive pair). Given together; several positives a row, or none, are fine.

    Returns:
        [] float32 (float64 for float64 inputs): the sum, not a mean. Differentiable in q, k, scale and bias; twice
        through the reference, with the matrix in memory.

    Raises:
        TypeError: dtypes differ or are not floating point, ids are not integers.
        ValueError: shapes, widths, devices or lengths do not fit; only one of row_ids and col_ids is given.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.

    Example:
        >>> loss = sslfast.similarity_logsigmoid(torch.zeros(2, 8), torch.zeros(2, 8), 1.0)
        >>> round(loss.item(), 4)  # 4 log 2
        2.7726
    """
    check_keys(q, k)
    if (row_ids is None) != (col_ids is None):
        raise ValueError("row_ids and col_ids must be given together: pairs with equal ids are the positives")
    if row_ids is None or col_ids is None:
        row_ids = torch.arange(q.shape[0], device=q.device)
        col_ids = torch.arange(k.shape[0], device=q.device)
    check_integers("row_ids", row_ids, q.shape[0], q.device)
    check_integers("col_ids", col_ids, k.shape[0], q.device)
    row_ids, col_ids = row_ids.long(), col_ids.long()
    scale, bias = scalar_tensor("scale", scale, q), scalar_tensor("bias", bias, q)
    backend = _backends.serve("similarity_logsigmoid", q, "triton", why_not)
    if backend == "reference":
        return by_reference(q, k, scale, bias, row_ids, col_ids)
    grad = torch.is_grad_enabled()
    need_q = grad and (q.requires_grad or scale.requires_grad)  # dscale comes from q·dq
    need_k = grad and k.requires_grad
    name = "similarity_logsigmoid_triton" if backend == "triton" else "similarity_logsigmoid"
    return _library.run(name, q, k, scale, bias, row_ids, col_ids, need_q, need_k)[0]
