"""The operators behind ``similarity_lse``: schemas, fake kernels and autograd, once for C++ and once for Triton.

Each keeps per row (and column) the maximum and the sum of exponentials relative to it, in base 2:
``lse = ln 2 · (max + log2 sum)``. A result that was not asked for is an empty tensor [0]. Gradients leave the backward
operators in the accumulator's dtype.

    similarity_lse         row and column LSE of q [M, D] against k [N, D]; 1U forward, 3U backward (U = 2·M·N·D);
                           on a GPU 4U backward for narrow rows
    similarity_lse_self    z against itself: 2U in all on a CPU (a tile serves its rows and its columns), 3U on a GPU
    similarity_lse_attend  only q learns: the softmax-weighted mean of k comes along in the forward; 2U in all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, reference
from .._checks import accumulator
from .types import Pairs, SimilarityTerms

_SAVED = "Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor tiles"
_IDS = "Tensor? bias, Tensor? row_ids, Tensor? col_ids"


class Inputs(NamedTuple):
    """What the rectangular operators take, in their order: :class:`Pairs`, :class:`Want` and the size of the cache."""

    q: Tensor  # [M, D]
    k: Tensor  # [N, D]
    scale: Tensor  # []
    bias: Tensor | None  # [N]
    row_ids: Tensor | None  # [M]
    col_ids: Tensor | None  # [N]
    positives: Tensor | None  # [M]
    columns: bool
    hardest: bool
    tile_cache: int

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.q, self.k, self.scale, self.bias, self.row_ids, self.col_ids, self.positives)


class Statistics(NamedTuple):
    """What a forward keeps for its backward beside the inputs."""

    row_max: Tensor
    row_sum: Tensor
    col_max: Tensor
    col_sum: Tensor
    tiles: Tensor


def like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=accumulator(x))


def _wants_graph(*tensors: Tensor | None) -> bool:
    """Under ``create_graph=True``: the gradient itself must be differentiable."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def by_reference(pairs: Pairs) -> SimilarityTerms:
    """The reference with the kernels' precision: sums of 16-bit inputs are float32, also inside an autocast region."""
    kind = accumulator(pairs.q)
    with torch.autocast(pairs.q.device.type, enabled=False):
        row, col, positive, hardest = reference.similarity_terms(
            pairs.q.to(kind),
            pairs.columns.to(kind),
            pairs.scale,
            bias=None if pairs.bias is None else pairs.bias.to(kind),
            row_ids=pairs.row_ids,
            col_ids=pairs.col_ids,
            positives=pairs.positives,
        )
    return SimilarityTerms(row, col, positive, hardest)


class _Incoming(NamedTuple):
    """Gradients that came in, ``None`` also for what was not asked for: an empty result has no gradient."""

    row: Tensor | None
    col: Tensor | None
    positive: Tensor | None

    @property
    def present(self) -> list[Tensor]:
        return [grad for grad in self if grad is not None]


def _second_order(
    pairs_of: Callable[..., Pairs], inputs: Sequence[Tensor | None], needed: Sequence[bool], incoming: _Incoming
) -> tuple[Tensor | None, ...]:
    """First derivatives that carry a graph, from the reference; ``pairs_of(*inputs)``."""

    def function(*inputs: Tensor | None) -> list[Tensor]:
        terms = by_reference(pairs_of(*inputs))
        results = (terms.row_lse, terms.col_lse, terms.positive)
        return [r for r, grad in zip(results, incoming, strict=True) if r is not None and grad is not None]

    return _library.second_order(function, inputs, needed, incoming.present)


# ------------------------------------------------------------------------------------------------------- rectangular


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = Inputs(*arguments)
    m, n = len(given.q), len(given.k) if given.columns else 0
    p, h = (m if given.positives is not None else 0), (m if given.hardest else 0)
    sizes = (m, n, p, h, m, m, n, n, given.tile_cache)
    return tuple(like(given.q, size) for size in sizes)


