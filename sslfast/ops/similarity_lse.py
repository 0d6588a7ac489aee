"""Streaming log-sum-exp of scaled similarities: the one primitive under every softmax contrastive loss.

    s_ij = scale · q_i·k_j + bias_j          over the pairs with row_id_i ≠ col_id_j
    row_lse_i = log Σ_j exp s_ij,   col_lse_j = log Σ_i exp s_ij

The M × N matrix is never stored: tiles are computed, used and dropped, and recomputed in the backward. The mathematics
is in ``docs/similarity_lse.md``; the operators are in ``_similarity_operators.py``.
"""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .. import _backends, _library, _native
from .._checks import accumulator
from . import _similarity_launches as _similarity_launches
from ._similarity_operators import by_reference
from .types import ROW_LSE, Pairs, SimilarityTerms, Want

BACKENDS = ("cpu", "triton", "reference")

# Bytes of similarity tiles that a CPU forward keeps for its backward, at most; a constant, so that no buffer grows as
# M·N. With the packed rows and their gradients (20 MiB) a step at M = N = 8192, D = 128 then stays below 64 MiB.
TILE_CACHE = 42 * 2**20
LEAST_CACHE = 16 * 2**20
TILE = 192  # most rows and columns of a tile


def why_not(backend: str, q: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``q``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(q.device, "q")
    if backend == "triton":
        if q.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(q.device)
    return f"similarity_lse has no {backend} implementation"


def _tile_cache(q: Tensor, k: Tensor) -> int:
    """How many numbers of tiles the rectangular CPU forward keeps for its backward."""
    return min((q.shape[0] + TILE) * (k.shape[0] + TILE), TILE_CACHE // accumulator(q).itemsize)


def _self_tile_cache(z: Tensor) -> int:
    """The same for rows against themselves, where tiles on and above the diagonal are enough."""
    rows = z.shape[0]
    every_tile = max((rows + TILE) * (rows + 2 * TILE) // 2, 36 * TILE * (rows // 8 + 33))
    # Two views make twice the rows: beyond 8,192 of them at D = 128 the cache gives way to the packed rows.
    size = accumulator(z).itemsize
    room = TILE_CACHE + 5 * (2**22 - rows * z.shape[1] * size)
    return min(every_tile, min(max(room, LEAST_CACHE), TILE_CACHE) // size)


def similarity_terms(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
    positives: Tensor | None = None,
    hardest: bool = False,
) -> SimilarityTerms:
    """Everything that one pass over the tiles of ``s_ij = scale·q_i·k_j + bias_j`` can give.

    :func:`similarity_lse` with two more results. ``positive_i`` is the very number that stands in the sums, so that
    ``row_lse − positive`` loses nothing where the positive dominates, and its gradient is subtracted inside the tile,
    before the product, for the same reason.

    Args:
        positives: [M] integers, the column of each row's positive, or −1 for none (then ``positive_i`` = 0). Its logit
            is given also where the ids exclude it from the sums (decoupled losses).
        hardest: also give the largest negative logit of each row.
        The others are those of :func:`similarity_lse`, and so are the errors; a positive outside ``k`` is a ValueError
        on a CPU (on a GPU it is not read, and counts as none).

    Example:
        >>> ids = torch.arange(4)  # InfoNCE of rows and columns, from one pass
        >>> terms = sslfast.similarity_terms(torch.eye(4), torch.eye(4), 2.0, positives=ids, columns=True)
        >>> round((terms.row_lse + terms.col_lse - 2 * terms.positive).mean().item() / 2, 4)
        0.3408
    """
    pairs = Pairs(q, k, cast(Tensor, scale), bias, row_ids, col_ids, positives).checked()
    pairs.check_positives(len(pairs.columns))
    return terms_of(pairs, Want(columns, hardest))


def terms_of(pairs: Pairs, want: Want = ROW_LSE) -> SimilarityTerms:
    """:func:`similarity_terms` of pairs that have been checked."""
    backend = _backends.serve("similarity_lse", pairs.q, "triton", why_not)
    if pairs.bias is not None or want.columns:  # the symmetric tiles have neither
        pairs = pairs.rectangular()
    if backend == "reference":
        found = _by_reference(pairs)
    elif pairs.k is None:
        found = _by_self_kernel(backend, pairs, want)
    else:
        found = _by_kernel(backend, pairs, pairs.k, want)
    return SimilarityTerms(
        found.row_lse,
        found.col_lse if want.columns else None,
        None if pairs.positives is None else found.positive,
        found.hardest if want.hardest else None,
    )


def _by_reference(pairs: Pairs) -> SimilarityTerms:
    pairs = pairs.rectangular()
    # Kernels keep nothing of keys that do not learn, so a queue may be overwritten before the backward: here too.
    if torch.is_grad_enabled() and pairs.q.requires_grad and not pairs.columns.requires_grad:
        pairs = pairs._replace(k=pairs.columns.clone())
    return by_reference(pairs)


def _run(name: str, backend: str, *args: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = _library.run(f"{name}_triton" if backend == "triton" else name, *args)
    return found


def _by_self_kernel(backend: str, pairs: Pairs, want: Want) -> SimilarityTerms:
    """Tiles on and above the diagonal serve their rows and their columns."""
    z, scale = pairs.q, pairs.scale
    learns = torch.is_grad_enabled() and (z.requires_grad or scale.requires_grad)
    cache = _self_tile_cache(z) if backend == "cpu" and learns else 0
    given = z, scale, pairs.row_ids, pairs.positives, want.hardest, cache
    row, positive, hardest, *_ = _run("similarity_lse_self", backend, *given)
    return SimilarityTerms(row, None, positive, hardest)


def _by_kernel(backend: str, pairs: Pairs, k: Tensor, want: Want) -> SimilarityTerms:
    """The operator that does the least work for this call."""
    grad = torch.is_grad_enabled()
    q, bias = pairs.q, pairs.bias
    keys_learn = grad and (k.requires_grad or (bias is not None and bias.requires_grad))
    # With a positive among the columns, scale·(attended − k_p) would cancel where the positive dominates: there the
    # gradient is made from weights in which it is already subtracted.
    if grad and q.requires_grad and pairs.positives is None and not (keys_learn or want.columns or want.hardest):
        row, _ = _run("similarity_lse_attend", backend, q, k, pairs.scale, bias, pairs.row_ids, pairs.col_ids)
        return SimilarityTerms(row, None, None, None)
    learns = keys_learn or (grad and (q.requires_grad or pairs.scale.requires_grad))
    cache = _tile_cache(q, k) if backend == "cpu" and learns else 0
    row, col, positive, hardest, *_ = _run("similarity_lse", backend, *pairs, *want, cache)
    return SimilarityTerms(row, col, positive, hardest)


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: Literal[False] = False,
) -> Tensor: ...


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp of scaled similarities along the rows, and along the columns if asked, from one pass.

    ``row_lse_i = log Σ_j exp(scale·q_i·k_j + bias_j)`` over the columns with ``col_ids[j] != row_ids[i]``. Time grows
    as M·N·D, extra memory as (M + N)·D: the M × N matrix is never stored. (On a CPU at most 42 MiB of it are kept for
    the backward.) Without ``k`` the rows are taken against themselves, which costs half. Where only ``q`` learns (a
    queue, a frozen tower), its gradient comes along in the forward.

    Args:
        q: [M, D]; k: [N, D]; float32, float64, bfloat16 or float16, any strides. Used as they are: normalise first
            (:func:`sslfast.l2_normalize`) for cosines. Default of k: the rows of q themselves.
        scale: multiplies the dot products, ``1/τ`` (default 1); a float, or a one-element tensor, which receives its
            gradient. Any sign.
        bias: [N] added to every logit of a column (default: none).
        row_ids, col_ids: [M] and [N] integers; pairs with equal ids take no part (default: all take part). Given
            together; without k, ``row_ids`` alone, and ``arange`` leaves each row out of its own sum.
        columns: also return the column LSE.

    Returns:
        ``row_lse`` [M], or ``(row_lse, col_lse)`` [M], [N]; float32 (float64 for float64 inputs). A row or column whose
        every pair is excluded has −inf and zero gradient. Differentiable in q, k, scale and bias; twice through the
        reference, with the matrix in memory.

    Raises:
        TypeError: dtypes differ or are not floating point, ids are not integers.
        ValueError: shapes, widths, devices or lengths do not fit; only one of row_ids and col_ids is given.

    Source: the online maximum is that of Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"; the
    tiling that of Dao et al. 2022, "FlashAttention".

    Example:
        >>> row_lse = sslfast.similarity_lse(torch.zeros(2, 8), torch.zeros(5, 8), 1.0)
        >>> [round(x, 4) for x in row_lse.tolist()]  # log 5
        [1.6094, 1.6094]
    """
    terms = similarity_terms(q, k, scale, bias=bias, row_ids=row_ids, col_ids=col_ids, columns=columns)
    if terms.col_lse is not None:
        return terms.row_lse, terms.col_lse
    return terms.row_lse
