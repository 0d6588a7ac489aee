"""What the benchmark of augmentation works with: photographs, kinds of views, their bytes, and the truth about them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import sslfast
from sslfast import reference
from sslfast.augment import IMAGENET_MEAN, IMAGENET_STD, ViewParams, ViewSpec, sample_params

from .harness import Case

PROVEN = 4  # images whose views are compared with the truth


@functools.lru_cache(maxsize=2)
def photographs(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8: distinct crops of scikit-learn's two photographs, resized by PIL."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(photo) for photo in load_sample_images().images]
    draw = np.random.default_rng(0)
    crops = []
    for index in range(count):
        photo = whole[index % len(whole)]
        length = int(draw.integers(min(photo.size) // 2, min(photo.size) + 1))
        left, top = (int(draw.integers(0, extent - length + 1)) for extent in photo.size)
        crop = photo.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + length, top + length))
        crops.append(torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1))
    return torch.stack(crops).contiguous()


def views(case: Case) -> list[ViewSpec]:
    """One view, or two, as SimCLR makes it, of small images as its paper does on CIFAR-10 (half the strength, no blur);
    or DINO's two global and eight local views.
    """
    shape = case.shape
    semantics = "pil" if shape["pil"] else "torchvision"
    common = ViewSpec(jitter_p=0.8, grey_p=0.2, mean=IMAGENET_MEAN, std=IMAGENET_STD, semantics=semantics)
    if shape["views"] <= 2:
        s = 1.0 if shape["size"] > 32 else 0.5
        view = replace(
            common, size=shape["size"], brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s
        )
        return [replace(view, blur_p=0.5, blur_kernel=23) if shape["size"] > 32 else view] * shape["views"]
    dino = replace(common, interpolation="bicubic", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    large = replace(dino, size=shape["size"], scale=(0.4, 1.0))
    small = replace(dino, size=96 * shape["size"] // 224, scale=(0.05, 0.4), blur_p=0.5, blur_kernel=9)
    first, second = replace(large, blur_p=1.0), replace(large, blur_p=0.1, solarize_p=0.2)
    return [first, second, *[small] * (shape["views"] - 2)]


def choices(case: Case, count: int) -> ViewParams:
    """What is drawn for the first ``count`` images in epoch 0, which is the same whoever draws."""
    images = torch.empty(count, 3, case.shape["source"], case.shape["source"], dtype=torch.uint8, device=case.device)
    with sslfast.use_backend("reference"):
        return sample_params(images, views(case), range(count), epoch=0)


def proven(case: Case) -> int:
    """How many images the truth is about: not more than the first call has."""
    return min(PROVEN, case.shape["images"] if case.shape["batch"] == 1 else case.shape["batch"])


def exact(case: Case) -> tuple[Tensor, ...]:
    """The views of the first images in epoch 0, [proven, 3, h, w] each, by the reference in float64."""
    images = photographs(case.shape["images"], case.shape["source"])[: proven(case)].to(case.device)
    table = choices(case, len(images)).table
    return tuple(
        reference.augment_views(
            [images],
            table[v : v + 1],
            size=spec.height_width,
            cubic=spec.interpolation == "bicubic",
            blur_kernel=spec.blur_kernel,
            threshold=spec.solarize_threshold,
            mean=spec.channels("mean", 3),
            std=spec.channels("std", 3),
            pil=spec.semantics == "pil",
            dtype=torch.float64,
        )[0]
        for v, spec in enumerate(views(case))
    )


def bytes_moved(case: Case) -> float:
    """Each crop read once, as bytes, and each view written once."""
    count = case.shape["images"]
    crops = 3.0 * choices(case, count).box[..., 2:].double().prod(-1).sum().item()
    pixels = sum(height * width for height, width in (spec.height_width for spec in views(case)))
    return crops + 3.0 * count * pixels * case.torch_dtype.itemsize


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads for what PyTorch computes inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
