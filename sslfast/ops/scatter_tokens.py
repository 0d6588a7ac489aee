"""Tokens put back in their places, with a mask token elsewhere, position embedding and prefix in one write.

The input of MAE's decoder: row l of image b is ``x[b, ids_restore[b, l]]`` where that is a kept token, else the mask
token, plus ``position[l]``. The other form replaces the tokens under a mask (BEiT, SimMIM, DINOv2). Each row of x is
written once, so dx is a write; the other gradients are sums over the batch in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import check_tokens, ids_checked, whole_number
from . import _devices
from ._tokens import check_index, in_accumulator, linear_second_order, table

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "scatter_tokens", "x")


def _fake(
    x: Tensor, index: Tensor, token: Tensor, position: Tensor | None, prefix: Tensor | None, passed: int
) -> Tensor:
    leading = 0 if prefix is None else prefix.shape[0]
    return x.new_empty((x.shape[0], leading + passed + index.shape[1], x.shape[2]))


def _backward_fake(
    grad: Tensor, index: Tensor, kept: int, passed: int, positions: int, needs: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, width = grad.shape
    leading = rows - passed - index.shape[1]
    shapes = ((batch, passed + kept, width), (width,), (positions, width), (leading, width))
    dx, dtoken, dposition, dprefix = (
        grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True)
    )
    return dx, dtoken, dposition, dprefix


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, token, position, prefix, ctx.passed = inputs
    ctx.save_for_backward(index)
    ctx.shapes = [None if t is None else t.shape for t in (x, token, position, prefix)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    (index,) = ctx.saved_tensors
    x, _, token, position, prefix, _ = ctx.needs_input_grad
    needed = (x, token, position, prefix)
    if torch.is_grad_enabled() and grad.requires_grad:

        def forward(x: Tensor, token: Tensor, position: Tensor | None, prefix: Tensor | None) -> Tensor:
            return by_reference(x, index, token, position, prefix, ctx.passed)

        grads: Sequence[Tensor | None] = linear_second_order(forward, ctx.shapes, needed, grad)
    else:
        kept, positions = ctx.shapes[0][1] - ctx.passed, 0 if ctx.shapes[2] is None else ctx.shapes[2][0]
        found = torch.ops.sslfast.scatter_tokens_backward(
            grad, index, kept, ctx.passed, positions, [int(n) for n in needed]
        )
        grads = [g if n else None for g, n in zip(found, needed, strict=True)]
    return grads[0], None, *grads[1:], None


_library.define(
    "scatter_tokens(Tensor x, Tensor index, Tensor token, Tensor? position, Tensor? prefix, int passed) -> Tensor",
    _fake,
)
# kept: rows of x beyond the passed ones; positions: rows of position, 0 without one.
# needs: which of x, token, position and prefix; what is not needed is an empty tensor [0].
_library.define(
    "scatter_tokens_backward(Tensor grad, Tensor index, int kept, int passed, int positions, int[] needs)"
    " -> (Tensor dx, Tensor dtoken, Tensor dposition, Tensor dprefix)",
    _backward_fake,
)
_library.autograd("scatter_tokens", _backward, _setup_context)


def by_reference(
    x: Tensor, index: Tensor, token: Tensor, position: Tensor | None, prefix: Tensor | None, passed: int
) -> Tensor:
    """The reference with the kernels' precision: sums over 16-bit gradients are float32."""

    def function(x: Tensor, token: Tensor, position: Tensor | None, prefix: Tensor | None) -> Tensor:
        return reference.scatter_tokens(x, index, token, position, prefix, passed)

    return in_accumulator(function, (x, token, position, prefix))


def _check_restore(restore: Tensor) -> None:
    """Each row holds 0 … L − 1 once each."""
    if not ids_checked(restore) or restore.numel() == 0:
        return
    order = np.sort(restore.detach().cpu().numpy(), axis=1)
    wrong = order != np.arange(restore.shape[1])
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise ValueError(
            f"ids_restore must hold each of 0 … {restore.shape[1] - 1} once in every row, got {order[row].tolist()}, "
            f"sorted, in row {row}"
        )


