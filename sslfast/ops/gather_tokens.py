"""The tokens that a mask keeps: gather, position embedding and class token in one write of the output.

Row k of image b is ``x[b, ids[b, k]] + position[ids[b, k]]``. Ids of a row are distinct, so the backward of a gather is
no sum but a write: row l of dx is the gradient's row that was read from it, or 0. Over S masks of the same tokens it is
their sum in the order of the masks, and the gradients of position, prefix and token are sums over the batch in its
order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import check_tokens, ids_checked
from . import _devices
from ._tokens import check_index, in_accumulator, linear_second_order, table

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "gather_tokens", "ids")


def _fake(
    x: Tensor | None, ids: Tensor, position: Tensor | None, prefix: Tensor | None, token: Tensor | None, packed: bool
) -> Tensor:
    like = token if x is None else x
    assert like is not None
    leading = 0 if prefix is None else prefix.shape[0]
    return like.new_empty((*ids.shape[:-1], leading + ids.shape[-1], like.shape[-1]))


def _backward_fake(
    grad: Tensor, ids: Tensor, length: int, packed: bool, needs: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, kept, width = ids.shape[-2], ids.shape[-1], grad.shape[-1]
    shapes = ((batch, kept if packed else length, width), (length, width), (grad.shape[-2] - kept, width), (width,))
    dx, dposition, dprefix, dtoken = (
        grad.new_empty(shape if needed else 0) for shape, needed in zip(shapes, needs, strict=True)
    )
    return dx, dposition, dprefix, dtoken


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, position, prefix, token, ctx.packed = inputs
    ctx.save_for_backward(ids)
    ctx.shapes = [None if t is None else t.shape for t in (x, position, prefix, token)]
    if x is None or ctx.packed:
        ctx.length = 0 if position is None else position.shape[0]
    else:
        ctx.length = x.shape[1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    (ids,) = ctx.saved_tensors
    x, _, position, prefix, token, _ = ctx.needs_input_grad
    needed = (x, position, prefix, token)
    if torch.is_grad_enabled() and grad.requires_grad:

        def forward(x: Tensor | None, position: Tensor | None, prefix: Tensor | None, token: Tensor | None) -> Tensor:
            return by_reference(x, ids, position, prefix, token, ctx.packed)

        grads: Sequence[Tensor | None] = linear_second_order(forward, ctx.shapes, needed, grad)
    else:
        found = torch.ops.sslfast.gather_tokens_backward(grad, ids, ctx.length, ctx.packed, [int(n) for n in needed])
        grads = [g if n else None for g, n in zip(found, needed, strict=True)]
    return grads[0], None, *grads[1:], None


_library.define(
    "gather_tokens(Tensor? x, Tensor ids, Tensor? position, Tensor? prefix, Tensor? token, bool packed) -> Tensor",
    _fake,
)
# needs: which of x, position, prefix and token; what is not needed is an empty tensor [0]
_library.define(
    "gather_tokens_backward(Tensor grad, Tensor ids, int length, bool packed, int[] needs)"
    " -> (Tensor dx, Tensor dposition, Tensor dprefix, Tensor dtoken)",
    _backward_fake,
)
_library.autograd("gather_tokens", _backward, _setup_context)


def by_reference(
    x: Tensor | None, ids: Tensor, position: Tensor | None, prefix: Tensor | None, token: Tensor | None, packed: bool
) -> Tensor:
    """The reference with the kernels' precision: sums over 16-bit gradients are float32."""

    def function(x: Tensor | None, position: Tensor | None, prefix: Tensor | None, token: Tensor | None) -> Tensor:
        return reference.gather_tokens(x, ids, position, prefix, token, packed)

    return in_accumulator(function, (x, position, prefix, token))


def check_ids(name: str, ids: Tensor, length: int | None) -> None:
    """Ids from −1 to ``length`` − 1, distinct in a row but for −1."""
    if not ids_checked(ids) or ids.numel() == 0:
        return
    order = np.sort(ids.detach().cpu().numpy().reshape(-1, ids.shape[-1]), axis=1)
    smallest, largest = int(order[:, 0].min()), int(order[:, -1].max())
    if smallest < -1 or (length is not None and largest >= length):
        allowed = "at least −1" if length is None else f"from −1 (no token) to {length - 1}"
        raise ValueError(f"{name} must be {allowed}, got {smallest if smallest < -1 else largest}")
    twice = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    if twice.any():
        row, column = (int(i) for i in np.argwhere(twice)[0])
        raise ValueError(f"{name} must not repeat an id within an image's row, got {order[row, column]} twice")


