"""Streaming log-sum-exp of scaled similarities: the one primitive under every softmax contrastive loss.

    s_ij = scale · q_i·k_j + bias_j          over the pairs with row_id_i ≠ col_id_j
    row_lse_i = log Σ_j exp s_ij,   col_lse_j = log Σ_i exp s_ij

The M × N matrix is never stored: tiles are computed, used and dropped, and recomputed in the backward. The mathematics
is in ``docs/similarity_lse.md``; the operators are in ``_similarity_operators.py``.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _backends, _native
from .._checks import accumulator, check_integers, check_keys, readable, scalar_tensor
from ._similarity_operators import by_reference
from .types import SimilarityTerms

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


def _check_positives(positives: Tensor, q: Tensor, k: Tensor) -> None:
    check_integers("positives", positives, q.shape[0], q.device)
    if readable(positives):
        low, high = (int(x) for x in torch.aminmax(positives))
        if low < -1 or high >= k.shape[0]:
            raise ValueError(
                f"positives must be columns of k, 0 to {k.shape[0] - 1}, or -1 for none; got {low} to {high}"
            )


def similarity_terms(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
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
    check_keys(q, k)
    if (row_ids is None) != (col_ids is None):
        raise ValueError("row_ids and col_ids must be given together: pairs with equal ids are excluded")
    if row_ids is not None and col_ids is not None:
        check_integers("row_ids", row_ids, q.shape[0], q.device)
        check_integers("col_ids", col_ids, k.shape[0], q.device)
    if bias is not None and (bias.shape != (k.shape[0],) or not bias.is_floating_point() or bias.device != q.device):
        raise ValueError(
            f"bias must be a floating-point tensor of shape ({k.shape[0]},) on {q.device}, "
            f"got shape {tuple(bias.shape)}, {bias.dtype}, on {bias.device}"
        )
    if positives is not None:
        _check_positives(positives, q, k)
        positives = positives.long()
    tau = scalar_tensor("scale", scale, q)
    preferred = "triton" if q.device.type == "cuda" else "cpu"
    backend = _backends.select("similarity_lse", preferred, lambda name: why_not(name, q))
    with_itself = q is k and row_ids is col_ids and bias is None and not columns
    row_ids = None if row_ids is None else row_ids.long()
    col_ids = row_ids if with_itself else None if col_ids is None else col_ids.long()
    bias = None if bias is None else bias.to(accumulator(q))
    if backend == "reference":
        # Kernels keep nothing of keys that do not learn, so a queue may be overwritten before the backward: here too.
        keys = k.clone() if torch.is_grad_enabled() and q.requires_grad and not k.requires_grad else k
        row, col, positive, largest = by_reference(q, keys, tau, bias, row_ids, col_ids, positives)
    else:
        row, col, positive, largest = _by_kernel(
            backend, q, k, tau, bias, row_ids, col_ids, columns, positives, hardest, with_itself
        )
    return SimilarityTerms(
        row, col if columns else None, None if positives is None else positive, largest if hardest else None
    )


def _by_kernel(
    backend: str,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    columns: bool,
    positives: Tensor | None,
    hardest: bool,
    with_itself: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator that does the least work for this call."""
    ops = torch.ops.sslfast
    suffix = "_triton" if backend == "triton" else ""
    grad = torch.is_grad_enabled()
    if with_itself:
        cache = _self_tile_cache(q) if backend == "cpu" and grad and (q.requires_grad or scale.requires_grad) else 0
        function = getattr(ops, f"similarity_lse_self{suffix}")
        row, positive, largest, *_ = function(q, scale, row_ids, positives, hardest, cache)
        return row, row, positive, largest
    keys_learn = grad and (k.requires_grad or (bias is not None and bias.requires_grad))
    # With a positive among the columns, scale·(attended − k_p) would cancel where the positive dominates: there the
    # gradient is made from weights in which it is already subtracted.
    if grad and q.requires_grad and positives is None and not (keys_learn or columns or hardest):
        row, _ = getattr(ops, f"similarity_lse_attend{suffix}")(q, k, scale, bias, row_ids, col_ids)
        return row, row, row, row
    learns = keys_learn or (grad and (q.requires_grad or scale.requires_grad))
    cache = _tile_cache(q, k) if backend == "cpu" and learns else 0
    row, col, positive, largest, *_ = getattr(ops, f"similarity_lse{suffix}")(
        q, k, scale, bias, row_ids, col_ids, positives, columns, hardest, cache
    )
    return row, col, positive, largest


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: Literal[False] = False,
) -> Tensor: ...


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def similarity_lse(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp of scaled similarities along the rows, and along the columns if asked, from one pass.

    ``row_lse_i = log Σ_j exp(scale·q_i·k_j + bias_j)`` over the columns with ``col_ids[j] != row_ids[i]``. Time grows
    as M·N·D, extra memory as (M + N)·D: the M × N matrix is never stored. (On a CPU at most 42 MiB of it are kept for
    the backward.) ``similarity_lse(z, z, ...)`` with the same tensor, and the same ids, uses the symmetry: half the
    work. Where only ``q`` learns (a queue, a frozen tower), its gradient comes along in the forward.

    Args:
        q: [M, D]; k: [N, D]; float32, float64, bfloat16 or float16, any strides. Used as they are: normalise first
            (:func:`sslfast.l2_normalize`) for cosines.
        scale: multiplies the dot products, ``1/τ``; a float, or a one-element tensor, which receives its gradient. Any
            sign.
        bias: [N] added to every logit of a column (default: none).
        row_ids, col_ids: [M] and [N] integers; pairs with equal ids take no part (default: all take part). Given
            together. With ``arange`` for both, a row leaves itself out.
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
