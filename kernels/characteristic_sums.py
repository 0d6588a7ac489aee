"""Sums of cosines and sines of projections at equally spaced knots, and their gradient.

    x = (2/π)·step·z·A  [V, N, S]     angles in quarter turns, by the library's product, a band of slices at a time
    C_k = Σ_i cos(k·π/2·x_i),  S_k = Σ_i sin(k·π/2·x_i)       one cosine and sine for each x, then angles are added
    d/dp = Σ_k t_k (h_k cos − g_k sin)  [V, N, S],   dz = (d/dp) Aᵀ                   the library's product again

A band of projections is at most 64 MiB, whatever the number of slices; no array has a dimension of knots beside rows.
There are no atomics: where several programs share the rows, partial sums are added in a fixed order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import without_autocast
from ._angles import angle_of, within_few_turns
from ._common import architecture, best_split, multiprocessors

BAND_BYTES = 64 << 20
ROWS, COLS, WARPS = 64, 32, 4
KNOTS = 16  # that a program has; then the angle is computed anew, so that roundings do not add up
RESIDENT, WAVES = 3, 2


@triton.jit
def _load_angles(P, row0, col0, N, width, scale, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Angles [ROWS, COLS] in quarter turns a knot, and which of them are inside."""
    rows, cols = row0 + tl.arange(0, ROWS), col0 + tl.arange(0, COLS)
    inside = (rows < N)[:, None] & (cols < width)[None, :]
    p = tl.load(P + rows.to(tl.int64)[:, None] * width + cols[None, :], mask=inside, other=0.0)
    return p * scale, inside


@triton.jit(do_not_specialize=["N", "width", "count", "first", "knots", "scale"])
def _characteristic_sums_kernel(
    P,  # [V, N, width]: projections on the slices from `first` on
    Partial,  # [splits, 2, V, knots, count]
    N,
    width,
    count,
    first,
    knots,
    scale,  # quarter turns a knot for a projection of 1
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KNOTS: tl.constexpr,
):
    """Program (b, v, h): slice block b, view and group of knots v, the h-th part of the rows."""
    groups = tl.cdiv(knots, KNOTS)
    view, knot0 = tl.program_id(1) // groups, tl.program_id(1) % groups * KNOTS
    col0 = tl.program_id(0) * COLS
    P += view.to(tl.int64) * N * width
    places = tl.arange(0, KNOTS)[:, None]
    cos_sums = tl.zeros((KNOTS, COLS), tl.float32)
    sin_sums = tl.zeros((KNOTS, COLS), tl.float32)
    blocks = tl.cdiv(N, ROWS)
    share = tl.cdiv(blocks, tl.num_programs(2))
    begin = tl.program_id(2) * share
    for block in range(begin, tl.minimum(begin + share, blocks)):
        x, inside = _load_angles(P, block * ROWS, col0, N, width, scale, ROWS, COLS)
        turn_cos, turn_sin = angle_of(within_few_turns(x))
        cos, sin = turn_cos, turn_sin
        if knot0 > 0:
            cos, sin = angle_of(within_few_turns(x * (knot0 + 1)))
        # Zero stays zero as angles are added, and so adds nothing.
        cos, sin = tl.where(inside, cos, 0.0), tl.where(inside, sin, 0.0)
        for place in range(0, tl.minimum(KNOTS, knots - knot0)):
            here = places == place
            cos_sums += tl.where(here, tl.sum(cos, 0)[None, :], 0.0)
            sin_sums += tl.where(here, tl.sum(sin, 0)[None, :], 0.0)
            cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin

    cols = col0 + tl.arange(0, COLS)
    views = tl.num_programs(1) // groups
    plane = views.to(tl.int64) * knots * count
    at = Partial + tl.program_id(2) * 2 * plane + view.to(tl.int64) * knots * count
    offsets = (knot0 + places).to(tl.int64) * count + (first + cols)[None, :]
    stored = (knot0 + places < knots) & (cols < width)[None, :]
    tl.store(at + offsets, cos_sums, mask=stored)
    tl.store(at + plane + offsets, sin_sums, mask=stored)


