"""The operators behind :func:`sslfast.second_moment`: schemas, fake kernels, autograd, the Triton launches.

On a CPU the sums are one operator and the loss made of them is PyTorch's. On a GPU, where every launch counts, one
operator gives the sums and a weighted loss of them; its backward takes whichever of their gradients there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library, reference
from .._checks import accumulator, without_autocast
from .moment_losses import PENALTIES, Loss, weighted
from .types import SCALES, MomentOptions, SecondMoment


def by_reference(a: Tensor, b: Tensor | None, options: MomentOptions) -> SecondMoment:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(a)
    cross, center, scale, eps, *_ = options
    with without_autocast(a):
        wide = None if b is None else b.to(kind)
        found = reference.second_moment(a.to(kind), wide, cross=cross, center=center, scale=scale, eps=eps)
    return SecondMoment(*found)


def loss_by_reference(a: Tensor, b: Tensor | None, options: MomentOptions, loss: Loss) -> Tensor:
    """The loss of :func:`by_reference`'s sums."""
    moment = by_reference(a, b, options)
    kind = accumulator(a)
    with without_autocast(a):
        wide = [x.to(kind) for x in (a, b) if x is not None]
        squares = torch.stack([(x - x.mean(0)).square().sum(0) for x in wide])
        return weighted(moment, squares, a.shape[0], loss)


def _second_order(
    function: Callable[..., Any], a: Tensor, b: Tensor | None, needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None] | None:
    """Gradients that carry a graph, from the reference, where such are asked for."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (*grads, a, b)):
        return None

    def given(a: Tensor, b: Tensor | None) -> list[Tensor]:
        return [out for out, grad in zip(function(a, b), grads, strict=True) if grad is not None]

    found = _library.second_order(given, (a, b), needed, [grad for grad in grads if grad is not None])
    return found[0], found[1]


# -------------------------------------------------------------------------------------------------------------- CPU


def _matrices(b: Tensor | None, cross: bool) -> tuple[int, int]:
    """Batches, and matrices M of them."""
    views = 1 if b is None else 2
    return views, 1 if cross else views


def _fake(
    a: Tensor, b: Tensor | None, cross: bool, center: bool, scale: int, eps: float, dual: bool, keep: bool
) -> tuple[Tensor, ...]:
    kind, (n, d), (views, matrices) = accumulator(a), a.shape, _matrices(b, cross)
    moments = (0,) if not keep else (views, n, n) if dual else (matrices, d, d)
    return (
        a.new_empty((matrices,), dtype=kind),
        a.new_empty((matrices, d), dtype=kind),
        a.new_empty((), dtype=kind),
        a.new_empty((views, d), dtype=kind),
        a.new_empty((views, d), dtype=kind),
        a.new_empty(moments, dtype=kind),
    )


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of three outputs, then a and b; last, which of the two is needed."""
    a = arguments[3]
    da, db = (a.new_empty(a.shape if need else (0,)) for need in arguments[-2:])
    return da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, *ctx.options, _ = inputs
    _, diagonal, _, mean, factor, moments = output
    ctx.save_for_backward(a, b, diagonal, mean, factor, moments)
    ctx.mark_non_differentiable(mean, factor, moments)
    ctx.set_materialize_grads(False)  # else a backward fills zeros of the size of `moments`


def _backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, diagonal, mean, factor, moments = ctx.saved_tensors
    shapes = ((len(diagonal),), diagonal.shape, ())
    cross, center, scale, eps, _ = ctx.options
    needed = ctx.needs_input_grad[:2]

    def function(a: Tensor, b: Tensor | None) -> SecondMoment:
        return by_reference(a, b, MomentOptions(cross, center, SCALES[scale], eps))

    grads = _second_order(function, a, b, needed, given[:3])
    if grads is None:
        filled = [diagonal.new_zeros(s) if g is None else g for g, s in zip(given[:3], shapes, strict=True)]
        da, db = torch.ops.sslfast.second_moment_backward(
            *filled, a, b, diagonal, mean, factor, moments, *ctx.options, *needed
        )
        grads = da if needed[0] else None, db if needed[1] else None
    return (*grads, *(None,) * 6)


_library.define(
    "second_moment(Tensor a, Tensor? b, bool cross, bool center, int scale, float eps, bool dual, bool keep) ->"
    " (Tensor off_diagonal, Tensor diagonal, Tensor distance, Tensor mean, Tensor factor, Tensor moments)",
    _fake,
)
_library.define(
    "second_moment_backward(Tensor grad_off, Tensor grad_diagonal, Tensor grad_distance, Tensor a, Tensor? b,"
    " Tensor diagonal, Tensor mean, Tensor factor, Tensor moments, bool cross, bool center, int scale, float eps,"
    " bool dual, bool need_a, bool need_b) -> (Tensor da, Tensor db)",
    _backward_fake,
)
_library.autograd("second_moment", _backward, _setup_context)


# ----------------------------------------------------------------------------------------------------------- Triton

