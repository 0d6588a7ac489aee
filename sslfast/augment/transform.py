"""``MultiViewTransform``: several augmented views of one image or a batch, and the two functions it is made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .._checks import warn_of_bytes
from .._library import towards
from .._random.ids import Ids, sample_ids
from .._random.key import epoch_of, seed_of
from ..ops.augment_views import VIEWS, augment_views, check_images
from ..ops.view_params import view_params
from .params import ViewParams
from .spec import ViewSpec

LAYOUTS = ("NCHW", "NHWC")


def _groups(views: Sequence[ViewSpec]) -> Iterator[slice]:
    """Runs of neighbouring views that one call can make: alike in all but what is drawn."""

    def fixed(v: ViewSpec) -> tuple[Any, ...]:
        return v.height_width, v.interpolation, v.blur_kernel, v.solarize_threshold, v.mean, v.std, v.semantics

    begin = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or fixed(views[end]) != fixed(views[begin]):
            yield slice(begin, end)
            begin = end


def _checked_views(views: ViewSpec | Sequence[ViewSpec]) -> tuple[ViewSpec, ...]:
    several = (views,) if isinstance(views, ViewSpec) else tuple(views)
    if not several or not all(isinstance(view, ViewSpec) for view in several):
        raise TypeError(f"views must be a ViewSpec or a sequence of at least one, got {views!r}")
    return several


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


class _Images(NamedTuple):
    """What the caller gave, as the operator wants it."""

    tensors: list[Tensor]  # one batch [B, C, H, W], or images [C, H, W]
    single: bool  # it was one image


def _is_pil(image: Any) -> bool:
    """An image of PIL, which is imported where there is one."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)


def _check_mode(mode: str) -> None:
    """Of a PIL image: bytes that ``np.asarray`` gives as they are."""
    if mode in ("RGB", "L"):
        return
    remedy = "image.convert('RGB')"
    if mode == "F" or mode[0] == "I":  # conversion would clip these to 255
        remedy = "np.asarray(image, dtype=np.float32) / white, with white the value of a white pixel"
        remedy += " (65535 where all 16 bits are used), as convert() would clip"
    raise ValueError(f"images must be PIL images of mode RGB or L, got {mode!r}: {remedy}")


def _from_array(image: Any) -> Tensor:
    """Of a NumPy array or a PIL image: rows of pixels of channels."""
    if _is_pil(image):
        _check_mode(image.mode)
    # torch takes neither read-only memory nor steps backwards.
    plain = isinstance(image, np.ndarray) and image.flags.writeable and min(image.strides, default=0) >= 0
    pixels = torch.from_numpy(image if plain else np.array(image, order="C"))
    return pixels[..., None] if pixels.dim() == 2 else pixels


def _check_channels(image: Tensor, layout: str, remedy: str) -> None:
    """Before its dimensions are moved, so that a message shows the caller's own shape."""
    channels = image.shape[-1 if layout == "NHWC" else -3]
    if channels not in (1, 3):
        raise ValueError(
            f"images must have 1 or 3 channels, got {channels} in shape {tuple(image.shape)} read as {layout}: {remedy}"
        )


def _as_images(images: Any, layout: str) -> _Images:
    """Images of any kind; those that are ``_Images`` already stay."""
    if isinstance(images, _Images):
        return images
    _check_layout(layout)
    single = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) < 4
    several = list(images) if isinstance(images, (list, tuple)) else [images]
    if not several:
        raise ValueError("images must hold at least one image, got an empty list")
    out = []
    for image in several:
        own, remedy = layout, f"layout={'NHWC' if layout == 'NCHW' else 'NCHW'!r} reads tensors the other way"
        # Asked of the type, since PIL makes the bytes anew for the property.
        if not isinstance(image, Tensor) and hasattr(type(image), "__array_interface__"):
            image, own = _from_array(image), "NHWC"
            remedy = "arrays are read channels last whatever layout is; with channels first, pass torch.from_numpy"
        elif not isinstance(image, Tensor):
            raise TypeError(f"images must be tensors, NumPy arrays or PIL images, got {type(image).__name__}")
        if image.dim() not in (3, 4):
            raise ValueError(f"images must be [C, H, W] or a batch of them ({layout}), got shape {tuple(image.shape)}")
        _check_channels(image, own, remedy)
        out.append(image.movedim(-1, -3) if own == "NHWC" else image)
    if len(out) > 1 and any(image.dim() == 4 for image in out):
        raise ValueError("images must be one batch, or a list of images of three dimensions each")
    warn_of_bytes(out[0])
    return _Images(out, single)


