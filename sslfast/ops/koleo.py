"""KoLeo of one batch: schema, fake kernels, autograd, and the choice between one operator and its steps.

On a CPU one operator normalises the rows while it packs them, finds neighbours by tiles and takes the distances from
the packed rows; on a GPU these are three. The mathematics is in ``docs/nearest_neighbours.md``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import accumulator, without_autocast
from .l2_normalize import normalized
from .nearest_neighbours import neighbours_of, why_not as why_not_neighbours
from .neighbour_distance import neighbour_distance

BACKENDS = ("cpu", "triton", "reference")


def why_not(backend: str, x: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``x``, or ``None`` if it can."""
    if backend not in BACKENDS:
        return f"koleo has no {backend} implementation"
    return why_not_neighbours(backend, x)


def _fake(x: Tensor, topk: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, kind = x.shape[0], accumulator(x)
    return (
        x.new_empty((), dtype=kind),
        x.new_empty((rows, topk), dtype=torch.int64),
        x.new_empty(rows, dtype=kind),
        x.new_empty((rows, topk), dtype=kind),
    )


def _backward_fake(
    grad_loss: Tensor, x: Tensor, index: Tensor, inv_norm: Tensor, distance: Tensor, eps: float
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, ctx.eps = inputs
    ctx.save_for_backward(x, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad_loss is None:
        return None, None, None
    x, index, inv_norm, distance = ctx.saved_tensors
    if torch.is_grad_enabled() and (x.requires_grad or grad_loss.requires_grad):
        function = partial(_by_reference, topk=index.shape[1], eps=ctx.eps, index=index)
        return (*_library.second_order(function, (x,), (True,), grad_loss), None, None)  # type: ignore[return-value]
    return torch.ops.sslfast.koleo_backward(grad_loss, x, index, inv_norm, distance, ctx.eps), None, None


_library.define(
    "koleo(Tensor x, int topk, float eps) -> (Tensor loss, Tensor index, Tensor inv_norm, Tensor distance)", _fake
)
_library.define(
    "koleo_backward(Tensor grad_loss, Tensor x, Tensor index, Tensor inv_norm, Tensor distance, float eps) -> Tensor",
    _backward_fake,
)
_library.autograd("koleo", _backward, _setup_context)


def _by_reference(x: Tensor, topk: int, eps: float, index: Tensor | None = None) -> Tensor:
    """The reference with the kernels' precision: 16-bit rows are float32 numbers, in which eps is not 0."""
    with without_autocast(x):
        return reference.koleo(x.to(accumulator(x)), topk, eps, index=index)


def koleo(x: Tensor, topk: int, eps: float) -> Tensor:
    """``−mean log(d + eps)`` of a checked batch [N, D], N > topk; see :func:`sslfast.koleo`."""
    backend = _backends.serve("koleo", x, "triton", why_not)
    if backend == "reference":
        return _by_reference(x, topk, eps)
    if backend == "cpu":
        return _library.run("koleo", x, topk, eps)[0]
    rows = normalized(x.to(accumulator(x)), eps, backend)
    index = neighbours_of(rows.detach(), None, topk).index
    return -(neighbour_distance(rows, None, index, eps) + eps).log().mean()


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """The rows that :func:`koleo` compares, in the accumulator's dtype: for one that takes the steps apart."""
    return normalized(x.to(accumulator(x)), eps, _backends.serve("koleo", x, "triton", why_not))
