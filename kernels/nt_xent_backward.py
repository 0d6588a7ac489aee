"""Gradients of NT-Xent: see ``nt_xent.py`` for the notation and the formulas."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Config, architecture, launch_options
from ._configs import NT_XENT_BACKWARD, config_for
from ._gradient_forms import gradient_form
from ._owner import load_tile_rows, owner_grid, store_gradient, tiles_of_part
from ._tiles import EXACT, LOG2E, PLAIN_LIMIT, dot_products, load_rows, overlap, padded
from .similarity_bands import Terms, band_gradients, finish

# Parts of the columns of one row block at the most.
MAX_SPLIT = 8


@triton.jit(do_not_specialize=["M"])
def _nt_xent_stats_kernel(
    RowMax,  # [M]
    RowSum,  # [M]
    Stats,  # [2, M]: 1/sum, and 2^(−max)/sum
    InRange,  # [blocks]: 1 where |max| ≤ PLAIN_LIMIT in the whole block
    M,
    BLOCK: tl.constexpr,
):
    """What the backward needs of each column, once instead of once a tile."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(RowMax + rows, mask=rows < M, other=0.0)
    inverse = 1.0 / tl.load(RowSum + rows, mask=rows < M, other=1.0)
    tl.store(Stats + rows, inverse, mask=rows < M)
    tl.store(Stats + M + rows, tl.exp2(-top) * inverse, mask=rows < M)
    tl.store(InRange + tl.program_id(0), tl.min((tl.abs(top) <= PLAIN_LIMIT).to(tl.int32), 0))