def scatter_tokens(
    x: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    *,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    passed: int = 0,
) -> Tensor:
    """Put kept tokens back in their places and the mask token elsewhere: MAE's decoder input, in one write.

    As ``cat([x[:, :passed], gather(cat([x[:, passed:], mask_token, …]), ids_restore)]) + position``.

    Args:
        x: [B, passed + K, D], float32, float64, bfloat16 or float16, any strides.
        ids_restore: [B, L] int64, a permutation of 0 … L − 1 in each row: token l is row ``ids_restore[b, l]`` of the
            K kept ones, or masked where that is K or more. Checked on the CPU, and on a GPU with
            ``SSLFAST_CHECK_IDS=1``, outside ``torch.compile``; elsewhere an id out of range gives a row of NaN, and
            an image whose row is no permutation a gradient of NaN.
        mask_token: [D] or [1, 1, D].
        position: [L, D] or [1, L, D], added to the tokens; or with P + passed + L rows, for the leading rows too.
        prefix: [P, D] or [1, P, D], written before all others.
        passed: so many first rows of x (a class token) are written as they are, before the tokens. Default 0.

    All of one dtype; under autocast mask_token, position and prefix are cast to that of ``x``.

    Returns:
        [B, P + passed + L, D]. Differentiable in x, mask_token, position and prefix, twice through the reference. Sums
        over the batch are float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: a tensor has a wrong type or shape; a row of ids_restore is no permutation.

    Example:
        >>> x, ids_restore = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0, 2, 3, 1]])
        >>> sslfast.masking.scatter_tokens(x, ids_restore, torch.tensor([9.0])).flatten().tolist()
        [1.0, 9.0, 9.0, 2.0]
    """
    check_tokens("x", x)
    check_index("ids_restore", ids_restore, x.device, 2)
    passed = whole_number("passed", passed, 0, x.shape[1], "rows of x")
    if ids_restore.shape[0] != x.shape[0] or ids_restore.shape[1] < x.shape[1] - passed:
        raise ValueError(
            f"ids_restore must have a row for each image and a column for each token, at least those of x, got "
            f"{tuple(ids_restore.shape)} for x of shape {tuple(x.shape)} with passed={passed}"
        )
    _check_restore(ids_restore)
    return _select_and_scatter(x, ids_restore, mask_token, position, prefix, passed)


def replace_tokens(
    x: Tensor, mask: Tensor, mask_token: Tensor, *, position: Tensor | None = None, prefix: Tensor | None = None
) -> Tensor:
    """Put the mask token in place of masked tokens, add the position embedding and write a prefix before, in one pass.

    As ``cat([prefix, where(mask, mask_token, x) + position])``: the input of BEiT, SimMIM, iBOT and DINOv2.

    Args:
        x: [B, L, D], float32, float64, bfloat16 or float16, any strides.
        mask: [B, L] bool, True where masked; any count in each row.
        mask_token: [D] or [1, 1, D].
        position: [L, D] or [1, L, D], added to the tokens; or with P + L rows, for the prefix too.
        prefix: [P, D] or [1, P, D], such as a class token.

    All of one dtype; under autocast mask_token, position and prefix are cast to that of ``x``.

    Returns:
        [B, P + L, D]. Differentiable as ``scatter_tokens`` is; a masked row of x gets a gradient of 0.

    Raises:
        TypeError, ValueError: a tensor has a wrong type or shape.

    Example:
        >>> x, mask = torch.zeros(1, 3, 1), torch.tensor([[False, True, False]])
        >>> sslfast.masking.replace_tokens(x, mask, torch.tensor([9.0])).flatten().tolist()
        [0.0, 9.0, 0.0]
    """
    check_tokens("x", x)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask)}")
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must have shape {tuple(x.shape[:2])}, the images and tokens of x, got {tuple(mask.shape)}"
        )
    if mask.device != x.device:
        raise ValueError(f"mask must be on the tokens' device {x.device}, got {mask.device}")
    return _select_and_scatter(x, mask, mask_token, position, prefix, 0)


def _select_and_scatter(
    x: Tensor, index: Tensor, mask_token: Tensor, position: Tensor | None, prefix: Tensor | None, passed: int
) -> Tensor:
    token, position, prefix = (
        table("mask_token", mask_token, x, dims=1),
        table("position", position, x),
        table("prefix", prefix, x),
    )
    if token is None:
        raise TypeError("mask_token must be a torch.Tensor, got NoneType")
    tokens = index.shape[1]
    rows = tokens + passed + (0 if prefix is None else prefix.shape[0])
    if position is not None and position.shape[0] not in (tokens, rows):
        raise ValueError(
            f"position must have a row for each of {tokens} tokens or of {rows} rows in all, got {position.shape[0]}"
        )
    backend = _backends.serve("scatter_tokens", x, "cuda", why_not)
    if backend == "reference":
        return by_reference(x, index, token, position, prefix, passed)
    return _library.run("scatter_tokens", x, index, token, position, prefix, passed)
