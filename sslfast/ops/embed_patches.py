"""From images to the tokens of the kept patches: at a mask of 75 % a quarter of the patch projection's work.

    out[b, P + k] = weight·patch(images[b], ids[b, k]) + bias + position[ids[b, k]],    out[b, p] = prefix[p]

Rows of patches are read from the pixels straight into the product's own layout, in the forward and once more in the
backward; they never stand in memory. Backward, with g = the gradient's rows:

    dweight = Σ_bk g[b, k]·patchᵀ,    dbias = Σ_bk g[b, k]
    dposition[l] = Σ_{ids[b, k] = l} g[b, k],    dprefix = Σ_b grad[b, :P]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _backends, _library, reference
from .._checks import FLOATS, accumulator, autocasts, without_autocast
from . import _devices
from ._patches import channel_numbers, check_ids, check_images, check_values, length_of, patch_sides

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "embed_patches", "images")


class Inputs(NamedTuple):
    """Those of the operator, checked."""

    images: Tensor  # [B, C, (T,) H, W]
    ids: Tensor  # [B, K]
    weight: Tensor  # [D, C·pt·ph·pw]
    bias: Tensor | None  # [D]
    position: Tensor | None  # [L, D]
    prefix: Tensor | None  # [P, D]
    patch: Sequence[int]  # (pt, ph, pw)
    mean: Sequence[float]  # one a channel
    std: Sequence[float]


def _fake(*inputs: Any) -> Tensor:
    x = Inputs(*inputs)
    rows = x.ids.shape[1] + (0 if x.prefix is None else x.prefix.shape[0])
    return x.weight.new_empty((x.images.shape[0], rows, x.weight.shape[0]))


def _backward_fake(
    grad: Tensor, images: Tensor, ids: Tensor, patch: Sequence[int], *rest: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d, length, needs = grad.shape[2], length_of([1, *images.shape[2:]][-3:], patch), rest[-1]
    shapes = (
        (d, images.shape[1] * math.prod(patch)),
        (d,),
        (length, d),
        (grad.shape[1] - ids.shape[1], d),
    )
    weight, bias, position, prefix = (
        grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )
    return weight, bias, position, prefix


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, weight, bias, position, prefix, ctx.patch, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(images, ids, weight, bias, position, prefix)


def by_reference(x: Inputs) -> Tensor:
    """The reference with the kernels' precision: sums over 16-bit weights are float32, also under autocast."""
    kind = accumulator(x.weight)
    bias, position, prefix = (None if t is None else t.to(kind) for t in (x.bias, x.position, x.prefix))
    with without_autocast(x.images):
        wide = x._replace(weight=x.weight.to(kind), bias=bias, position=position, prefix=prefix)
        return reference.embed_patches(*wide).to(x.weight.dtype)