_OPTIONS = "bool cross, bool center, int scale, float eps, bool dual, int penalty, float floor, float[] weights"


def aligned(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The batches with one stride for both, of less than 2^24 so that places in a tile are 32-bit numbers.

    Rows or columns that are contiguous are taken as they lie in memory; others are copied.
    """
    if 1 not in a.stride() or max(a.stride()) >= 1 << 24:
        a = a.contiguous()
    if b is not None and b.stride() != a.stride():
        a, b = a.contiguous(), b.contiguous()
    return a, b


def _kept_shapes(a: Tensor, b: Tensor | None, cross: bool, dual: bool) -> dict[str, tuple[int, ...]]:
    """What the Triton operator keeps for its backward, all of it."""
    (n, d), (views, matrices) = a.shape, _matrices(b, cross)
    width, rows = (d + 7) // 8 * 8, (n + 7) // 8 * 8
    planes = views if dual else matrices
    return {
        "stats": (3 * views + (matrices if dual else 0), d),
        "hat": (views, n, width),
        "operand": (views, n, rows) if dual else (matrices, width, width),
        "trace": (planes, 1 + n if dual else 1),
    }


def _triton_fake(
    a: Tensor,
    b: Tensor | None,
    cross: bool,
    center: bool,
    scale: int,
    eps: float,
    dual: bool,
    penalty: int,
    floor: float,
    weights: Sequence[float],
    whole: bool,
    learns: bool,
) -> tuple[Tensor, ...]:
    matrices, d = _matrices(b, cross)[1], a.shape[1]
    # The interpreter cannot multiply bfloat16.
    operands = torch.float32 if a.device.type == "cpu" and a.dtype == torch.bfloat16 else a.dtype
    kinds = {"stats": torch.float32, "hat": operands, "operand": operands, "trace": torch.float32}
    kept = [
        a.new_empty(shape if learns and (whole or name in ("stats", "hat")) else (0,), dtype=kinds[name])
        for name, shape in _kept_shapes(a, b, cross, dual).items()
    ]
    sums = ((), (matrices,), (matrices, d), ())
    return (*(a.new_empty(shape, dtype=torch.float32) for shape in sums), *kept)


def _triton_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of four outputs, then a and b; last, which of the two is needed."""
    a, b = arguments[4:6]
    like = aligned(a, b)[0]
    da, db = (torch.empty_like(like) if need else a.new_empty(0) for need in arguments[-2:])
    return da, db


def _triton_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, b, *ctx.options, _, _ = inputs
    diagonal, kept = output[2], output[4:]
    ctx.save_for_backward(a, b, diagonal, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _triton_backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, *kept = ctx.saved_tensors
    cross, center, scale, eps, _, penalty, floor, weights = ctx.options
    needed = ctx.needs_input_grad[:2]

    def function(a: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        options = MomentOptions(cross, center, SCALES[scale], eps)
        off, distance, columns = weights
        loss = Loss(off, distance, columns, PENALTIES[penalty], floor)
        return loss_by_reference(a, b, options, loss), *by_reference(a, b, options)

    grads = _second_order(function, a, b, needed, given[:4])
    if grads is None:
        da, db = torch.ops.sslfast.second_moment_triton_backward(*given[:4], a, b, *kept, *ctx.options, *needed)
        grads = da if needed[0] else None, db if needed[1] else None
    return (*grads, *(None,) * 10)


def _launch(a: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    from ..kernels import second_moment as kernel

    *options, whole, learns = rest
    return kernel.second_moment(*aligned(a, b), kernel.Options(*options), whole, learns)


def _launch_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import second_moment as kernel

    grads, (a, b, diagonal, stats, hat, operand, trace), rest = arguments[:4], arguments[4:11], arguments[11:]
    *options, need_a, need_b = rest
    found = kernel.Columns(stats, diagonal, hat)
    given = kernel.Grads(*grads), *aligned(a, b), found, operand, trace, kernel.Options(*options)
    return kernel.second_moment_backward(*given, (need_a, need_b))


_library.define(
    f"second_moment_triton(Tensor a, Tensor? b, {_OPTIONS}, bool whole, bool learns) -> (Tensor loss,"
    " Tensor off_diagonal, Tensor diagonal, Tensor distance, Tensor stats, Tensor hat, Tensor operand, Tensor trace)",
    _triton_fake,
)
_library.define(
    "second_moment_triton_backward(Tensor? grad_loss, Tensor? grad_off, Tensor? grad_diagonal, Tensor? grad_distance,"
    " Tensor a, Tensor? b, Tensor diagonal, Tensor stats, Tensor hat, Tensor operand, Tensor trace,"
    f" {_OPTIONS}, bool need_a, bool need_b) -> (Tensor da, Tensor db)",
    _triton_backward_fake,
)
_library.autograd("second_moment_triton", _triton_backward, _triton_setup_context)
_library.implement("second_moment_triton", _launch, "CUDA", "CPU")
_library.implement("second_moment_triton_backward", _launch_backward, "CUDA", "CPU")
