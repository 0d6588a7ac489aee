"""Second moments of columns, M = ÂᵀB̂ [D, D] (or ÂᵀÂ and B̂ᵀB̂), from M itself or from N × N Gram matrices.

    x̂ = (x − mean)·factor                 per column
    primal   off = Σ_{i≠j} M_ij²            dÂ = 2g·B̂ offdiag(M)ᵀ,  dB̂ = 2g·Â offdiag(M)
    dual     off = ⟨G_A, G_B⟩ − Σ_i M_ii²   dÂ = 2g·(G_B Â − B̂ diag(M_ii)), dB̂ alike;  G_X = X̂X̂ᵀ
    dx = factor·(dx̂ − mean_n dx̂ − x̂·w·Σ_n dx̂·x̂),   w = 1/N ("variance"), 1 ("norm", if above eps), 0 ("none")

with g the gradient of off; B̂ = Â doubles the gradient. To dÂ come B̂·h and to dB̂ Â·h, h that of M_ii.

A step is few launches, because on small batches a GPU waits for them. Forward: the columns' statistics and X̂ in the
dtype of the input (``second_moment_columns``); M or G by a product; its squares, and itself without the diagonal in
the dtype of the input, which is what the backward multiplies (``second_moment_off_diagonal``); the totals. Backward: a
product for each batch, then everything elementwise (``second_moment_backward``).

Products are the library's, or tiles' (``second_moment_tiles``): see ``_second_moment_plan``. An M too large to be kept
is computed a band of columns at a time, and again in the backward; tiles sum its squares without it. There are no
atomics: the result is the same in every run.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ._second_moment_plan import by_library
from .second_moment_backward import Grads, gradient
from .second_moment_columns import Columns, Options, columns
from .second_moment_off_diagonal import off_diagonal, programs, totals
from .second_moment_tiles import gram, product

__all__ = ["second_moment", "second_moment_backward"]

# Numbers of M in a band (16 MiB in float32).
BAND = 4 << 20


def plain(device: str) -> contextlib.AbstractContextManager[None]:
    """Where autocast, which would round the factors of the library's products, is off."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` [P, ·, ·] by the library, in float32.

    float32 products are as exact as the user's setting of PyTorch's own makes them.
    """
    if left.dtype == torch.float32 or not left.is_cuda:  # a CPU has no products of 16 bits with a float32 result
        return torch.bmm(left.float(), right.float(), out=out)
    if out is None:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left, right, out_dtype=torch.float32, out=out)


def _padded(like: Tensor, planes: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[P, height, width] whose rows start at multiples of 8 numbers."""
    pitch = triton.cdiv(width, 8) * 8
    return like.new_empty((planes, height, pitch), dtype=dtype)[:, :, :width]


def _moments(left: Tensor, right: Tensor | None, dual: bool, library: bool) -> Tensor:
    """L̂ᵀR̂ [V, D′, D″] (R̂ = L̂ where it is ``None``), or if ``dual`` L̂L̂ᵀ [V, N, N], in float32."""
    views, n, width = left.shape
    rows, cols = (n, n) if dual else (width, (left if right is None else right).shape[2])
    if not library:
        m = _padded(left, views, rows, cols)
        gram(left, right, dual, m)
        return m
    factors = (left, left.mT) if dual else (left.mT, left if right is None else right)
    return multiply(*factors, out=_padded(left, views, rows, cols) if cols % 8 else None)


def _operand_of(m: Tensor, kind: torch.dtype) -> Tensor:
    """Where M without its diagonal is written: M itself, if it has the dtype of the products."""
    planes, height, width = m.shape
    if m.dtype == kind:
        return m.as_strided((planes, height, m.stride(1)), m.stride())
    return m.new_empty((planes, height, triton.cdiv(width, 8) * 8), dtype=kind)


def _trace_of(hat: Tensor, planes: int, dual: bool) -> Tensor:
    return hat.new_empty((planes, 1 + (hat.shape[1] if dual else 0)), dtype=torch.float32)


