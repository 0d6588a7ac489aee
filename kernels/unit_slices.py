"""Random unit columns: Philox4x32-10, Box and Muller's formula; see ``csrc/cpu/unit_slices.cpp`` for the notation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._random.philox import LOW
from .._random.streams import stream_of
from ._angles import angle_of
from ._common import architecture

BLOCKS, COLS, WARPS = 16, 32, 4


@triton.jit
def _log(u):
    """Of a normal float32, to 1e-9 of it: ln(1 + f) = f − f²/2 + f³·P(f) for 1/√2 ≤ 1 + f ≤ √2."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - exponent * 0x800000).to(tl.float32, bitcast=True) - 1.0
    p = ((0.06914953887462616 * f - 0.1178959310054779) * f + 0.11873048543930054) * f - 0.12384390085935593
    p = (((p * f + 0.14218653738498688) * f - 0.16669248044490814) * f + 0.20002226531505585) * f
    p = (p - 0.24999986588954926) * f + 0.3333331048488617
    g = f * f
    return exponent.to(tl.float32) * 0.693147180559945 + (f - (0.5 * g - g * f * p))


@triton.jit
def _normals(first, second):
    """Two Gaussian numbers of two words."""
    u = ((first >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
    cos, sin = angle_of((second >> 8).to(tl.float32) * (1.0 / 4194304))
    radius = tl.sqrt(-2.0 * _log(u))
    return radius * cos, radius * sin


@triton.jit
def _store_row(Slices, row, cols, D, S, value):
    inside = (row < D)[:, None] & (cols < S)[None, :]
    tl.store(Slices + row.to(tl.int64)[:, None] * S + cols[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["D", "S", "low", "high"])
def _unit_slices_kernel(
    Step,  # []
    Slices,  # [D, S]: Gaussian numbers
    D,
    S,
    low,  # 32 bits each of the seed, as signed numbers
    high,
    STREAM: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Program (b, c): BLOCKS blocks of four features, COLS columns."""
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    zero = tl.zeros((BLOCKS, COLS), tl.uint32)
    step = (tl.load(Step) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + (blocks.to(tl.uint32) | (STREAM << 16))[:, None],
        zero + step,
        zero + cols.to(tl.uint32)[None, :],
        zero,
        low.to(tl.uint32),
        high.to(tl.uint32),
    )
    n0, n1 = _normals(w0, w1)
    n2, n3 = _normals(w2, w3)
    _store_row(Slices, 4 * blocks, cols, D, S, n0)
    _store_row(Slices, 4 * blocks + 1, cols, D, S, n1)
    _store_row(Slices, 4 * blocks + 2, cols, D, S, n2)
    _store_row(Slices, 4 * blocks + 3, cols, D, S, n3)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def unit_slices(step: Tensor, seed: int, features: int, count: int) -> Tensor:
    """[D, S] float32 for ``step`` [] int64, which stays on its device."""
    architecture(step)  # an error on a GPU that is too old
    slices = step.new_empty((features, count), dtype=torch.float32)
    grid = triton.cdiv(triton.cdiv(features, 4), BLOCKS), triton.cdiv(count, COLS)
    with torch.cuda.device_of(step):
        _unit_slices_kernel[grid](
            step, slices, features, count, _signed(seed & LOW), _signed(seed >> 32 & LOW),
            STREAM=stream_of("slices"), BLOCKS=BLOCKS, COLS=COLS, num_warps=WARPS,
        )  # fmt: skip
        return slices.div_(torch.linalg.vector_norm(slices, dim=0))
