"""Distances of rows to neighbours that are given, and the gradients of distances and of similarities.

    distance_ic = ‖q_i − k_n + eps‖₂,  n = index[i, c]      dq_i += g_ic u,  dk_n −= g_ic u,  u the unit difference

Both ends of a pair get a gradient, in O(M·count·D): the pairs are sorted by the row of ``k`` that they point at, so
that each row of a gradient is one sum, in one order. The mathematics is in ``docs/nearest_neighbours.md``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator

BACKENDS = ("cpu", "triton", "reference")


def why_not(backend: str, q: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``q``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(q.device, "q")
    if backend == "triton":
        if q.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(q.device)
    return f"neighbour_distance has no {backend} implementation"


def _fake(q: Tensor, k: Tensor | None, index: Tensor, eps: float) -> Tensor:
    return q.new_empty(index.shape, dtype=accumulator(q))


def _gradient_fake(
    grad: Tensor,
    distance: Tensor | None,
    index: Tensor,
    q: Tensor,
    k: Tensor | None,
    eps: float,
    need_q: bool,
    need_k: bool,
) -> tuple[Tensor, Tensor]:
    dq = q.new_empty(q.shape if need_q else (0,))
    return dq, q.new_empty(k.shape if need_k and k is not None else (0,))


def gradients(
    name: str, grad: Tensor, distance: Tensor | None, index: Tensor, q: Tensor, k: Tensor | None, eps: float, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of q and k as an operator's context needs them; ``distance``: of distances, else of similarities."""
    need_q, need_k, *_ = ctx.needs_input_grad
    operator = getattr(torch.ops.sslfast, name)
    dq, dk = operator(grad.contiguous(), distance, index, q, k, eps, need_q, need_k)
    return dq if need_q else None, dk if need_k else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, index, ctx.eps = inputs
    ctx.save_for_backward(q, k, index, output)


def _backward_with(suffix: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, index, distance = ctx.saved_tensors
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, q, k)):
            # Only under create_graph=True: the reference's own graph makes the second derivative right.
            function = lambda q, k: by_reference(q, k, index, ctx.eps)  # noqa: E731
            return (*_library.second_order(function, (q, k), ctx.needs_input_grad[:2], grad), None, None)
        found = gradients(f"neighbour_gradient{suffix}", grad, distance, index, q, k, ctx.eps, ctx)
        return (*found, None, None)

    return backward


def _triton_forward(q: Tensor, k: Tensor | None, index: Tensor, eps: float) -> Tensor:
    from ..kernels import neighbour_distance as kernel

    return kernel.neighbour_distance(q, k, index, eps)


def _triton_gradient(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import neighbour_distance as kernel

    return kernel.neighbour_gradient(*arguments)


for _suffix in ("", "_triton"):
    _library.define(f"neighbour_distance{_suffix}(Tensor q, Tensor? k, Tensor index, float eps) -> Tensor", _fake)
    _library.define(
        f"neighbour_gradient{_suffix}(Tensor grad, Tensor? distance, Tensor index, Tensor q, Tensor? k, float eps,"
        " bool need_q, bool need_k) -> (Tensor dq, Tensor dk)",
        _gradient_fake,
    )
    _library.autograd(f"neighbour_distance{_suffix}", _backward_with(_suffix), _setup_context)
_library.implement("neighbour_distance_triton", _triton_forward, "CUDA", "CPU")
_library.implement("neighbour_gradient_triton", _triton_gradient, "CUDA", "CPU")


def by_reference(q: Tensor, k: Tensor | None, index: Tensor, eps: float) -> Tensor:
    """The reference with the kernels' precision: 16-bit rows are float32 numbers, in which eps is not 0."""
    kind = accumulator(q)
    return reference.neighbour_distance(q.to(kind), None if k is None else k.to(kind), index, eps)


def neighbour_distance(q: Tensor, k: Tensor | None, index: Tensor, eps: float = 1e-8) -> Tensor:
    """``‖q_i − k_n + eps‖₂`` for ``n = index[i, c]``; eps is added to every component, as by ``PairwiseDistance``.

    Args:
        q: [M, D]; k: [N, D] of the same dtype and device, or ``None`` for the rows of q themselves.
        index: [M, count] int64, rows of k, or −1 for none, whose distance is +inf and has no gradient.
        eps: added to each component of a difference (default 1e-8).

    Returns:
        [M, count], float32 (float64 for float64 rows). Differentiable in q and k, twice through the reference.
    """
    backend = _backends.serve("neighbour_distance", q, "triton", why_not)
    if backend == "reference":
        return by_reference(q, k, index, eps)
    name = "neighbour_distance_triton" if backend == "triton" else "neighbour_distance"
    return _library.run(name, q, k, index, eps)


def sums_by_index(q: Tensor, index: Tensor, k: Tensor) -> Tensor:
    """``Σ_{i: index[i] = n} q_i`` for every row n of ``k``, in the order of the rows: [N, D], as ``k``; no gradient.

    It is the gradient of ``Σ_i q_i·k_n`` with respect to k, each row of which has one owner.

    Args:
        q: [M, D]; k: [N, D] of the same dtype and device, of which only the shape matters.
        index: [M] int64, rows of k, or −1 for none.
    """
    backend = _backends.serve("neighbour_distance", q, "triton", why_not)
    if backend == "reference":
        return reference.sums_by_index(q, index, len(k))
    operator = getattr(torch.ops.sslfast, "neighbour_gradient" + ("_triton" if backend == "triton" else ""))
    ones = torch.ones_like(index, dtype=accumulator(q))
    sums: Tensor = operator(ones[:, None], None, index[:, None], q, k, 0.0, False, True)[1]
    return sums