def _count_and_size(images: Sequence[Tensor]) -> tuple[int, tuple[int, int] | Tensor]:
    """How many images, and their (height, width): one for all, or [B, 2]."""
    count = check_images(images)
    if len(images) == 1:
        return count, (images[0].shape[-2], images[0].shape[-1])
    return count, towards(torch.tensor([image.shape[-2:] for image in images], device="cpu"), images[0].device)


def sample_params(
    images: Any,
    views: ViewSpec | Sequence[ViewSpec],
    ids: Ids = None,
    *,
    seed: int = 0,
    epoch: int | None = None,
    layout: str = "NCHW",
) -> ViewParams:
    """Draw what happens to each image in each view.

    Args:
        images: as for ``apply``; only their number and sizes matter.
        views: V of them.
        ids: [B], which sample each image is, such as its index in the dataset: parameters depend on (seed, epoch, view,
            id) and on the image's size alone, whatever the batch, the worker, the rank or the device. Default: drawn
            from torch's CPU generator, so ``torch.manual_seed`` and the seeds of data-loader workers rule.
        seed: 64 bits. Default 0.
        epoch: the current epoch, below 2³². Without it every epoch repeats the same views: default 0, with a warning
            where ids are given.
        layout: of tensors, ``"NCHW"`` (default) or ``"NHWC"``.

    Returns:
        V views of B images, on the images' device.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Example:
        >>> views = sslfast.augment.recipe("dino")
        >>> params = sslfast.augment.sample_params(torch.zeros(4, 3, 256, 256), views, [0, 1, 2, 3], epoch=3)
        >>> params.flip.shape  # 10 views of 4 images
        torch.Size([10, 4])
    """
    tensors, _ = _as_images(images, layout)
    count, size = _count_and_size(tensors)
    table = view_params(
        sample_ids(ids, count, tensors[0].device),
        size,
        [view.numbers() for view in _checked_views(views)],
        seed=seed,
        epoch=epoch_of(epoch, ids),
    )
    return ViewParams(table)


@overload
def apply(
    images: Any,
    params: ViewParams | Tensor,
    views: ViewSpec | Sequence[ViewSpec],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    layout: str = "NCHW",
    stacked: Literal[False] = False,
) -> list[Tensor]: ...


@overload
def apply(
    images: Any,
    params: ViewParams | Tensor,
    views: ViewSpec | Sequence[ViewSpec],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    layout: str = "NCHW",
    stacked: Literal[True],
) -> Tensor: ...


@overload
def apply(
    images: Any,
    params: ViewParams | Tensor,
    views: ViewSpec | Sequence[ViewSpec],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    layout: str = "NCHW",
    stacked: bool = False,
) -> list[Tensor] | Tensor: ...


