"""Whether s_ij and s_ji, and the forward's and the backward's logits, are one number to the last bit.

NT-Xent computes tiles above the diagonal alone and recomputes them in the backward with other tiles: the sum over a row
holds s_ij, its gradient s_ji. In 16 bits both are chains of the same products in the same order; float32 by three
passes of TF32 adds small·large before large·small, so it may differ in the last bit: rounding, no more.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from sslfast.kernels._common import architecture, dot_precision, upcast
from sslfast.kernels._tiles import EXACT, wide_products
from torch import Tensor

from .steps import Context

ROWS = 128


@triton.jit
def _products_kernel(
    Z, S, M, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = wide_products(Z, Z, rows, cols, M, M, D, BLOCK_K, PRECISION, UPCAST)
    tl.store(S + rows[:, None] * M + cols[None, :], s)


def products(z: Tensor, config: Any) -> Tensor:
    """z zᵀ in float32, by tiles of ``config``."""
    m, d = z.shape
    s = torch.empty(m, m, dtype=torch.float32, device=z.device)
    block_k = min(config.block_k, triton.next_power_of_2(d))
    _products_kernel[(m // config.block_m, m // config.block_n)](
        z, s, m, D=d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(z.dtype), UPCAST=upcast(z.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, **EXACT,
    )  # fmt: skip
    return s


def check(context: Context, dtype: torch.dtype) -> str:
    """Both questions for narrow and wide rows; an error in 16 bits, a note in float32."""
    configs = importlib.import_module("sslfast.kernels._configs")
    notes = []
    for d, wide in ((128, False), (512, True)):
        z = torch.randn(ROWS, d, generator=torch.Generator().manual_seed(0)).to(context.device, dtype)
        tables = configs.NT_XENT_FORWARD, configs.NT_XENT_BACKWARD
        both = [table[architecture(z), z.element_size(), wide] for table in tables]
        found = [products(z, config) for config in both]
        exact = z.double() @ z.double().T
        if not (found[0].double() - exact).abs().max() <= 1e-4 * d:
            raise AssertionError(f"D = {d}: the products themselves are wrong")
        for what, a, b in (
            ("s and its transpose, tiles of the forward", found[0], found[0].T),
            ("s and its transpose, tiles of the backward", found[1], found[1].T),
            ("s of the forward's tiles and of the backward's", found[0], found[1]),
        ):
            differing = int((a != b).sum())
            if differing:
                notes.append(f"D = {d}: {what} differ in {differing} of {a.numel()} entries")
    # NumPy's product, in the interpreter, rounds by the size of a tile.
    if notes and dtype != torch.float32 and not context.rehearse:
        raise AssertionError("; ".join(notes))
    return "; ".join(notes)
