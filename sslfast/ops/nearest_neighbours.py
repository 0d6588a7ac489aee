"""The largest dot products or the smallest distances of every row, with their columns, without the M × N matrix.

Tiles of similarities are computed, what is largest in them is kept, and they are dropped. On a CPU, rows against
themselves cost half: a tile serves its rows and its columns. Gradients reach the pairs that were found, by the operator
of ``neighbour_distance.py``. The mathematics is in ``docs/nearest_neighbours.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _backends, _library, _native, reference
from .._checks import accumulator, whole_number, without_autocast
from .l2_normalize import EPS, normalized
from .neighbour_distance import gradients, neighbour_distance
from .types import Pairs

BACKENDS = ("cpu", "triton", "reference")
METRICS = ("dot", "euclidean")


class Neighbours(NamedTuple):
    """What :func:`sslfast.nearest_neighbours` finds, both [M, count], the nearest first.

    Attributes:
        similarity: ``q_i·k_n``, or ``−‖q_i − k_n‖²``; −inf where there is no neighbour.
        index: n, int64; −1 where there is none.

    Example:
        >>> found = sslfast.nearest_neighbours(torch.eye(2), torch.tensor([[0.0, 3.0], [2.0, 0.0]]))
        >>> found.similarity.tolist(), found.index.tolist()
        ([[2.0], [3.0]], [[1], [0]])
    """

    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # in place of tuple.index


def why_not(backend: str, q: Tensor) -> str | None:
    """The reason ``backend`` cannot serve inputs like ``q``, or ``None`` if it can."""
    if backend == "cpu":
        return _native.why_no_cpu(q.device, "q")
    if backend == "triton":
        if q.dtype == torch.float64:
            return "the Triton kernel takes float32, bfloat16 and float16, not float64"
        return _native.why_no_triton(q.device)
    return f"nearest_neighbours has no {backend} implementation"


def _fake(
    q: Tensor, k: Tensor | None, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], count)
    return q.new_empty(shape, dtype=accumulator(q)), q.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, *_ = inputs
    ctx.save_for_backward(q, k, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_with(suffix: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        q, k, index = ctx.saved_tensors
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, q, k)):
            kind = accumulator(q)

            def function(q: Tensor, k: Tensor | None) -> Tensor:  # of the pairs that were found
                return reference.neighbour_similarity(q.to(kind), None if k is None else k.to(kind), index)

            found = _library.second_order(function, (q, k), ctx.needs_input_grad[:2], grad)
        else:
            found = gradients(f"neighbour_gradient{suffix}", grad, None, index, q, k, 0.0, ctx)
        return (*found, *(None,) * 4)

    return backward


def _triton(
    q: Tensor, k: Tensor | None, bias: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    from ..kernels import nearest_neighbours as kernel

    return kernel.nearest_neighbours(q, k, bias, row_ids, col_ids, count)


for _suffix in ("", "_triton"):
    _library.define(
        f"nearest_neighbours{_suffix}(Tensor q, Tensor? k, Tensor? bias, Tensor? row_ids, Tensor? col_ids, int count)"
        " -> (Tensor similarity, Tensor index)",
        _fake,
    )
    _library.autograd(f"nearest_neighbours{_suffix}", _backward_with(_suffix), _setup_context)
_library.implement("nearest_neighbours_triton", _triton, "CUDA", "CPU")


def neighbours_of(
    q: Tensor,
    k: Tensor | None,
    count: int,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Neighbours:
    """:func:`nearest_neighbours` of arguments that have been checked; ids are int64.

    ``bias`` [N], of the accumulator's dtype and without gradient, is added to the similarities of a column (without
    ``k`` of a row too, which moves all of a row alike).
    """
    backend = _backends.serve("nearest_neighbours", q, "triton", why_not)
    if backend == "reference":
        kind = accumulator(q)
        keys = None if k is None else k.to(kind)
        with without_autocast(q):
            found = reference.nearest_neighbours(q.to(kind), keys, count, bias=bias, row_ids=row_ids, col_ids=col_ids)
            return Neighbours(*found)
    name = "nearest_neighbours_triton" if backend == "triton" else "nearest_neighbours"
    return Neighbours(*_library.run(name, q, k, bias, row_ids, col_ids, count))


def by_distance(
    q: Tensor, k: Tensor | None, count: int, row_ids: Tensor | None = None, col_ids: Tensor | None = None
) -> Neighbours:
    """The same by distance: ``−‖q_i − k_n‖²`` in place of similarities, taken from the differences."""
    with torch.no_grad():
        columns = (q if k is None else k).detach()
        bias = -0.5 * columns.to(accumulator(q)).square().sum(1)  # exact where the squares are: ties stay ties
        index = neighbours_of(q.detach(), None if k is None else columns, count, row_ids, col_ids, bias=bias).index
    similarity = -neighbour_distance(q, k, index, 0.0).square()
    index = index.masked_fill(similarity == float("-inf"), -1)
    if count > 1:  # rounding may have ordered those that are nearly as far otherwise
        place = index.argsort(dim=1, stable=True)
        place = place.gather(1, similarity.detach().gather(1, place).argsort(dim=1, descending=True, stable=True))
        similarity, index = similarity.gather(1, place), index.gather(1, place)
    return Neighbours(similarity, index)


def nearest_neighbours(
    q: Tensor,
    k: Tensor | None = None,
    count: int = 1,
    *,
    metric: str = "dot",
    normalize: bool = False,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> Neighbours:
    """The ``count`` rows of k nearest to each row of q, by the largest dot products or by the smallest distances.

    Time grows as M·N·D, extra memory as (M + N)·D: the M × N matrix is never stored. (On a GPU, ``count`` > 1 stores
    bands of it, of at most 256 MiB.) Without ``k`` the rows of q are taken against themselves, each without itself,
    which costs half on a CPU.

    The result is the same in every run and on any number of threads: of equal similarities the one with the smaller
    index comes first. NaN counts as the largest, as in ``torch.topk``; a similarity of −inf counts as none.

    Args:
        q: [M, D]; k: [N, D]; float32, float64, bfloat16 or float16, any strides. Default of k: the rows of q.
        count: how many neighbours of each row, from 1 (default) to N, without ``k`` to M − 1.
        metric: "dot" (default), or "euclidean": the similarity is ``−‖q_i − k_n‖²``. Neighbours are then found by
            ``q_i·k_j − ½‖k_j‖²``, and their distances taken from the differences; of rows far from the origin, whose
            squared norms have few digits left for distances, subtract what they have in common first.
        normalize: divide every row by ``max(‖row‖₂, 1e-12)`` first, so that similarities are cosines (default: not).
        row_ids, col_ids: [M] and [N] integers; pairs with equal ids take no part (default: all take part). Given
            together; without k, ``row_ids`` alone.

    Returns:
        ``(similarity, index)``, both [M, count], the largest first: float32 (float64 for float64 inputs), and int64. A
        row with fewer than ``count`` columns left has −inf and −1 in their place. Similarities are differentiable in q
        and k, in O(M·count·D), twice through the reference; the index has no gradient.

    Raises:
        TypeError: dtypes differ or are not floating point, ids are not integers.
        ValueError: shapes, widths, devices or lengths do not fit; ``count`` is not a whole number in its range; only
            one of row_ids and col_ids is given; another ``metric``.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> similarity, index = sslfast.nearest_neighbours(z)
        >>> index[:, 0].tolist()
        [1, 0, 1]
        >>> sslfast.nearest_neighbours(torch.tensor([[2.0]]), torch.tensor([[3.0], [9.0]]), metric="euclidean")
        Neighbours(similarity=tensor([[-1.]]), index=tensor([[0]]))
    """
    pairs = Pairs(q, k, cast(Tensor, 1.0), None, row_ids, col_ids)
    pairs.check()
    count = _checked_count(count, pairs)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    row_ids, col_ids = (None if ids is None else ids.long() for ids in (row_ids, col_ids))
    if normalize:
        backend = _backends.serve("nearest_neighbours", q, "triton", why_not)
        q, k = normalized(q, EPS, backend), None if k is None else normalized(k, EPS, backend)
    return (by_distance if metric == "euclidean" else neighbours_of)(q, k, count, row_ids, col_ids)


def _checked_count(count: Any, pairs: Pairs) -> int:
    if pairs.k is None:
        return whole_number("count", count, 1, pairs.q.shape[0] - 1, "other rows of q")
    return whole_number("count", count, 1, pairs.k.shape[0], "rows of k")
