"""Views of images from their parameters: crop and antialiased resize, flip, colour jitter, greyscale, blur, solarize,
normalise, cast and layout in two or three passes over a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import readable, real_number, real_numbers, whole_each, whole_number
from . import _devices
from .view_params import COLUMNS, MOST_SIDE

BACKENDS = ("cpu", "cuda", "reference")
IMAGES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
LARGEST_KERNEL = 255  # 2 · kMaxBlurRadius + 1 in csrc/common/blur.h
_OPERATIONS = np.arange(4, dtype=np.float32)
# Of brightness, contrast, saturation and hue.
_SMALLEST = np.array([0, 0, 0, -0.5], dtype=np.float32)
_LARGEST = np.array([1e6, 1e6, 1e6, 0.5], dtype=np.float32)
VIEWS = (torch.float32, torch.bfloat16, torch.float16)


def _fake(
    images: Sequence[Tensor],
    params: Tensor,
    size: Sequence[int],
    cubic: bool,
    blur_kernel: int,
    threshold: float,
    mean: Sequence[float],
    std: Sequence[float],
    pil: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    channels = (images[0].shape[-3],)
    pixel = (*size, *channels) if channels_last else (*channels, *size)
    return images[0].new_empty((*params.shape[:2], *pixel), dtype=dtype)


_library.define(
    "augment_views(Tensor[] images, Tensor params, int[] size, bool cubic, int blur_kernel, float threshold,"
    " float[] mean, float[] std, bool pil, ScalarType dtype, bool channels_last) -> Tensor",
    _fake,
)


def why_not(backend: str, images: Sequence[Tensor]) -> str | None:
    """The reason ``backend`` cannot augment ``images``, or ``None`` if it can."""
    return _devices.why_not("augment_views", "images", backend, images[0])


def check_images(images: Sequence[Tensor]) -> int:
    """One batch [B, C, H, W] or B images [C, H, W], alike in all but their sizes; returns B."""
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got an empty list")
    first = images[0]
    for i, image in enumerate(images):
        name = "images" if len(images) == 1 else f"images[{i}]"
        if not isinstance(image, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(image).__name__}")
        if image.dtype not in IMAGES:
            scaled = "" if image.dtype == torch.float64 else ": divide by the value of white, in float32"
            raise TypeError(f"{name} must be uint8, float32, bfloat16 or float16, got {image.dtype}{scaled}")
        if image.dim() != 3 and not (image.dim() == 4 and len(images) == 1):
            raise ValueError(f"{name} must be a batch of four or an image of three dimensions, got {image.dim()}")
        if image.shape[-3] not in (1, 3):
            raise ValueError(f"{name} must have 1 or 3 channels, got {image.shape[-3]} in shape {tuple(image.shape)}")
        if image.shape[-1] == 0 or image.shape[-2] == 0:
            raise ValueError(f"{name} must have at least one pixel, got shape {tuple(image.shape)}")
        if max(image.shape[-2:]) >= 2**24:  # a float32 parameter holds no larger whole number
            raise ValueError(f"{name} must be below 2^24 pixels on a side, got shape {tuple(image.shape)}")
        if (image.dtype, image.device, image.shape[-3]) != (first.dtype, first.device, first.shape[-3]):
            raise ValueError(
                f"images must agree in dtype, device and channels: images[{i}] is {image.dtype} on {image.device} with "
                f"{image.shape[-3]} channels, images[0] is {first.dtype} on {first.device} with {first.shape[-3]}"
            )
        if image.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and augmentation has none: detach it")
    count = first.shape[0] if first.dim() == 4 else len(images)
    if count == 0:
        raise ValueError(f"images must hold at least one image, got shape {tuple(first.shape)}")
    return count


def _check_params(images: Sequence[Tensor], params: Tensor, widest_kernel: int, blur_kernel: int) -> None:
    """Crops inside their images, and no blur wider than allowed; only where reading them waits for no device."""
    if not readable(params) or params.numel() == 0:
        return
    table = params.numpy()  # its operations cost a fifth of torch's on a few numbers
    sizes = np.array([image.shape[-2:] for image in images], dtype=np.float32)  # [B or 1, 2]
    corner, extent = table[..., 0:2], table[..., 2:4]
    good = (corner >= 0) & (extent >= 1) & (corner + extent <= sizes)
    if not good.all():
        v, b = (int(i) for i in np.argwhere(~good.all(-1))[0])
        height, width = images[b if len(images) > 1 else 0].shape[-2:]
        raise ValueError(
            f"params: the crop (top, left, height, width) = {params[v, b, :4].tolist()} of view {v} of image {b} must "
            f"lie in its {height} × {width} pixels"
        )
    sigma, order, factors = table[..., 14], table[..., 9:13], table[..., 5:9]
    if not ((sigma >= 0) & (sigma < np.inf)).all():
        raise ValueError(f"params: sigma must be 0 or positive and finite, got {sigma.min()} to {sigma.max()}")
    times = (order[..., None] == _OPERATIONS).sum(-2)  # [V, B, 4], how often each stands in the order
    if (times > 1).any() or (times.sum(-1) + (order == -1).sum(-1) != 4).any():
        raise ValueError(
            f"params: order must hold 0, 1, 2, 3 at most once each, and −1 elsewhere, got {order.tolist()}"
        )
    wrong = (times > 0) & ~((factors >= _SMALLEST) & (factors <= _LARGEST))
    if wrong.any():
        column = int(np.argwhere(wrong)[0][-1])
        raise ValueError(
            f"params: {COLUMNS[5 + column]} must be from {_SMALLEST[column]} to {_LARGEST[column]} where it is in order"
        )
    if blur_kernel > widest_kernel and (sigma > 0).any():
        raise ValueError(f"blur_kernel must be at most {widest_kernel} at this size of view, got {blur_kernel}")


def augment_views(
    images: Sequence[Tensor],
    params: Tensor,
    *,
    size: tuple[int, int],
    cubic: bool = False,
    blur_kernel: int = 23,
    threshold: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pil: bool = False,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Apply parameters to images: V views of each of B images, all of one size.

    Args:
        images: one tensor [B, C, H, W] in a list, or B tensors [C, H, W] of any sizes; C is 1 or 3, any strides; uint8,
            or float32, bfloat16 or float16 on the scale 0 … 1.
        params: [V, B, 16] float32 on the images' device, from ``view_params``. Crops must lie inside the images
            (checked on the CPU; on a GPU they are cut to the image).
        size: (height, width) of the views.
        cubic: bicubic, else bilinear. Default False.
        blur_kernel: width of the blur, odd, at most 255, and in torchvision's semantics below twice the view's side
            (checked on the CPU where a view is blurred). Default 23.
        threshold: of solarize, on the scale 0 … 1. Default 0.5.
        mean, std: C numbers each, std none that is 0. Default: 0 and 1.
        pil: PIL's semantics. Default False: torchvision's.
        dtype: float32 (default), bfloat16 or float16.
        channels_last: channels beside each other in memory. Default False.

    Returns:
        [V, B, C, h, w], ``dtype``.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.
    """
    count = check_images(images)
    if params.dim() != 3 or params.shape[1:] != (count, len(COLUMNS)) or params.dtype != torch.float32:
        raise ValueError(
            f"params must be [views, {count}, {len(COLUMNS)}] of float32, got {tuple(params.shape)} of {params.dtype}"
        )
    if params.device != images[0].device:
        raise ValueError(f"params must be on the images' device {images[0].device}, got {params.device}")
    if dtype not in VIEWS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    channels = images[0].shape[-3]
    mean = (0.0,) * channels if mean is None else real_numbers("mean", mean)
    std = (1.0,) * channels if std is None else real_numbers("std", std)
    if len(mean) != channels or len(std) != channels or 0 in std:
        raise ValueError(
            f"mean and std must have {channels} numbers, std none that is 0, got {tuple(mean)} and {tuple(std)}"
        )
    height, width = whole_each("size", size, 2, "two positive whole numbers")
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        raise ValueError(f"size must be two positive whole numbers, got {size!r}")
    size = height, width
    threshold = real_number("threshold", threshold)
    blur_kernel = whole_number("blur_kernel", blur_kernel, 1, LARGEST_KERNEL)
    if blur_kernel % 2 == 0:
        raise ValueError(f"blur_kernel must be an odd whole number from 1 to {LARGEST_KERNEL}, got {blur_kernel}")
    # The border is mirrored, and a mirror image has no more pixels than the view; PIL's blur knows no kernel.
    _check_params(images, params, LARGEST_KERNEL if pil else 2 * min(size) - 1, blur_kernel)
    preferred = "cuda" if images[0].device.type == "cuda" else "cpu"
    backend = _backends.select("augment_views", preferred, lambda name: why_not(name, images))
    if backend == "reference":
        views = reference.augment_views(
            images,
            params,
            size=size,
            cubic=cubic,
            blur_kernel=blur_kernel,
            threshold=threshold,
            mean=mean,
            std=std,
            pil=pil,
        ).to(dtype)
        return views.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if channels_last else views
    views = _library.call(
        "augment_views",
        [image.detach() for image in images],
        params,
        list(size),
        cubic,
        blur_kernel,
        threshold,
        list(mean),
        list(std),
        pil,
        dtype,
        channels_last,
    )
    return views.permute(0, 1, 4, 2, 3) if channels_last else views
