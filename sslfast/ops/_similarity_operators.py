"""The operators behind ``similarity_lse``: schemas, fake kernels and autograd, once for C++ and once for Triton.

Each keeps per row (and column) the maximum and the sum of exponentials relative to it, in base 2:
``lse = ln 2 · (max + log2 sum)``. A result that was not asked for is an empty tensor [0]. Gradients leave the backward
operators in the accumulator's dtype.

    similarity_lse         row and column LSE of q [M, D] against k [N, D]; 1U forward, 3U backward (U = 2·M·N·D);
                           on a GPU 4U backward for narrow rows
    similarity_lse_self    z against itself: 2U in all on a CPU (a tile serves its rows and its columns), 3U on a GPU
    similarity_lse_attend  only q learns: the softmax-weighted mean of k comes along in the forward; 2U in all
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._checks import accumulator

_SAVED = "Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor tiles"
_PAIRS = "Tensor? bias, Tensor? row_ids, Tensor? col_ids"


def _like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulator(x))


def _wants_graph(*tensors: Tensor | None) -> bool:
    """Under ``create_graph=True``: the gradient itself must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def by_reference(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    positives: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(q)
    with torch.autocast(q.device.type, enabled=False):
        return reference.similarity_terms(
            q.to(kind),
            k.to(kind),
            scale,
            bias=None if bias is None else bias.to(kind),
            row_ids=row_ids,
            col_ids=col_ids,
            positives=positives,
        )


# ------------------------------------------------------------------------------------------------------- rectangular


def _fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    positives: Tensor | None,
    columns: bool,
    hardest: bool,
    tile_cache: int,
) -> tuple[Tensor, ...]:
    m, n = q.shape[0], k.shape[0] if columns else 0
    p, h = (m if positives is not None else 0), (m if hardest else 0)
    sizes = (m, n, p, h, m, m, n, n, tile_cache)
    return tuple(_like(q, size) for size in sizes)