def gather_tokens(
    x: Tensor | None,
    ids: Tensor,
    *,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    token: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """The tokens of given ids, with their position embedding, after a prefix such as the class token.

    As ``cat([prefix, gather(x + position, ids)])``, MAE's encoder input, but nothing is computed for a dropped token
    and nothing is written twice. The predictor's input of I-JEPA is that of ``x=None``: the mask token at the positions
    of the targets.

    Args:
        x: [B, L, D] tokens, float32, float64, bfloat16 or float16, any strides; ``None``: every row is ``token``.
        ids: [B, K] int64, or [S, B, K] for S masks of the same tokens; 0 … L − 1, distinct within a row, or −1 for a
            row of zeros (padding). Checked on the CPU, and on a GPU with ``SSLFAST_CHECK_IDS=1``, outside
            ``torch.compile``; elsewhere an id out of range gives NaN, a repeated one a gradient of NaN.
        position: [L, D] or [1, L, D], added to each token; not to the prefix.
        prefix: [P, D] or [1, P, D], the first rows of each image (class token plus its position, registers).
        token: [D] or [1, 1, D], in place of ``x``; needs ``position``.
        packed: ``x`` [B, K, D] holds the kept tokens already, row k that of ``ids[b, k]``. Default False.

    All of one dtype; under autocast position, prefix and token are cast to that of ``x`` (of ``token`` without ``x``).

    Returns:
        [B, P + K, D], or [S, B, P + K, D]. Differentiable in x, position, prefix and token, twice through the
        reference. Sums over the batch are float32 (float64 for float64), in a fixed order.

    Raises:
        TypeError, ValueError: a tensor has a wrong type or shape; an id is out of range or repeated.

    Example:
        >>> x, ids = torch.arange(4.0).view(1, 4, 1), torch.tensor([[0, 3]])
        >>> sslfast.masking.gather_tokens(x, ids, prefix=torch.tensor([[9.0]])).flatten().tolist()
        [9.0, 0.0, 3.0]
    """
    if (x is None) == (token is None):
        raise ValueError("gather_tokens takes either x or token, got " + ("both" if x is not None else "neither"))
    if x is not None:
        check_tokens("x", x)
    elif position is None or packed:
        raise ValueError("token needs position and no packed=True: without them every row were the same")
    elif isinstance(token, Tensor):
        token = table("token", token, token, dims=1)
    like = token if x is None else x
    if not isinstance(like, Tensor):
        raise TypeError(f"token must be a torch.Tensor, got {type(like).__name__}")
    position, prefix = table("position", position, like), table("prefix", prefix, like)
    check_index("ids", ids, like.device, *((2,) if packed else (2, 3)))
    length = None if position is None else position.shape[0]
    if x is not None:
        if x.shape[0] != ids.shape[-2] or (packed and x.shape[1] != ids.shape[1]):
            wanted = "images and kept tokens" if packed else "images"
            raise ValueError(f"x and ids must have the same {wanted}, got {tuple(x.shape)} and {tuple(ids.shape)}")
        if not packed:
            if length is not None and length != x.shape[1]:
                raise ValueError(f"position must have a row for each of the {x.shape[1]} tokens, got {length}")
            length = x.shape[1]
    check_ids("ids", ids, length)
    return select_and_gather(x, ids, position, prefix, token, packed)


def select_and_gather(
    x: Tensor | None, ids: Tensor, position: Tensor | None, prefix: Tensor | None, token: Tensor | None, packed: bool
) -> Tensor:
    """What has been checked, by the backend of its device."""
    backend = _backends.serve("gather_tokens", ids, "cuda", why_not)
    if backend == "reference":
        return by_reference(x, ids, position, prefix, token, packed)
    return _library.run("gather_tokens", x, ids, position, prefix, token, packed)
