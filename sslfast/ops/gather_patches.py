"""Patches of images straight from the pixels, only those that are wanted: normalised, cast and laid out in one pass.

The inverse, ``scatter_patches``, writes every pixel of the images once; each of the two is the other's derivative:

    rows[b, k] = (patch ids[b, k] of images[b] − mean) / std        d images = scatter_patches(d rows) / std
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import FLOATS, whole_numbers
from . import _devices
from ._patches import channel_numbers, check_ids, check_images, check_values, length_of, patch_sides

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "gather_patches", "images")
Order = Literal["channels_first", "channels_last"]


def _gather_fake(
    images: Tensor,
    ids: Tensor | None,
    patch: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    channels_inner: bool,
    dtype: torch.dtype,
) -> Tensor:
    sides = images.shape[2:] if images.dim() == 5 else (1, *images.shape[2:])
    kept = length_of(sides, patch) if ids is None else ids.shape[1]
    return images.new_empty((images.shape[0], kept, images.shape[1] * math.prod(patch)), dtype=dtype)


def _scatter_fake(
    patches: Tensor,
    ids: Tensor | None,
    size: Sequence[int],
    patch: Sequence[int],
    scale: Sequence[float],
    channels_inner: bool,
) -> Tensor:
    return patches.new_empty((patches.shape[0], *size))


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, ctx.patch, _, ctx.std, ctx.channels_inner, _ = inputs
    ctx.shape, ctx.dtype = images.shape, images.dtype
    ctx.save_for_backward(*([] if ids is None else [ids]))


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 7
    ids = ctx.saved_tensors[0] if ctx.saved_tensors else None
    size = ctx.shape[1:] if len(ctx.shape) == 5 else (ctx.shape[1], 1, *ctx.shape[2:])
    scale = [1 / s for s in ctx.std]
    grad = grad.to(torch.promote_types(grad.dtype, ctx.dtype))  # divided by std before it is rounded
    found = torch.ops.sslfast.scatter_patches(grad, ids, size, ctx.patch, scale, ctx.channels_inner)
    return (found.to(ctx.dtype).view(ctx.shape), *(None,) * 6)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, ids, _, ctx.patch, ctx.scale, ctx.channels_inner = inputs
    ctx.dtype = patches.dtype
    ctx.save_for_backward(*([] if ids is None else [ids]))


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 6
    ids = ctx.saved_tensors[0] if ctx.saved_tensors else None
    std = [1 / s if s else math.inf for s in ctx.scale]
    found = torch.ops.sslfast.gather_patches(grad, ids, ctx.patch, [], std, ctx.channels_inner, ctx.dtype)
    return (found, *(None,) * 5)


_library.define(
    "gather_patches(Tensor images, Tensor? ids, int[] patch, float[] mean, float[] std, bool channels_inner,"
    " ScalarType dtype) -> Tensor",
    _gather_fake,
)
_library.autograd("gather_patches", _gather_backward, _gather_setup)
_library.define(
    "scatter_patches(Tensor patches, Tensor? ids, int[] size, int[] patch, float[] scale, bool channels_inner)"
    " -> Tensor",
    _scatter_fake,
)
_library.autograd("scatter_patches", _scatter_backward, _scatter_setup)


def is_inner(order: str) -> bool:
    if order not in ("channels_first", "channels_last"):
        raise ValueError(f"order must be 'channels_first' or 'channels_last', got {order!r}")
    return order == "channels_last"


def gather_patches(
    images: Tensor,
    ids: Tensor | None = None,
    *,
    patch_size: int | Sequence[int],
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    order: Order = "channels_first",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of pixels of the wanted patches: ``rows[b, k]`` is patch ``ids[b, k]`` of image b, ``(x − mean) / std``.

    Args:
        images: [B, C, H, W], or [B, C, T, H, W] of videos; uint8 (divided by 255) or floating point; any strides.
        ids: [B, K] int64: patches in raster order, 0 to L − 1, none twice in a row; −1 gives a row of zeros. This is
            checked on the CPU, and on a GPU with ``SSLFAST_CHECK_IDS=1``; elsewhere an id out of range gives NaN, and
            a repeated one a gradient of NaN. Default None: all L patches in order.
        patch_size: p or (ph, pw); (pt, ph, pw) of videos. Divides the sides.
        mean, std: one number a channel (at most 64 channels), or one for all. Default: 0 and 1.
        order: of a row's numbers: "channels_first", (c, t, y, x), as a convolution's weight has them (default), or
            "channels_last", (t, y, x, c), as MAE's and lightly's patchify do.
        dtype: of the rows; default: the images', float32 for uint8.

    Returns:
        [B, K, C·pt·ph·pw]. Arithmetic is float32 (float64 where images or rows are). Differentiable in images, twice.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or a value that is not allowed.

    Example:
        >>> images, ids = torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[1, 2]])
        >>> sslfast.masking.gather_patches(images, ids, patch_size=2).tolist()
        [[[2.0, 3.0, 6.0, 7.0], [8.0, 9.0, 12.0, 13.0]]]
    """
    check_images(images)
    patch = patch_sides(patch_size, images.shape[2:])
    if ids is not None:
        check_ids(ids, images.shape[0], images.device)
    means = channel_numbers("mean", mean, images.shape[1])
    deviations = channel_numbers("std", std, images.shape[1])
    inner = is_inner(order)
    kind = dtype or (images.dtype if images.dtype.is_floating_point else torch.float32)
    if kind not in FLOATS:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {kind}")
    backend = _backends.serve("gather_patches", images, "cuda", why_not)
    if ids is not None and backend != "cpu":
        check_values(ids, length_of([1, *images.shape[2:]][-3:], patch))
    if backend == "reference":
        return reference.gather_patches(images, ids, patch, means, deviations, inner, kind)
    return _library.run("gather_patches", images, ids, patch, means, deviations, inner, kind)


