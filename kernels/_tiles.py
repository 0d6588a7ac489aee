"""Device functions that the kernels over tiles of similarities share, and the launch options these rely on.

A logit ``x_ij = scale·q_i·k_j + bias_j``, in base 2, must be one number wherever it is used, so that a positive's logit
cancels against an equal maximum. Fusing the product dot·scale into a subtraction would break that, so every launch
takes the options ``EXACT``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# |x| in base 2 up to which 2^x, 2^−x and sums of up to 2^66 of them are far from float32's limits (2^±126).
PLAIN_LIMIT = tl.constexpr(60.0)
# From so many logits on, a forward's time without maxima is worth the two launches that find their bound.
BOUND_FROM = 1 << 24

# Features are padded to a multiple of ALIGN, so that every row starts at a 16-byte boundary and loads are vectors:
# the addresses of single elements alone would fill the registers.
ALIGN = 8
MERGE_ROWS = 32


def padded(z: Tensor) -> Tensor:
    """[M, D] with D a multiple of ALIGN; zero features change no dot product."""
    return z if z.shape[1] % ALIGN == 0 else torch.nn.functional.pad(z, (0, -z.shape[1] % ALIGN))


@triton.jit
def load_rows(Z, rows, first, M, D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """``Z[rows, first : first + WIDTH]`` with zeros outside [M, D]: zero features change no dot product."""
    features = first + tl.arange(0, WIDTH)
    inside = rows[:, None] < M
    if D % WIDTH != 0:
        inside = inside & (features[None, :] < D)
    z = tl.load(Z + rows.to(tl.int64)[:, None] * D + features[None, :], mask=inside, other=0.0)
    if UPCAST:
        z = z.to(tl.float32)
    return z


@triton.jit
def wide_products(
    A, B, rows, cols, M, N, D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """``A[rows] @ B[cols].T`` in float32, BLOCK_K features at a time; A is [M, D], B is [N, D]."""
    products = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for first in range(0, D, BLOCK_K):
        a = load_rows(A, rows, first, M, D, BLOCK_K, UPCAST)
        b = load_rows(B, cols, first, N, D, BLOCK_K, UPCAST)
        products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
    return products


@triton.jit
def dot_products(
    a, b, A, B, rows, cols, M, N,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``A[rows] @ B[cols].T``; ``a`` and ``b`` are these rows where one product takes all features (D ≤ BLOCK_K)."""
    if D <= BLOCK_K:
        products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        products = wide_products(A, B, rows, cols, M, N, D, BLOCK_K, PRECISION, UPCAST)
    return products


@triton.jit
def finite_or_zero(top):
    """A maximum over nothing is −inf; 0 in its place keeps 2^(−inf − max) = 0 instead of NaN.

    Likewise +inf: an infinite logit then gives an infinite sum, as in PyTorch, and no NaN.
    """
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def log1p(x):
    """For x ≥ 0: the logarithm of the rounded 1 + x, and what the rounding lost."""
    y = 1.0 + x
    return tl.log2(y) * LN2 + (x - (y - 1.0)) / y


@triton.jit
def overlap(a, A_SIZE: tl.constexpr, b, B_SIZE: tl.constexpr):
    return (a < b + B_SIZE) & (b < a + A_SIZE)


@triton.jit
def accumulate(top, total, x):
    """One more tile of logits ``x`` [rows, columns] in the running (maximum, sum of 2^(x − maximum)) of its rows."""
    new = tl.maximum(top, tl.max(x, 1))
    safe = finite_or_zero(new)
    return new, total * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)


@triton.jit
def accumulate_bounded(total, x):
    """:func:`accumulate` for logits within ±PLAIN_LIMIT, relative to 0, with the sums of the columns.

    One exponential serves the row and the column of a pair, and nothing has to be compared.
    """
    p = tl.exp2(x)
    return total + tl.sum(p, 1), tl.sum(p, 0)


@triton.jit
def zero_or_nothing(total):
    """The level of sums relative to 0: −inf, as of a maximum over nothing, where nothing was added."""
    return tl.where(total == 0, float("-inf"), 0.0)