@triton.jit(do_not_specialize=["N", "width", "count", "first", "knots", "scale", "step"])
def _characteristic_gradient_kernel(
    P,  # [V, N, width]: projections, and then their gradients
    Grad,  # [2, V, knots, count]
    N,
    width,
    count,
    first,
    knots,
    scale,
    step,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KNOTS: tl.constexpr,
):
    """Program (b, v, r): slice block b, view v, row block r."""
    view, views = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row0, col0 = tl.program_id(2) * ROWS, tl.program_id(0) * COLS
    P += view * N * width
    x, inside = _load_angles(P, row0, col0, N, width, scale, ROWS, COLS)
    turn_cos, turn_sin = angle_of(within_few_turns(x))
    cols = col0 + tl.arange(0, COLS)
    of_cos = Grad + view * knots * count + first + cols
    of_sin = of_cos + views.to(tl.int64) * knots * count
    total = tl.zeros((ROWS, COLS), tl.float32)
    for knot0 in range(0, knots, KNOTS):
        cos, sin = turn_cos, turn_sin
        if knot0 > 0:
            cos, sin = angle_of(within_few_turns(x * (knot0 + 1)))
        for knot in range(knot0, tl.minimum(knot0 + KNOTS, knots)):
            t = step * (knot + 1)
            g = tl.load(of_cos, mask=cols < width, other=0.0) * t
            h = tl.load(of_sin, mask=cols < width, other=0.0) * t
            of_cos += count
            of_sin += count
            total += h[None, :] * cos - g[None, :] * sin
            cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
    rows = row0 + tl.arange(0, ROWS)
    tl.store(P + rows.to(tl.int64)[:, None] * width + cols[None, :], total, mask=inside)


def _bands(rows: int, count: int) -> list[tuple[int, int]]:
    """First slice and number of slices of each band."""
    most = max(COLS, BAND_BYTES // (4 * rows) // COLS * COLS)
    return [(first, min(most, count - first)) for first in range(0, count, most)]


def _as_matrix(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[2]).float()


def characteristic_sums(z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    """[2, V, knots, S] float32; z [V, N, D] of any strides, slices [D, S] float32."""
    (views, n, _), count = z.shape, slices.shape[1]
    architecture(z)  # an error on a GPU that is too old
    groups = triton.cdiv(knots, KNOTS)
    width = _bands(views * n, count)[0][1]
    programs, slots = triton.cdiv(width, COLS) * views * groups, RESIDENT * multiprocessors(z)
    split = best_split(programs, slots, min(triton.cdiv(n, ROWS), max(1, WAVES * slots // programs)))
    partial = z.new_empty((split, 2, views, knots, count), dtype=torch.float32)
    with without_autocast(z), torch.cuda.device_of(z):
        rows = _as_matrix(z)
        for first, width in _bands(views * n, count):
            projections = rows @ slices[:, first : first + width]
            _characteristic_sums_kernel[(triton.cdiv(width, COLS), views * groups, split)](
                projections, partial, n, width, count, first, knots, step * 2 / math.pi,
                ROWS=ROWS, COLS=COLS, KNOTS=KNOTS, num_warps=WARPS,
            )  # fmt: skip
    return partial[0] if split == 1 else partial.sum(0)


def characteristic_sums_backward(grad_sums: Tensor, z: Tensor, slices: Tensor, knots: int, step: float) -> Tensor:
    """[V, N, D] in z's dtype; grad_sums [2, V, knots, S] float32."""
    (views, n, _), count = z.shape, slices.shape[1]
    grad_sums = grad_sums.contiguous()
    dz: Tensor | None = None
    with without_autocast(z), torch.cuda.device_of(z):
        rows = _as_matrix(z)
        for first, width in _bands(views * n, count):
            band = slices[:, first : first + width]
            projections = rows @ band
            _characteristic_gradient_kernel[(triton.cdiv(width, COLS), views, triton.cdiv(n, ROWS))](
                projections, grad_sums, n, width, count, first, knots, step * 2 / math.pi, step,
                ROWS=ROWS, COLS=COLS, KNOTS=KNOTS, num_warps=WARPS,
            )  # fmt: skip
            dz = projections @ band.T if dz is None else dz.addmm_(projections, band.T)
    assert dz is not None
    return dz.to(z.dtype).view(z.shape)