def _backward_fake(
    grad_row: Tensor | None,
    grad_col: Tensor | None,
    grad_positive: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    positives: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    col_max: Tensor,
    col_sum: Tensor,
    tiles: Tensor,
    need_q: bool,
    need_k: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    dq = _like(q, *q.shape) if need_q else _like(q, 0)
    dk = _like(q, *k.shape) if need_k else _like(q, 0)
    return dq, dk, torch.empty_like(scale), _like(q, k.shape[0] if need_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[4:])
    ctx.asked = (
        True,
        inputs[7],
        inputs[6] is not None,
    )  # row LSE, column LSE, positives: an empty output has no gradient
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward_with(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 10
        q, k, scale, bias, row_ids, col_ids, positives, *saved = ctx.saved_tensors
        given = tuple(g if asked else None for g, asked in zip(grads[:3], ctx.asked, strict=True))
        if all(g is None for g in given):
            return nothing
        need_q, need_k, need_scale, need_bias = ctx.needs_input_grad[:4]
        if _wants_graph(*given, q, k, scale, bias):

            def function(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None) -> list[Tensor]:
                outputs = by_reference(q, k, scale, bias, row_ids, col_ids, positives)
                return [o for o, g in zip(outputs[:3], given, strict=True) if g is not None]

            present = [g for g in given if g is not None]
            found = _library.second_order(function, (q, k, scale, bias), ctx.needs_input_grad[:4], present)
            return (*found, *nothing[4:])
        # dscale comes from q·dq (or k·dk), so one of the two is needed for it.
        also_q = need_q or (need_scale and not need_k)
        dq, dk, dscale, dbias = getattr(torch.ops.sslfast, f"{name}_backward")(
            *given, q, k, scale, bias, row_ids, col_ids, positives, *saved, also_q, need_k, need_bias
        )
        return (
            dq.to(q.dtype) if need_q else None,
            dk.to(k.dtype) if need_k else None,
            dscale if need_scale else None,
            dbias.to(bias.dtype) if need_bias else None,
            *nothing[4:],
        )

    return backward


# ------------------------------------------------------------------------------------------------- z against itself


def _self_fake(
    z: Tensor, scale: Tensor, ids: Tensor | None, positives: Tensor | None, hardest: bool, tile_cache: int
) -> tuple[Tensor, ...]:
    m = z.shape[0]
    sizes = (m, m if positives is not None else 0, m if hardest else 0, m, m, tile_cache)
    return tuple(_like(z, size) for size in sizes)


def _self_backward_fake(
    grad_row: Tensor | None,
    grad_positive: Tensor | None,
    z: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    positives: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    return _like(z, *z.shape), torch.empty_like(scale)


def _self_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[3:])
    ctx.asked = (True, inputs[3] is not None)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _self_backward_with(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _self_backward(name, ctx, *grads)

    return backward


def _self_backward(name: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    given = tuple(g if asked else None for g, asked in zip(grads[:2], ctx.asked, strict=True))
    if all(g is None for g in given):
        return (None,) * 6
    z, scale, ids, positives, *saved = ctx.saved_tensors
    if _wants_graph(*given, z, scale):

        def function(z: Tensor, scale: Tensor) -> list[Tensor]:
            row, _, positive, _ = by_reference(z, z, scale, None, ids, ids, positives)
            return [o for o, g in zip((row, positive), given, strict=True) if g is not None]

        present = [g for g in given if g is not None]
        found = _library.second_order(function, (z, scale), ctx.needs_input_grad[:2], present)
        return (*found, None, None, None, None)
    operator = getattr(torch.ops.sslfast, f"{name}_backward")
    dz, dscale = operator(*given, z, scale, ids, positives, *saved)
    return dz.to(z.dtype), dscale, None, None, None, None


# --------------------------------------------------------------------------------------------------- only q learns


def _attend_fake(
    q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _like(q, q.shape[0]), _like(q, *q.shape)


def _attend_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, scale, *pairs = inputs
    # The first derivative does not read k, so it is not saved as something that must stay: a queue may take in new keys
    # before the backward. The second derivative reads it, and checks that it is what it was.
    ctx.save_for_backward(q, scale, *pairs, output[1])
    ctx.k, ctx.k_version = k, k._version
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attend_backward(ctx: Any, grad_row: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_row is None:
        return (None,) * 6
    q, scale, bias, row_ids, col_ids, attended = ctx.saved_tensors
    if _wants_graph(grad_row, q, scale):
        k = ctx.k
        if k._version != ctx.k_version:
            raise RuntimeError("k was overwritten after the loss was computed: create_graph=True needs it unchanged")

        def function(q: Tensor, scale: Tensor) -> Tensor:
            return by_reference(q, k, scale, bias, row_ids, col_ids)[0]

        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        dq, dscale = _library.second_order(function, (q, scale), needed, grad_row)
        return dq, None, dscale, None, None, None
    weighted = grad_row[:, None] * attended  # [M, D]
    dq = (scale * weighted).to(q.dtype) if ctx.needs_input_grad[0] else None
    dscale = (q * weighted).sum().to(scale.dtype) if ctx.needs_input_grad[2] else None
    return dq, None, dscale, None, None, None


# ------------------------------------------------------------------------------------------------------ registration

for _name in ("similarity_lse", "similarity_lse_triton"):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor scale, {_PAIRS}, Tensor? positives, bool columns, bool hardest,"
        " SymInt tile_cache) -> (Tensor row_lse, Tensor col_lse, Tensor positive, Tensor hardest_negative,"
        " Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor tiles)",
        _fake,
    )
    _library.define(
        f"{_name}_backward(Tensor? grad_row, Tensor? grad_col, Tensor? grad_positive, Tensor q, Tensor k, Tensor scale,"
        f" {_PAIRS}, Tensor? positives, {_SAVED}, bool need_q, bool need_k, bool need_bias)"
        " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
        _backward_fake,
    )
    _library.autograd(_name, _backward_with(_name), _setup_context)

for _name in ("similarity_lse_self", "similarity_lse_self_triton"):
    _library.define(
        f"{_name}(Tensor z, Tensor scale, Tensor? ids, Tensor? positives, bool hardest, SymInt tile_cache)"
        " -> (Tensor row_lse, Tensor positive, Tensor hardest_negative, Tensor row_max, Tensor row_sum, Tensor tiles)",
        _self_fake,
    )
    _library.define(
        f"{_name}_backward(Tensor? grad_row, Tensor? grad_positive, Tensor z, Tensor scale, Tensor? ids,"
        " Tensor? positives, Tensor row_max, Tensor row_sum, Tensor tiles) -> (Tensor dz, Tensor dscale)",
        _self_backward_fake,
    )
    _library.autograd(_name, _self_backward_with(_name), _self_setup_context)

for _name in ("similarity_lse_attend", "similarity_lse_attend_triton"):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor scale, {_PAIRS}) -> (Tensor row_lse, Tensor attended)", _attend_fake
    )
    _library.autograd(_name, _attend_backward, _attend_setup_context)


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    q, k, *rest = arguments[:-1]  # the last is the size of the tile cache, which the GPU does without
    return (*kernel.similarity_forward(q.contiguous(), k.contiguous(), *rest), _like(q, 0))


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    *grads, q, k = arguments[:5]
    *rest, _tiles, need_q, need_k, need_bias = arguments[5:]
    return kernel.similarity_backward(*grads, q.contiguous(), k.contiguous(), *rest, need_q, need_k, need_bias)


def _triton_attend(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import similarity_lse as kernel

    return kernel.similarity_attend(q.contiguous(), k.contiguous(), *rest)


def _triton_self(
    z: Tensor, scale: Tensor, ids: Tensor | None, positives: Tensor | None, hardest: bool, tile_cache: int
) -> tuple[Tensor, ...]:
    from ..kernels import similarity_lse as kernel

    z = z.contiguous()
    found = kernel.similarity_forward(z, z, scale, None, ids, ids, positives, False, hardest)
    row_lse, _, positive, negative, row_max, row_sum, _, _ = found
    return row_lse, positive, negative, row_max, row_sum, _like(z, 0)


def _triton_self_backward(
    grad_row: Tensor | None,
    grad_positive: Tensor | None,
    z: Tensor,
    scale: Tensor,
    ids: Tensor | None,
    positives: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    """With W = G + Gᵀ, dz = scale·W z is one launch, dq of a rectangular backward that is given g for the columns too.

    Of a positive that holds the half through q; the other, ``gp_i·scale·z_i`` in row p(i), is added here.
    """
    from ..kernels import similarity_lse as kernel

    z = z.contiguous()
    statistics = (row_max, row_sum, row_max, row_sum)
    dz, _, twice, _ = kernel.similarity_backward(
        grad_row, grad_row, grad_positive, z, z, scale, None, ids, ids, positives, *statistics, True, False, False
    )
    if grad_positive is not None and positives is not None:
        present = (positives >= 0) & (positives < z.shape[0])
        place = torch.where(present, positives, 0)
        weighted = torch.where(present, grad_positive, 0.0)[:, None] * z.to(dz.dtype)  # [M, D]
        twice = twice + (weighted * z.index_select(0, place)).sum()
        dz = dz.index_put((place,), scale * weighted, accumulate=True)  # sorts: no atomics
    return dz, twice / 2


_library.implement("similarity_lse_self_triton", _triton_self, "CUDA", "CPU")
_library.implement("similarity_lse_self_triton_backward", _triton_self_backward, "CUDA", "CPU")
_library.implement("similarity_lse_triton", _triton_forward, "CUDA", "CPU")
_library.implement("similarity_lse_triton_backward", _triton_backward, "CUDA", "CPU")
_library.implement("similarity_lse_attend_triton", _triton_attend, "CUDA", "CPU")
