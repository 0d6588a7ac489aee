"""What the operations on rows of tokens check and return alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _library
from .._checks import FLOATS, accumulator, autocasts


def check_index(name: str, index: Tensor, device: torch.device, *dims: int) -> None:
    """``index`` is an int64 tensor on ``device`` with one of these numbers of dimensions."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {index.dtype}")
    if index.dim() not in dims:
        allowed = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name} must have {allowed} dimensions, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{name} must be on the tokens' device {device}, got {index.device}")


def table(name: str, rows: Tensor | None, like: Tensor, dims: int = 2) -> Tensor | None:
    """``rows`` [n, D] (or [D] with ``dims=1``) without leading dimensions of one, of the width and dtype of ``like``.

    Under autocast another floating-point type is cast; elsewhere it is an error.
    """
    if rows is None:
        return None
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(rows).__name__}")
    width = like.shape[-1]
    shape = "[features]" if dims == 1 else "[rows, features]"
    leading = rows.shape[: max(rows.dim() - dims, 0)]
    if rows.dim() < dims or rows.dim() > 3 or any(n != 1 for n in leading) or rows.shape[-1] != width:
        raise ValueError(f"{name} must have shape {shape} with {width} features, got {tuple(rows.shape)}")
    if rows.device != like.device:
        raise ValueError(f"{name} must be on the tokens' device {like.device}, got {rows.device}")
    if rows.dtype != like.dtype:
        if rows.dtype not in FLOATS or not autocasts(like):
            raise TypeError(f"{name} must have the tokens' dtype {like.dtype}, got {rows.dtype}")
        rows = rows.to(like.dtype)
    return rows.reshape(rows.shape[rows.dim() - dims :])


def in_accumulator(function: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
    """``function`` of the tensors in the dtype that sums are kept in, then in theirs: the precision of the kernels."""
    given = next(t for t in tensors if t is not None)
    wide = accumulator(given)
    return function(*(None if t is None else t.to(wide) for t in tensors)).to(given.dtype)


def linear_second_order(
    function: Callable[..., Tensor], shapes: Sequence[Sequence[int] | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that carry a graph to ``grad``, of a function linear in all of its inputs: zeros stand for these."""
    inputs = [None if s is None else grad.new_zeros(s).requires_grad_() for s in shapes]
    return _library.second_order(function, inputs, needed, grad)
