"""Cases of patches, of losses of patches and features, and of views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslfast.augment import ViewSpec, sample_params
from sslfast.ops.augment_views import augment_views
from sslfast.ops.gather_patches import gather_patches, scatter_patches
from sslfast.ops.masked_feature_loss import masked_feature_loss
from sslfast.ops.masked_patch_loss import masked_patch_loss
from sslfast.ops.view_params import view_params

from .case import FLOATS, Case, Function, case, given, name_of, some_ids

# Images, and the sides of a patch.
IMAGES = {
    "four side by side": ((2, 3, 16, 24), (8, 8)),
    "odd": ((2, 1, 6, 10), (3, 5)),
    "channels that end within four": ((2, 4, 6, 9), (3, 3)),
    "one pixel": ((1, 1, 1, 1), (1, 1)),
    "film": ((1, 3, 4, 8, 12), (2, 4, 4)),
    "many channels": ((1, 70, 4, 4), (4, 2)),
    "many patches": ((13, 1, 9, 9), (1, 1)),
    "no image": ((0, 3, 8, 8), (4, 4)),
}
LAYOUTS: dict[str, Function] = {
    "planar": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}
ORDERS = ("channels_first", "channels_last")
PIXELS = (torch.uint8, *FLOATS)


def image_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    x = torch.randint(0, 256, tuple(shape))
    return x.to(torch.uint8) if dtype == torch.uint8 else (x / 255).to(dtype)


def patches_of(name: str) -> tuple[int, int]:
    """L, and the numbers of a patch."""
    shape, patch = IMAGES[name]
    return math.prod(shape[2:]) // math.prod(patch), shape[1] * math.prod(patch)


def patches() -> Iterator[Case]:
    def gather(image: str, layout: str, order: Any, pixels: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, patch = IMAGES[image]
        length = patches_of(image)[0]
        ids = None if layout == "planar" else some_ids(shape[0], (length + 1) // 2, length=length)
        numbers = [0.5 + 0.1 * c for c in range(shape[1])] if shape[1] < 64 else None
        options: dict[str, Any] = dict(patch_size=patch, order=order, dtype=dtype, mean=numbers, std=numbers)
        x = image_of(shape, pixels).requires_grad_(pixels != torch.uint8)
        return (lambda x, ids: gather_patches(LAYOUTS[layout](x), ids, **options)), x, ids

    def scatter(image: str, order: Any, dtype: torch.dtype) -> tuple[Any, ...]:
        shape, patch = IMAGES[image]
        length, numbers = patches_of(image)
        ids = some_ids(shape[0], (length + 1) // 2, length=length)
        options: dict[str, Any] = dict(size=shape[1:], patch_size=patch, order=order)
        return (lambda x, ids: scatter_patches(x, ids, **options)), given(*ids.shape, numbers, dtype=dtype), ids

    both = ("gather_patches", "scatter_patches")
    layouts = [*itertools.product(IMAGES, LAYOUTS, ORDERS, PIXELS[:2], FLOATS[:1])]
    dtypes = [*itertools.product(["four side by side", "odd"], ["offset"], ["channels_first"], PIXELS, FLOATS)]
    for image, layout, order, pixels, dtype in dict.fromkeys([*layouts, *dtypes]):
        name = f"gather_patches, {image}, {layout}, {order}, {name_of(pixels)} to {name_of(dtype)}"
        operators = both[:1] if pixels == torch.uint8 else both
        yield case(name, operators, partial(gather, image, layout, order, pixels, dtype))
    for image, order, dtype in itertools.product(IMAGES, ORDERS, FLOATS):
        yield case(f"scatter_patches, {image}, {order}, {name_of(dtype)}", both, partial(scatter, image, order, dtype))


def losses() -> Iterator[Case]:
    def of_patches(image: str, form: Sequence[Any], pixels: torch.dtype, dtype: torch.dtype) -> tuple[Any, ...]:
        loss, target, by, order = form
        shape, patch = IMAGES[image]
        length, numbers = patches_of(image)
        index = some_ids(shape[0], (length + 1) // 2, length=length, padded=False)
        if by == "mask":
            index = torch.rand(shape[0], length) < 0.7
            index[:1, :1] = True  # of nothing, the mean is NaN
        options: dict[str, Any] = dict(patch_size=patch, loss=loss, target=target, order=order)
        if shape[1] == 3:
            options |= dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
        pred = given(*index.shape, numbers, dtype=dtype)
        function = lambda x, pred, index: masked_patch_loss(x, pred, index, **options)  # noqa: E731
        return function, image_of(shape, pixels), pred, index

    operators = ("masked_patch_loss", "masked_patch_loss_backward")
    forms = tuple(itertools.product(("mse", "l1"), ("pixels", "mae", "videomae"), ("mask", "ids"), ORDERS))
    dtypes = itertools.cycle(itertools.product(PIXELS, FLOATS))
    for image, form in itertools.product(IMAGES, forms):
        if image == "one pixel" and form[1] == "videomae":
            continue  # divides by the deviation of one number
        if image == "many patches" and form[1:] != ("pixels", "mask", ORDERS[0]):
            continue  # for the sum over rows alone
        pixels, dtype = next(dtypes)
        name = f"masked_patch_loss, {image}, {', '.join(form)}, {name_of(pixels)}, {name_of(dtype)}"
        yield case(name, operators, partial(of_patches, image, form, pixels, dtype))

    def of_features(size: Sequence[int], options: dict[str, Any], teacher: torch.dtype, dtype: Any) -> tuple[Any, ...]:
        s, b, length, kept, d = size
        pred, target = given(s, b, kept, d, dtype=dtype), torch.randn(b, length + 1, d).to(teacher)
        ids = some_ids(s, b, kept, length=length, padded=False)

        def function(pred: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
            return masked_feature_loss(pred, teacher[:, 1:], ids, **options)

        return function, pred, target, ids

    kinds: list[dict[str, Any]] = [{}, {"loss": "mse"}, {"beta": 0.0}, {"layer_norm": False}]
    sizes = ((2, 3, 9, 4, 70), (1, 2, 5, 5, 129), (1, 1, 1, 1, 1), (1, 0, 4, 2, 8))
    for size, kind, (teacher, dtype) in itertools.product(
        sizes, kinds, zip(FLOATS, FLOATS[1:] + FLOATS[:1], strict=True)
    ):
        name = f"masked_feature_loss {size} {kind or 'smooth_l1'}, {name_of(teacher)}, {name_of(dtype)}"
        operators = ("masked_feature_loss", "masked_feature_loss_backward")
        yield case(name, operators, partial(of_features, size, kind, teacher, dtype))
    size = (1, 3, 90, 87, 3)  # more rows than one block adds up
    yield case(f"masked_feature_loss {size}", operators, partial(of_features, size, {}, torch.float32, torch.float32))


# ------------------------------------------------------------------------------------------------------------ views


def everything(size: int | tuple[int, int], **changes: Any) -> ViewSpec:
    """A view in which every operation happens to some images and not to others."""
    options: dict[str, Any] = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, jitter_p=0.8, grey_p=0.2)
    options |= dict(blur_p=0.5, blur_kernel=9, solarize_p=0.3, mean=0.4, std=0.5)
    return ViewSpec(size, **{**options, **changes})


# Height and width of the images, and of what the views are.
VIEWS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "ragged": ((30, 41), dict(size=(33, 40))),
    "enlarged": ((9, 7), dict(size=(40, 33), scale=None, blur_kernel=3)),
    "shrunk": ((150, 130), dict(size=(16, 10), scale=None)),
    "shrunk, many bands of rows": ((350, 90), dict(size=(4, 5), scale=None, blur_kernel=3)),
    "bicubic": ((45, 60), dict(size=35, interpolation="bicubic")),
    "one pixel": ((1, 1), dict(size=(5, 3), scale=None, blur_kernel=3)),
    "to one pixel": ((20, 25), dict(size=1, blur_kernel=1)),
    "two strips": ((12, 50), dict(size=(18, 270), sigma=(0.5, 2.4), blur_p=1.0)),
    "wide blur": ((30, 30), dict(size=(40, 41), blur_kernel=79, sigma=(5.0, 9.0), blur_p=1.0)),
}


# Views are normalised by a deviation of 0.5: on the scale 0 … 1, colours are right to 1e-5.
PLAIN = dict(floor=2.5)
GREY_LEVELS = dict(floor=2.5, level=2 / 255, share=2e-3)


def views() -> Iterator[Case]:
    def make(images: list[Tensor], spec: ViewSpec, **options: Any) -> tuple[Any, ...]:
        batch: Any = images[0] if images[0].dim() == 4 else images
        table = sample_params(batch, [spec] * 2, ids=torch.arange(len(batch)), seed=5).table
        channels = images[0].shape[-3]
        options |= dict(size=spec.height_width, cubic=spec.interpolation == "bicubic", pil=spec.semantics == "pil")
        options |= dict(blur_kernel=spec.blur_kernel, threshold=spec.solarize_threshold)
        options |= {name: spec.channels(name, channels) for name in ("mean", "std")}
        return (lambda images, params: augment_views(images, params, **options)), images, table

    def of(semantics: str, size: tuple[int, int], changes: dict[str, Any], pixels: torch.dtype, **options: Any) -> Any:
        channels = options.pop("channels", 3)
        spec = everything(**changes, semantics=semantics)
        return make([image_of((3, channels, *size), pixels)], spec, **options)

    def listed(semantics: str) -> tuple[Any, ...]:
        images = [image_of((3, 9 + i, 20 - i), torch.uint8) for i in range(3)]
        return make(images, everything(12, semantics=semantics, blur_kernel=5))

    def of_layout(layout: str) -> tuple[Any, ...]:
        function, images, table = make([image_of((2, 3, 30, 41), torch.uint8)], everything((33, 40)))
        return (lambda images, params: function([LAYOUTS[layout](images[0])], params)), images, table

    for semantics, allowed in (("torchvision", PLAIN), ("pil", GREY_LEVELS)):
        for name, (size, changes) in VIEWS.items():
            make_one = partial(of, semantics, size, changes, torch.uint8)
            yield case(f"augment_views, {semantics}, {name}", ("augment_views",), make_one, **allowed)
        for pixels, channels in itertools.product((torch.uint8, *FLOATS[:1], *FLOATS[2:]), (1, 3)):
            name = f"augment_views, {semantics}, {name_of(pixels)}, {channels} channels"
            make_one = partial(of, semantics, (20, 23), dict(size=(18, 35)), pixels, channels=channels)
            yield case(name, ("augment_views",), make_one, **allowed)
        for dtype, last in itertools.product((*FLOATS[:1], *FLOATS[2:]), (False, True)):
            name = f"augment_views, {semantics}, to {name_of(dtype)}{', channels last' * last}"
            options: dict[str, Any] = dict(dtype=dtype, channels_last=last)
            make_one = partial(of, semantics, (20, 23), dict(size=(17, 21)), torch.uint8, **options)
            yield case(name, ("augment_views",), make_one, **allowed)
        yield case(f"augment_views, {semantics}, a list", ("augment_views",), partial(listed, semantics), **allowed)
    for layout in LAYOUTS:
        yield case(f"augment_views, {layout}", ("augment_views",), partial(of_layout, layout), **PLAIN)

    def of_any_value(pil: bool) -> tuple[Any, ...]:
        function, images, table = make([image_of((1, 3, 9, 10), torch.uint8)], everything((6, 5)))
        values = (math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**24, -5.0)
        tables = [table[:1].clone() for _ in range(len(values) * (table.shape[2] + 1))]
        for changed, (value, column) in zip(
            tables, itertools.product(values, [*range(table.shape[2]), slice(None)]), strict=True
        ):
            changed[..., column] = value
        numbers = [0.5] * 3

        def call(images: list[Tensor], params: Tensor) -> Tensor:  # past the checks, which refuse such values
            options = (numbers, numbers, pil, torch.float32, False)
            return torch.ops.sslfast.augment_views(images, params, [6, 5], False, 9, 0.5, *options)

        return call, images, torch.cat(tables)

    for pil in (False, True):
        name = f"augment_views, parameters of any value, {'pil' if pil else 'torchvision'}"
        yield case(name, ("augment_views",), partial(of_any_value, pil), **(GREY_LEVELS if pil else PLAIN))

    def parameters(count: int, launches: int, ragged: bool) -> tuple[Any, ...]:
        specs = [everything(32), ViewSpec(32, scale=None), ViewSpec(32, ratio=(1e-3, 1e3), shuffle=False, contrast=0.4)]
        numbers = [spec.numbers() for spec in specs * launches]
        key = dict(seed=-3, epoch=2**32 - 1, view=11)
        ids, sizes = torch.randint(-(2**63), 2**63 - 1, (count,)), torch.randint(1, 700, (count, 2))
        return (
            (lambda ids, sizes: view_params(ids, sizes, numbers, **key)),
            ids,
            sizes if ragged else (375, 500),
        )

    for count, launches, ragged in ((130, 1, True), (130, 1, False), (3, 6, True), (1, 1, False), (0, 1, False)):
        name = f"view_params of {count} images, {3 * launches} views, {'ragged' if ragged else 'one size'}"
        yield case(name, ("view_params",), partial(parameters, count, launches, ragged), exact=True)