def _image_gradient(ctx: Any, grad: Tensor, images: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """d images: g·weight of each row, divided by std, at the row's patch."""
    with without_autocast(images):
        rows = grad[:, grad.shape[1] - ids.shape[1] :].to(accumulator(weight)) @ weight.to(accumulator(weight))
    size = images.shape[1:] if images.dim() == 5 else (images.shape[1], 1, *images.shape[2:])
    found = torch.ops.sslfast.scatter_patches(rows, ids, size, ctx.patch, [1 / s for s in ctx.std], False)
    return found.to(images.dtype).view(images.shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, ids, *parameters = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
    given = (images, *parameters)
    if torch.is_grad_enabled() and (grad.requires_grad or any(t is not None and t.requires_grad for t in given)):

        def function(images: Tensor, *rest: Tensor | None) -> Tensor:
            weight, bias, position, prefix = rest
            assert weight is not None
            return by_reference(Inputs(images, ids, weight, bias, position, prefix, ctx.patch, ctx.mean, ctx.std))

        first, *found = _library.second_order(function, given, needed, grad)
        return (first, None, *found, None, None, None)
    image = _image_gradient(ctx, grad, images, ids, parameters[0]) if needed[0] else None
    needs = [int(need) for need in needed[1:]]
    gradients = torch.ops.sslfast.embed_patches_backward(grad, images, ids, ctx.patch, ctx.mean, ctx.std, needs)
    return (image, None, *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None)


_library.define(
    "embed_patches(Tensor images, Tensor ids, Tensor weight, Tensor? bias, Tensor? position, Tensor? prefix,"
    " int[] patch, float[] mean, float[] std) -> Tensor",
    _fake,
)
_library.define(
    "embed_patches_backward(Tensor grad, Tensor images, Tensor ids, int[] patch, float[] mean, float[] std,"
    " int[] needs) -> (Tensor dweight, Tensor dbias, Tensor dposition, Tensor dprefix)",
    _backward_fake,
)
_library.autograd("embed_patches", _backward, _setup_context)


def _composed(x: Inputs) -> Tensor:
    """Gathered rows through the library's product, as its own is the fastest on a GPU."""
    rows = torch.ops.sslfast.gather_patches(x.images, x.ids, x.patch, x.mean, x.std, False, x.weight.dtype)
    tokens = F.linear(rows, x.weight, x.bias)
    return torch.ops.sslfast.gather_tokens(tokens, x.ids, x.position, x.prefix, None, True)


def _check_parameters(
    images: Tensor, weight: Tensor, features: int, length: int, others: dict[str, Tensor | None]
) -> None:
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32, float64, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] == 0:
        raise ValueError(f"weight must be [D, {features}], C·pt·ph·pw numbers a row, got shape {tuple(weight.shape)}")
    d = weight.shape[0]
    rows = {"bias": (d,), "position": (length, d), "prefix": (None, d)}
    for name, t in {"weight": weight, **others}.items():
        if t is None:
            continue
        if t.dtype != weight.dtype:
            raise TypeError(f"{name} must have the weight's dtype {weight.dtype}, got {t.dtype}")
        if t.device != images.device:
            raise ValueError(f"{name} must be on the images' device {images.device}, got {t.device}")
        if name in rows:
            wanted = tuple(t.shape[0] if side is None and t.dim() else side for side in rows[name])
            if tuple(t.shape) != wanted:
                said = "[" + ", ".join("P" if side is None else str(side) for side in rows[name]) + "]"
                raise ValueError(f"{name} must be {said}, got shape {tuple(t.shape)}")


def _without_batch(t: Tensor | None) -> Tensor | None:
    """[1, N, D], as models keep it, as [N, D]."""
    return t[0] if t is not None and t.dim() == 3 and t.shape[0] == 1 else t


def embed_patches(
    images: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int | Sequence[int],
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> Tensor:
    """Tokens of the kept patches alone: projection, position and the prefix tokens in one pass over the pixels.

    Equal to ``cat([prefix, (conv(images).flatten(2).mT + position).gather(1, ids)], 1)`` with a convolution whose
    kernel and stride are the patch.

    Args:
        images: [B, C, H, W], or [B, C, T, H, W] of videos; uint8 (divided by 255) or floating point; any strides.
        ids: [B, K] int64: kept patches in raster order, 0 to L − 1, none twice in a row; −1 gives a row of zeros.
            This is checked on the CPU, and on a GPU with ``SSLFAST_CHECK_IDS=1``. None: all L patches in order.
        weight: [D, C·pt·ph·pw], or a convolution's [D, C, (pt,) ph, pw]; float32, float64, bfloat16 or float16.
        bias: [D]. Default None.
        patch_size: p or (ph, pw); (pt, ph, pw) of videos. Divides the sides.
        position: [L, D] or [1, L, D], added to each token of its patch. Default None.
        prefix: [P, D] or [1, P, D], such as the class token (with its own position added). Default None.
        mean, std: one number a channel (at most 64), or one for all: pixels become (x − mean) / std first. Default:
            0 and 1.

    Under autocast the parameters are cast to its dtype, as ``conv2d`` does; all parameters have one dtype else.

    Returns:
        [B, P + K, D], the parameters' dtype; sums are float32 (float64 for float64). Differentiable in the parameters
        and the images, twice through the reference.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or a value that is not allowed.

    Example:
        >>> images, ids = torch.ones(1, 3, 32, 32), torch.tensor([[0, 3]])
        >>> weight, class_token = torch.ones(8, 3, 16, 16), torch.zeros(1, 8)
        >>> tokens = sslfast.masking.embed_patches(images, ids, weight, patch_size=16, prefix=class_token)
        >>> tokens.shape, tokens[0, 1, 0].item()
        (torch.Size([1, 3, 8]), 768.0)
    """
    check_images(images)
    patch = patch_sides(patch_size, images.shape[2:])
    length = length_of([1, *images.shape[2:]][-3:], patch)
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    if ids is None:
        ids = torch.arange(length, device=images.device).expand(images.shape[0], -1)
    check_ids(ids, images.shape[0], images.device)
    means = channel_numbers("mean", mean, images.shape[1])
    deviations = channel_numbers("std", std, images.shape[1])
    if weight.dim() in (4, 5):  # a convolution's
        if tuple(weight.shape[1:]) != (images.shape[1], *patch[5 - weight.dim() :]):
            raise ValueError(
                f"weight must be [D, {images.shape[1]}, {', '.join(map(str, patch))}] for these images and patches "
                f"(without the first 1 for still ones), got shape {tuple(weight.shape)}"
            )
        weight = weight.flatten(1)
    position, prefix = _without_batch(position), _without_batch(prefix)
    if autocasts(images) and weight.dtype != torch.float64:
        kind = torch.get_autocast_dtype(images.device.type)
        weight = weight.to(kind)
        bias, position, prefix = (None if t is None else t.to(kind) for t in (bias, position, prefix))
    others = {"bias": bias, "position": position, "prefix": prefix}
    _check_parameters(images, weight, images.shape[1] * math.prod(patch), length, others)
    backend = _backends.serve("embed_patches", images, "cuda", why_not)
    if backend != "cpu":
        check_values(ids, length)
    inputs = Inputs(images, ids, weight, bias, position, prefix, patch, means, deviations)
    if backend == "reference":
        return by_reference(inputs)
    return _composed(inputs) if backend == "cuda" else _library.run("embed_patches", *inputs)