def _bands(width: int) -> list[tuple[int, int]]:
    """Where the bands of M [D′, D′] begin and end."""
    step = max(128, BAND // width // 128 * 128)
    return [(first, min(first + step, width)) for first in range(0, width, step)]


def _streamed_squares(found: Columns, options: Options, library: bool) -> Tensor:
    """[R, ·] to be summed, Σ_{i≠j} M_ij² of an M that is never there as a whole."""
    hat = found.hat
    left, right = (hat[:1], hat[1:]) if options.cross else (hat, hat)
    if not library:
        squares = gram(left, right if options.cross else None, False, None)
        assert squares is not None
        return squares
    matrices, width = len(left), hat.shape[2]
    bands = _bands(width)
    # Of a symmetric M a band needs no rows below its last column.
    heights = [width if options.cross else end for _, end in bands]
    squares = hat.new_empty((matrices, sum(map(programs, heights))), dtype=torch.float64)
    written = 0
    for (first, end), height in zip(bands, heights, strict=True):
        m = _moments(left[:, :, :height], right[:, :, first:end], False, library)
        off_diagonal(m, found, options, squares[:, written:], first=first)
        written += programs(height)
    return squares


def second_moment(
    a: Tensor, b: Tensor | None, options: Options, whole: bool, learns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squares off the diagonal, and the diagonal, of M.

    Args:
        a, b: [N, D]; float32, bfloat16 or float16; as for ``columns``.
        whole: M may be in memory; it may always in dual form.
        learns: return what the backward needs.

    Returns:
        loss [], off_diagonal [R], diagonal [R, D], distance [] (of two batches without ``cross``, else 0): float32. And
        if ``learns``, else [0]: stats of the columns, X̂ [V, N, D′], and if ``whole`` operand and trace of
        ``second_moment_off_diagonal``.
    """
    with torch.cuda.device_of(a), plain(a.device.type):
        library = by_library(a, options, 1 if b is None else 2, whole)
        found = columns(a, b, options)
        hat, dual = found.hat, options.dual
        operand, trace = hat.new_empty(0), hat.new_empty(0, dtype=torch.float32)
        if whole:
            left, right = (hat[:1], hat[1:]) if options.cross and not dual else (hat, None)
            m = _moments(left, right, dual, library)
            squares = hat.new_empty((len(found.diagonal), programs(m.shape[1])), dtype=torch.float64)
            if learns:
                operand, trace = _operand_of(m, hat.dtype), _trace_of(hat, len(m), dual)
            off_diagonal(m, found, options, squares, *((operand, trace) if learns else ()))
        else:
            squares = _streamed_squares(found, options, library)
        loss, off, distance = totals(squares, found, options)
    saved = (found.stats, hat) if learns else (trace.new_empty(0), operand.new_empty(0))
    return (loss, off, found.diagonal, distance, *saved, operand, trace)


def _by(library: bool, left: Tensor, right: Tensor, out: Tensor) -> None:
    """``out`` = ``left @ right``, [P, ·, ·] each."""
    if library:
        multiply(left, right, out=out)
        return
    for plane in range(len(out)):
        product(left[plane], right[plane], out[plane])


def _products(found: Columns, operand: Tensor, options: Options, views: list[int], library: bool) -> Tensor:
    """What M without its diagonal contributes to the gradients in the X̂ of ``views``: [views, N, D′] float32."""
    hat, n = found.hat, found.hat.shape[1]
    out = hat.new_empty((len(views), n, hat.shape[2]), dtype=torch.float32)
    planes = slice(views[0], views[-1] + 1)
    if not options.cross:
        factors = (operand[planes, :, :n], hat[planes]) if options.dual else (hat[planes], operand[planes])
        _by(library, *factors, out)
        return out
    for view, into in zip(views, out.split(1), strict=True):
        other = slice(1 - view, 2 - view)
        if options.dual:
            _by(library, operand[other, :, :n], hat[view : view + 1], into)
        else:
            _by(library, hat[other], operand.mT if view == 0 else operand, into)
    return out


def _streamed_products(found: Columns, options: Options, views: list[int], library: bool) -> tuple[Tensor, Tensor]:
    """:func:`_products` from bands of M that are computed again, and the trace of its operands."""
    hat = found.hat
    n, width = hat.shape[1:]
    out = hat.new_empty((len(views), n, width), dtype=torch.float32)
    trace = _trace_of(hat, 1 if options.cross else len(hat), False)
    for view, into in zip(views, out.split(1), strict=True):
        x, left = hat[view : view + 1], hat[1 - view : 2 - view] if options.cross else hat[view : view + 1]
        for first, end in _bands(width):
            m = _moments(left, x[:, :, first:end], False, library)
            operand = _operand_of(m, hat.dtype)
            plane = 0 if options.cross else view
            off_diagonal(m, found, options, None, operand, trace[plane:], first=first, matrix=plane)
            _by(library, left, operand, into[:, :, first:end])
    return out, trace


def second_moment_backward(
    grads: Grads,
    a: Tensor,
    b: Tensor | None,
    found: Columns,
    operand: Tensor,
    trace: Tensor,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients in a and b, each in its dtype; [0] where not wanted.

    Args:
        found, operand, trace: as :func:`second_moment` gave them, ``found`` without sums.
    """
    views = [view for view, asked in enumerate(wanted) if asked]
    with torch.cuda.device_of(a), plain(a.device.type):
        library = by_library(a, options, 1 if b is None else 2, operand.numel() > 0)
        if operand.numel():
            out = _products(found, operand, options, views, library)
        else:
            out, trace = _streamed_products(found, options, views, library)
        return gradient(out, a, b, found, trace, grads, options, wanted)