def scatter_patches(
    patches: Tensor,
    ids: Tensor | None = None,
    *,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    order: Order = "channels_first",
) -> Tensor:
    """Images from rows of pixels: the inverse of ``gather_patches``, zeros where there is no patch.

    Args:
        patches: [B, K, C·pt·ph·pw], float32, float64, bfloat16 or float16; any strides.
        ids: [B, K] int64 as in ``gather_patches``; a row whose id is −1 is left out. Default None: all L, in order.
        size: (C, H, W) or (C, T, H, W).
        patch_size, order: as in ``gather_patches``.

    Returns:
        [B, C, H, W] or [B, C, T, H, W], contiguous, ``patches``' dtype. Differentiable in patches, twice.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or a value that is not allowed.

    Example:
        >>> images = torch.arange(16.0).view(1, 1, 4, 4)
        >>> rows = sslfast.masking.gather_patches(images, patch_size=2)
        >>> torch.equal(sslfast.masking.scatter_patches(rows, size=(1, 4, 4), patch_size=2), images)
        True
    """
    if not isinstance(patches, Tensor):
        raise TypeError(f"patches must be a torch.Tensor, got {type(patches).__name__}")
    if patches.dtype not in FLOATS:
        raise TypeError(f"patches must be float32, float64, bfloat16 or float16, got {patches.dtype}")
    size = whole_numbers("size", size, "(C, H, W) or (C, T, H, W)")
    if len(size) not in (3, 4) or any(side < 1 for side in size):
        raise ValueError(f"size must be (C, H, W) or (C, T, H, W), positive, got {size}")
    patch = patch_sides(patch_size, size[1:])
    whole = [size[0], 1, *size[1:]] if len(size) == 3 else list(size)
    length, features = length_of(whole[1:], patch), size[0] * math.prod(patch)
    if ids is not None:
        check_ids(ids, patches.shape[0] if patches.dim() else 0, patches.device)
    kept = length if ids is None else ids.shape[1]
    if patches.dim() != 3 or patches.shape[1] != kept or patches.shape[2] != features:
        raise ValueError(f"patches must be [B, {kept}, {features}], got shape {tuple(patches.shape)}")
    inner = is_inner(order)
    backend = _backends.serve("scatter_patches", patches, "cuda", why_not)
    if ids is not None and backend != "cpu":
        check_values(ids, length)
    if backend == "reference":
        images = reference.scatter_patches(patches, ids, whole, patch, (), inner)
    else:
        images = _library.run("scatter_patches", patches, ids, whole, patch, [], inner)
    return images.view(patches.shape[0], *size)