@triton.jit
def fold(top, total, Partial, offsets, plane, inside):
    """Merge the partials at ``offsets`` [parts, rows] into the running (top, total) [rows]."""
    tops = tl.load(Partial + offsets, mask=inside, other=float("-inf"))
    totals = tl.load(Partial + plane + offsets, mask=inside, other=0.0)
    new = tl.maximum(top, tl.max(tops, 0))
    safe = finite_or_zero(new)
    total = total * tl.exp2(top - safe) + tl.sum(totals * tl.exp2(tops - safe[None, :]), 0)
    return new, total


@triton.jit
def load_positives(Positives, rows, N):
    """The columns of the positives of ``rows`` as int32; −1, which no column equals, for any that is outside [0, N)."""
    positives = tl.load(Positives + rows)
    return tl.where((positives >= 0) & (positives < N), positives, -1).to(tl.int32)


@triton.jit(do_not_specialize=["L", "limit"])
def block_ranges_kernel(
    Ids,  # [L] or None
    Positives,  # [L] or None
    Ranges,  # [4, blocks]: lowest and highest id, lowest and highest positive
    L,
    limit,  # how many rows the positives may point at
    BLOCK: tl.constexpr,
):
    """What a tile of BLOCK rows can meet: most tiles need no comparison of ids or positives at all."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    # Rows past the end repeat the last one, which changes no range.
    rows = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), L - 1)
    if Ids is not None:
        ids = tl.load(Ids + rows)
        tl.store(Ranges + block, tl.min(ids, 0))
        tl.store(Ranges + blocks + block, tl.max(ids, 0))
    if Positives is not None:
        positives = load_positives(Positives, rows, limit)
        tl.store(Ranges + 2 * blocks + block, tl.min(tl.where(positives < 0, limit, positives), 0).to(tl.int64))
        tl.store(Ranges + 3 * blocks + block, tl.max(positives, 0).to(tl.int64))


def block_ranges(ids: Tensor | None, positives: Tensor | None, limit: int, block: int) -> Tensor | None:
    """[4, blocks] int64, see :func:`block_ranges_kernel`; ``None`` where there is nothing to compare."""
    vector = positives if ids is None else ids
    if vector is None:
        return None
    blocks = triton.cdiv(len(vector), block)
    ranges = vector.new_empty((4, blocks), dtype=torch.int64)
    block_ranges_kernel[(blocks,)](ids, positives, ranges, len(vector), limit, BLOCK=block, num_warps=1, **EXACT)
    return ranges


@triton.jit(do_not_specialize=["L", "parts", "resume"])
def merge_kernel(
    Partial,  # [2, parts, L]: maxima, then sums
    Max,  # [L], running over the launches
    Sum,  # [L], running over the launches
    Lse,  # [L]
    L,
    parts,
    resume,  # 0 in the first launch
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    seen = (rows < L) & (resume != 0)
    top = tl.load(Max + rows, mask=seen, other=float("-inf"))
    total = tl.load(Sum + rows, mask=seen, other=0.0)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        inside = (part < parts) & (rows[None, :] < L)
        top, total = fold(top, total, Partial, part.to(tl.int64) * L + rows[None, :], parts.to(tl.int64) * L, inside)
    tl.store(Max + rows, top, mask=rows < L)
    tl.store(Sum + rows, total, mask=rows < L)
    log_sum = tl.log2(tl.where(total == 0, 1.0, total))
    tl.store(Lse + rows, (top + log_sum) * LN2, mask=rows < L)  # no pair at all: top is −inf


def merge(partial: Tensor, top: Tensor, total: Tensor, lse: Tensor, resume: bool = False) -> None:
    """Fold ``partial`` [2, parts, L] into the running ``top``, ``total`` [L], and write ``lse`` [L]."""
    _, parts, length = partial.shape
    merge_kernel[(triton.cdiv(length, MERGE_ROWS),)](
        partial, top, total, lse, length, parts, int(resume), ROWS=MERGE_ROWS, PARTS=64, num_warps=4, **EXACT
    )


def largest_norm(z: Tensor) -> Tensor:
    """[] float32: the largest Euclidean norm of the rows; NaN where one of them is."""
    return torch.linalg.vector_norm(z, dim=1, dtype=torch.float32).amax()


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in vectors]