def apply(
    images: Any,
    params: ViewParams | Tensor,
    views: ViewSpec | Sequence[ViewSpec],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    layout: str = "NCHW",
    stacked: bool = False,
) -> list[Tensor] | Tensor:
    """Make the views that ``params`` describe.

    Args:
        images: a batch [B, C, H, W] (or [B, H, W, C], with ``layout="NHWC"``), one image, or a list of B images of any
            sizes: uint8, or floating point on the scale 0 … 1 (what seems to be on 0 … 255 is warned of); 1 or 3
            channels; any strides. NumPy arrays and PIL images too, channels last, their pixels as they are stored:
            EXIF's orientation is not applied, as in torchvision. Floating-point values beyond [0, 1] are clamped where
            torchvision clamps: by brightness, contrast, saturation and hue.
        params: V views of B images, or their table.
        views: V of them; what is not drawn (size, interpolation, kernel, normalisation, semantics) comes from here.
        dtype: of the views: float32 (default), bfloat16 or float16.
        channels_last: the views' memory format. Default False.
        layout: of tensors, ``"NCHW"`` (default) or ``"NHWC"``.
        stacked: all views in one tensor; they must have one size. Default False.

    Returns:
        V tensors [B, C, h, w], or [C, h, w] for one image; stacked, one of [V, B, C, h, w] or [V, C, h, w]. Neighbours
        of one size share memory without overlapping.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    Example:
        >>> images, views = torch.zeros(4, 3, 40, 40), sslfast.augment.recipe("simclr", size=32)
        >>> params = sslfast.augment.sample_params(images, views, [0, 1, 2, 3])
        >>> sslfast.augment.apply(images, params, views, stacked=True).shape
        torch.Size([2, 4, 3, 32, 32])
    """
    tensors, single = _as_images(images, layout)
    table = (ViewParams(params) if isinstance(params, Tensor) else params).table
    several = _checked_views(views)
    if len(table) != len(several):
        raise ValueError(f"params must describe {len(several)} views, got {len(table)}")
    sizes = {view.height_width for view in several}
    if stacked and len(sizes) > 1:
        raise ValueError(f"stacked must be False for views of several sizes, got {sorted(sizes)}")
    made = []  # [views of the group, B, C, h, w] each
    for group in _groups(several):
        spec = several[group.start]
        views_of_group = augment_views(
            tensors,
            table[group],
            size=spec.height_width,
            cubic=spec.interpolation == "bicubic",
            blur_kernel=spec.blur_kernel,
            threshold=spec.solarize_threshold,
            mean=spec.channels("mean", tensors[0].shape[-3]),
            std=spec.channels("std", tensors[0].shape[-3]),
            pil=spec.semantics == "pil",
            dtype=dtype,
            channels_last=channels_last,
        )
        made.append(views_of_group[:, 0] if single else views_of_group)
    if stacked:
        return made[0] if len(made) == 1 else torch.cat(made)
    return [view for group_of_views in made for view in group_of_views]


class MultiViewTransform:
    """Several views of each image in one call: on a batch in the training process (CPU or GPU), or image by image
    inside data-loader workers, with the same result for the same ids.

    Args:
        views: what to make, such as ``recipe("dino")``.
        seed, dtype, channels_last, layout, stacked: as for ``sample_params`` and ``apply``.

    Example:
        >>> images, ids = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8), [0, 1, 2, 3]
        >>> transform = sslfast.augment.MultiViewTransform(sslfast.augment.recipe("simclr", size=32))
        >>> first, second = transform(images, ids, epoch=3)  # [4, 3, 32, 32] each
        >>> params = transform.sample_params(images, ids, epoch=3)
        >>> again, _ = transform.apply(images, params)  # the same, whenever it is called
        >>> torch.equal(first, again)
        True
    """

    def __init__(
        self,
        views: ViewSpec | Sequence[ViewSpec],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        layout: str = "NCHW",
        stacked: bool = False,
    ) -> None:
        seed_of(seed)
        if dtype not in VIEWS:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        _check_layout(layout)
        self.views = _checked_views(views)
        self.seed = seed
        self.dtype = dtype
        self.channels_last = channels_last
        self.layout = layout
        self.stacked = stacked

    def sample_params(self, images: Any, ids: Ids = None, *, epoch: int | None = None) -> ViewParams:
        """What ``__call__`` would draw; see ``sslfast.augment.sample_params``."""
        return sample_params(images, self.views, ids, seed=self.seed, epoch=epoch, layout=self.layout)

    def apply(self, images: Any, params: ViewParams | Tensor) -> list[Tensor] | Tensor:
        """The views that ``params`` describe; see ``sslfast.augment.apply``."""
        return apply(
            images,
            params,
            self.views,
            dtype=self.dtype,
            channels_last=self.channels_last,
            layout=self.layout,
            stacked=self.stacked,
        )

    def __call__(self, images: Any, ids: Ids = None, *, epoch: int | None = None) -> list[Tensor] | Tensor:
        """One tensor a view: [B, C, h, w], or [C, h, w] for one image. ``ids``, ``epoch``: see ``sample_params``."""
        prepared = _as_images(images, self.layout)
        return self.apply(prepared, self.sample_params(prepared, ids, epoch=epoch))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.views))}, seed={self.seed}, dtype={self.dtype})"