class BackwardInputs(NamedTuple):
    """What the rectangular backward operators take, in their order."""

    grad_row: Tensor | None
    grad_col: Tensor | None
    grad_positive: Tensor | None
    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    positives: Tensor | None
    row_max: Tensor
    row_sum: Tensor
    col_max: Tensor
    col_sum: Tensor
    tiles: Tensor
    need_q: bool
    need_k: bool
    need_bias: bool


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = BackwardInputs(*arguments)
    dq = like(given.q, *(given.q.shape if given.need_q else (0,)))
    dk = like(given.q, *(given.k.shape if given.need_k else (0,)))
    return dq, dk, torch.empty_like(given.scale), like(given.q, len(given.k) if given.need_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Inputs(*inputs)
    _row, _col, _positive, *without_gradient = output
    _hardest, *statistics = without_gradient
    ctx.save_for_backward(*given.pairs, *statistics)
    ctx.columns, ctx.positives = given.columns, given.positives is not None
    ctx.mark_non_differentiable(*without_gradient)
    ctx.set_materialize_grads(False)


def _backward_with(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> _library.Gradients:
        row, col, positive, *_ = grads
        incoming = _Incoming(row, col if ctx.columns else None, positive if ctx.positives else None)
        if not incoming.present:
            return _library.gradients(Inputs._fields)
        *pairs_saved, row_max, row_sum, col_max, col_sum, tiles = ctx.saved_tensors
        pairs = Pairs(*pairs_saved)
        need_q, need_k, need_scale, need_bias, *_ = ctx.needs_input_grad
        learning = (pairs.q, pairs.k, pairs.scale, pairs.bias)
        if _wants_graph(*incoming, *learning):

            def pairs_of(q: Tensor, k: Tensor, scale: Tensor, bias: Tensor | None) -> Pairs:
                return pairs._replace(q=q, k=k, scale=scale, bias=bias)

            needed = (need_q, need_k, need_scale, need_bias)
            dq, dk, dscale, dbias = _second_order(pairs_of, learning, needed, incoming)
            return _library.gradients(Inputs._fields, q=dq, k=dk, scale=dscale, bias=dbias)
        # dscale comes from q·dq (or k·dk), so one of the two is needed for it.
        form_q = need_q or (need_scale and not need_k)
        statistics = Statistics(row_max, row_sum, col_max, col_sum, tiles)
        operator = getattr(torch.ops.sslfast, f"{name}_backward")
        dq, dk, dscale, dbias = operator(*incoming, *pairs, *statistics, form_q, need_k, need_bias)
        return _library.gradients(
            Inputs._fields,
            q=dq.to(pairs.q.dtype) if need_q else None,
            k=dk.to(pairs.columns.dtype) if need_k else None,
            scale=dscale if need_scale else None,
            bias=dbias.to(pairs.bias.dtype) if need_bias and pairs.bias is not None else None,
        )

    return backward


# ------------------------------------------------------------------------------------------------- z against itself


class SelfInputs(NamedTuple):
    """What the operators of one set of rows take, in their order."""

    z: Tensor
    scale: Tensor
    ids: Tensor | None
    positives: Tensor | None
    hardest: bool
    tile_cache: int


def _self_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = SelfInputs(*arguments)
    m = len(given.z)
    sizes = (m, m if given.positives is not None else 0, m if given.hardest else 0, m, m, given.tile_cache)
    return tuple(like(given.z, size) for size in sizes)


def _self_backward_fake(
    grad_row: Tensor | None, grad_positive: Tensor | None, z: Tensor, scale: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    return like(z, *z.shape), torch.empty_like(scale)


def _self_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = SelfInputs(*inputs)
    _row, _positive, *without_gradient = output
    _hardest, *statistics = without_gradient
    ctx.save_for_backward(given.z, given.scale, given.ids, given.positives, *statistics)
    ctx.positives = given.positives is not None
    ctx.mark_non_differentiable(*without_gradient)
    ctx.set_materialize_grads(False)


def _self_backward_with(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor | None) -> _library.Gradients:
        row, positive, *_ = grads
        incoming = _Incoming(row, None, positive if ctx.positives else None)
        if not incoming.present:
            return _library.gradients(SelfInputs._fields)
        z, scale, ids, positives, *statistics = ctx.saved_tensors
        if _wants_graph(*incoming, z, scale):

            def pairs_of(z: Tensor, scale: Tensor) -> Pairs:
                return Pairs(z, None, scale, row_ids=ids, positives=positives).rectangular()

            need_z, need_scale, *_ = ctx.needs_input_grad
            dz, dscale = _second_order(pairs_of, (z, scale), (need_z, need_scale), incoming)
            return _library.gradients(SelfInputs._fields, z=dz, scale=dscale)
        operator = getattr(torch.ops.sslfast, f"{name}_backward")
        dz, dscale = operator(incoming.row, incoming.positive, z, scale, ids, positives, *statistics)
        return _library.gradients(SelfInputs._fields, z=dz.to(z.dtype), scale=dscale)

    return backward


# --------------------------------------------------------------------------------------------------- only q learns


ATTEND_INPUTS = ("q", "k", "scale", "bias", "row_ids", "col_ids")  # only q and the scale learn


def _attend_fake(q: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return like(q, len(q)), like(q, *q.shape)


def _attend_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, scale, *ids = inputs
    _row, attended = output
    # The first derivative does not read k, so it is not saved as something that must stay: a queue may take in new keys
    # before the backward. The second derivative reads it, and checks that it is what it was.
    ctx.save_for_backward(q, scale, *ids, attended)
    ctx.k, ctx.k_version = k, k._version
    ctx.mark_non_differentiable(attended)
    ctx.set_materialize_grads(False)


def _attend_backward(ctx: Any, grad_row: Tensor | None, _: Tensor | None) -> _library.Gradients:
    if grad_row is None:
        return _library.gradients(ATTEND_INPUTS)
    q, scale, bias, row_ids, col_ids, attended = ctx.saved_tensors
    need_q, _, need_scale, *_ = ctx.needs_input_grad
    if _wants_graph(grad_row, q, scale):
        k = ctx.k
        if k._version != ctx.k_version:
            raise RuntimeError("k was overwritten after the loss was computed: create_graph=True needs it unchanged")

        def pairs_of(q: Tensor, scale: Tensor) -> Pairs:
            return Pairs(q, k, scale, bias, row_ids, col_ids)

        incoming = _Incoming(grad_row, None, None)
        dq, dscale = _second_order(pairs_of, (q, scale), (need_q, need_scale), incoming)
        return _library.gradients(ATTEND_INPUTS, q=dq, scale=dscale)
    weighted = grad_row[:, None] * attended  # [M, D]
    return _library.gradients(
        ATTEND_INPUTS,
        q=(scale * weighted).to(q.dtype) if need_q else None,
        scale=(q * weighted).sum().to(scale.dtype) if need_scale else None,
    )


# ------------------------------------------------------------------------------------------------------ registration

for _name in ("similarity_lse", "similarity_lse_triton"):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor scale, {_IDS}, Tensor? positives, bool columns, bool hardest,"
        " SymInt tile_cache) -> (Tensor row_lse, Tensor col_lse, Tensor positive, Tensor hardest_negative,"
        " Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor tiles)",
        _fake,
    )
    _library.define(
        f"{_name}_backward(Tensor? grad_row, Tensor? grad_col, Tensor? grad_positive, Tensor q, Tensor k, Tensor scale,"
        f" {_IDS}, Tensor? positives, {_SAVED}, bool need_q, bool need_k, bool need_bias)"
        " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
        _backward_fake,
    )
    _library.autograd(_name, _backward_with(_name), _setup_context)

for _name in ("similarity_lse_self", "similarity_lse_self_triton"):
    _library.define(
        f"{_name}(Tensor z, Tensor scale, Tensor? ids, Tensor? positives, bool hardest, SymInt tile_cache)"
        " -> (Tensor row_lse, Tensor positive, Tensor hardest_negative, Tensor row_max, Tensor row_sum, Tensor tiles)",
        _self_fake,
    )
    _library.define(
        f"{_name}_backward(Tensor? grad_row, Tensor? grad_positive, Tensor z, Tensor scale, Tensor? ids,"
        " Tensor? positives, Tensor row_max, Tensor row_sum, Tensor tiles) -> (Tensor dz, Tensor dscale)",
        _self_backward_fake,
    )
    _library.autograd(_name, _self_backward_with(_name), _self_setup_context)

for _name in ("similarity_lse_attend", "similarity_lse_attend_triton"):
    _library.define(
        f"{_name}(Tensor q, Tensor k, Tensor scale, {_IDS}) -> (Tensor row_lse, Tensor attended)", _attend_fake
    )
    _library.autograd(_name, _attend_backward, _attend_setup_context)