@triton.jit(do_not_specialize=["M"])
def _nt_xent_backward_kernel(
    GradLoss,  # []
    Z,  # [M, D]
    Temperature,  # []
    RowMax,  # [M]
    Stats,  # [2, M]
    InRange,  # [cdiv(M, BLOCK_N)]
    RowRest,  # [M]: 1 − P_ip
    DZ,  # [splits, M, D]
    RowDot,  # [splits, chunks, M]: z_i·dz_i over this program's features and columns
    M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (b, c, h): row block b, features [c·BLOCK_D, (c+1)·BLOCK_D) of dz, the h-th part of the columns.

    W is formed without its factor g/M, which float16 could not hold for many rows, and for float16 times 2^14: |W| ≤ 2
    then fills its range, and P stays normal down to 4e-9. Both factors come in at the end, in float32.
    """
    W_SCALE: tl.constexpr = 16384.0 if Z.dtype.element_ty == tl.float16 else 1.0
    N = M // 2
    temperature = tl.load(Temperature)
    scale = tl.full((), LOG2E, tl.float32) / temperature
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    partner = tl.where(rows < N, rows + N, rows - N)
    chunk = tl.program_id(1) * BLOCK_D
    top_i = tl.load(RowMax + rows, mask=rows < M, other=0.0)
    inverse_i = tl.load(Stats + rows, mask=rows < M, other=0.0) * W_SCALE
    weight_i = tl.load(Stats + M + rows, mask=rows < M, other=0.0) * W_SCALE
    rest_i = tl.load(RowRest + rows, mask=rows < M, other=0.0) * W_SCALE
    rows_in_range = tl.min((tl.abs(top_i) <= PLAIN_LIMIT).to(tl.int32), 0) != 0
    zi = load_rows(Z, rows, 0, M, D, BLOCK_K, UPCAST)
    dz = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    _, begin, end = tiles_of_part(M, BLOCK_N)
    for tile in range(begin, end):
        col0, cols, zj = load_tile_rows(Z, tile, chunk, M, D, BLOCK_N, BLOCK_D, UPCAST)
        s = dot_products(zi, zj, Z, Z, rows, cols, M, M, D, BLOCK_K, PRECISION, UPCAST) * scale

        plain = rows_in_range & (tl.load(InRange + tile) != 0) & (col0 + BLOCK_N <= M)
        plain = plain & (overlap(row0, BLOCK_M, col0, BLOCK_N) == 0)
        plain = plain & (overlap(row0 + N, BLOCK_M, col0, BLOCK_N) == 0)
        plain = plain & (overlap(row0 - N, BLOCK_M, col0, BLOCK_N) == 0)
        if plain:
            # P_ij + P_ji = 2^s (2^(−max_i)/sum_i + 2^(−max_j)/sum_j): one exponential for two probabilities. s is at
            # most either maximum, so nothing overflows, and where 2^s underflows both probabilities are below 2^−66.
            weight_j = tl.load(Stats + M + cols) * W_SCALE
            w = tl.exp2(s) * (weight_i[:, None] + weight_j[None, :])
        else:
            # The exact form. Where P_ip is nearly 1, P_ip − 1 would be rounding: the share of all others is known.
            top_j = tl.load(RowMax + cols, mask=cols < M, other=0.0)
            inverse_j = tl.load(Stats + cols, mask=cols < M, other=0.0) * W_SCALE
            rest = rest_i[:, None] + (tl.load(RowRest + cols, mask=cols < M, other=0.0) * W_SCALE)[None, :]
            w = tl.exp2(s - top_i[:, None]) * inverse_i[:, None] + tl.exp2(s - top_j[None, :]) * inverse_j[None, :]
            w = tl.where(cols[None, :] == partner[:, None], -rest, w)
            w = tl.where((rows[:, None] != cols[None, :]) & (cols[None, :] < M), w, 0.0)
        dz = tl.dot(w.to(zj.dtype), zj, dz, input_precision=PRECISION)

    dz = dz * (tl.load(GradLoss) / (temperature * M * W_SCALE))
    store_gradient(DZ, RowDot, Z, dz, dz, rows, chunk, M, D, BLOCK_D, UPCAST)


def nt_xent_backward(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the loss.

    Args:
        grad_loss: [] float32.
        z, temperature: as given to :func:`nt_xent_forward`; row_max, row_sum, row_rest: [M] float32, what it returned.

    Returns:
        dz [M, D] and dtemperature [], float32.
    """
    features = z.shape[1]
    z = padded(z)
    config = config_for(NT_XENT_BACKWARD, architecture(z), z.element_size(), z.shape[1])
    found = None
    with torch.cuda.device_of(z):
        if gradient_form(z, 1, config) == "banded":
            found = _banded(grad_loss, z, temperature, row_max, row_sum, row_rest)
        if found is None:
            found = _streamed(grad_loss, z, temperature, (row_max, row_sum, row_rest), config)
    dz, dtemperature = found
    return dz[:, :features].contiguous(), dtemperature


def _banded(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, row_max: Tensor, row_sum: Tensor, row_rest: Tensor
) -> tuple[Tensor, Tensor] | None:
    """``None`` where memory has no room for a band."""
    # As W_SCALE in the streamed kernel: float16 cannot hold the factor g/M, which comes in at the end.
    w_scale = 16384.0 if z.dtype == torch.float16 else 1.0
    factor = z.new_full((), w_scale, dtype=torch.float32) if w_scale != 1.0 else None
    terms = Terms(None, row_max, row_sum, None, row_max, row_sum, grad_positive=row_rest, factor=factor, pairs=True)
    found = band_gradients(z, z, temperature, terms, True, False, False)
    if found is None:
        return None
    dz = found[0]
    assert dz is not None
    multiplier = grad_loss / (temperature * (len(z) * w_scale))
    dots = finish(z, dz, multiplier)
    return dz, dots * multiplier * (-0.5 / temperature)


def _streamed(
    grad_loss: Tensor, z: Tensor, temperature: Tensor, rows: tuple[Tensor, Tensor, Tensor], config: Config
) -> tuple[Tensor, Tensor]:
    row_max, row_sum, row_rest = rows
    m, d = z.shape
    grid = owner_grid(z, m, config, most=MAX_SPLIT)
    col_blocks = triton.cdiv(m, config.block_n)
    stats = z.new_empty((2, m), dtype=torch.float32)
    in_range = z.new_empty(col_blocks, dtype=torch.int32)
    dz = z.new_empty((grid.parts, m, d), dtype=torch.float32)
    row_dot = z.new_empty((grid.parts, grid.chunks, m), dtype=torch.float32)
    _nt_xent_stats_kernel[(col_blocks,)](
        row_max, row_sum, stats, in_range, m, BLOCK=config.block_n, num_warps=1, **EXACT
    )
    _nt_xent_backward_kernel[grid](
        grad_loss, z, temperature, row_max, stats, in_range, row_rest, dz, row_dot, m,
        **launch_options(config, z), **EXACT,
    )  # fmt: skip
    return dz[0] if grid.parts == 1 else dz.sum(0), row_dot.sum() * (-0.5 / temperature)
