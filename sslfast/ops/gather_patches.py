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
from .._checks import FLOATS, ids_checked
from . import _devices

BACKENDS = ("cpu", "cuda", "reference")
why_not = functools.partial(_devices.why_not, "gather_patches", "images")
MOST_CHANNELS = 64  # kMostChannels
Order = Literal["channels_first", "channels_last"]


def length_of(sides: Sequence[int], patch: Sequence[int]) -> int:
    """L, the patches of an image of these sides (T, H, W)."""
    return math.prod([side // p for side, p in zip(sides, patch, strict=True)])  # a list: the tracer takes no generator


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


def check_images(images: Tensor) -> None:
    """[B, C, H, W] or [B, C, T, H, W] of bytes or floating-point numbers."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dim() not in (4, 5):
        raise ValueError(f"images must be [B, C, H, W] or [B, C, T, H, W], got shape {tuple(images.shape)}")
    if images.dtype not in (*FLOATS, torch.uint8):
        raise TypeError(f"images must be uint8, float32, float64, bfloat16 or float16, got {images.dtype}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have at least one channel and one pixel, got shape {tuple(images.shape)}")


def patch_sides(patch_size: int | Sequence[int], sides: Sequence[int]) -> list[int]:
    """(pt, ph, pw) of an image of sides (H, W) or (T, H, W), which they divide.

    Raises:
        ValueError: not one number for a still image or one for each side, not positive, or no divisors.
    """
    given = (patch_size, patch_size) if isinstance(patch_size, int) and len(sides) == 2 else patch_size
    if isinstance(given, int) or len(given) != len(sides):
        wanted = "p, (ph, pw)" if len(sides) == 2 else "(pt, ph, pw)"
        raise ValueError(f"patch_size must be {wanted} for these images, got {patch_size}")
    if any(p < 1 for p in given):
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    if any(side % p for side, p in zip(sides, given, strict=True)):
        raise ValueError(f"patch_size must divide the images' sides {tuple(sides)}, got {patch_size}")
    return [*(1 for _ in range(3 - len(given))), *given]


def check_ids(ids: Tensor, batch: int, device: torch.device) -> None:
    """[B, K] int64; their values are checked where a kernel on the CPU reads them."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != batch:
        raise ValueError(f"ids must be [{batch}, K], a row for each image, got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"ids must be on the images' device {device}, got {ids.device}")


def check_values(ids: Tensor, length: int) -> None:
    """From −1 to L − 1, none twice in a row: what the CPU's kernels check themselves, for the reference and a GPU."""
    if not ids_checked(ids) or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= length:
        raise ValueError(f"ids must be from 0 to {length - 1}, or -1 for none, got {low if low < -1 else high}")
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        raise ValueError(f"ids must not repeat within a row, got {int(ordered[:, 1:][twice][0])} twice")


def channel_numbers(name: str, numbers: Sequence[float] | float | None, channels: int) -> list[float]:
    """One number a channel; empty for None."""
    if numbers is None:
        return []
    given = [float(numbers)] * channels if isinstance(numbers, (int, float)) else [float(x) for x in numbers]
    if len(given) != channels or channels > MOST_CHANNELS:
        raise ValueError(
            f"{name} must be one number, or one for each of the images' {channels} channels (at most {MOST_CHANNELS}), "
            f"got {len(given)}"
        )
    if not all(math.isfinite(x) for x in given) or (name == "std" and not all(x > 0 for x in given)):
        raise ValueError(f"{name} must be finite{' and positive' if name == 'std' else ''}, got {given}")
    return given


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
        images: [B, C, H, W], or [B, C, T, H, W] of films; uint8 (divided by 255) or floating point; any strides.
        ids: [B, K] int64: patches in raster order, 0 to L − 1, none twice in a row; −1 gives a row of zeros. This is
            checked on the CPU, and on a GPU with ``SSLFAST_CHECK_IDS=1``; elsewhere an id out of range gives NaN, and
            a repeated one a gradient of NaN. Default None: all L patches in order.
        patch_size: p or (ph, pw); (pt, ph, pw) of films. Divides the sides.
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
    preferred = "cuda" if images.device.type == "cuda" else "cpu"
    backend = _backends.select("gather_patches", preferred, lambda name: why_not(name, images))
    if ids is not None and backend != "cpu":
        check_values(ids, length_of([1, *images.shape[2:]][-3:], patch))
    if backend == "reference":
        return reference.gather_patches(images, ids, patch, means, deviations, inner, kind)
    return torch.ops.sslfast.gather_patches(images, ids, patch, means, deviations, inner, kind)


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
    if len(size) not in (3, 4) or any(side < 1 for side in size):
        raise ValueError(f"size must be (C, H, W) or (C, T, H, W), positive, got {tuple(size)}")
    patch = patch_sides(patch_size, size[1:])
    whole = [size[0], 1, *size[1:]] if len(size) == 3 else list(size)
    length, features = length_of(whole[1:], patch), size[0] * math.prod(patch)
    if ids is not None:
        check_ids(ids, patches.shape[0] if patches.dim() else 0, patches.device)
    kept = length if ids is None else ids.shape[1]
    if patches.dim() != 3 or patches.shape[1] != kept or patches.shape[2] != features:
        raise ValueError(f"patches must be [B, {kept}, {features}], got shape {tuple(patches.shape)}")
    inner = is_inner(order)
    preferred = "cuda" if patches.device.type == "cuda" else "cpu"
    backend = _backends.select("scatter_patches", preferred, lambda name: why_not(name, patches))
    if ids is not None and backend != "cpu":
        check_values(ids, length)
    if backend == "reference":
        images = reference.scatter_patches(patches, ids, whole, patch, (), inner)
    else:
        images = torch.ops.sslfast.scatter_patches(patches, ids, whole, patch, [], inner)
    return images.view(patches.shape[0], *size)
