"""Other packages' implementations as plain functions; a package that is absent raises ``Unavailable``."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslfast.augment import ViewSpec

from . import Unavailable

# Provider names that are distributions; their rows carry the version. The first three have losses.
PEERS = ("lightly", "pytorch-metric-learning", "memeff")
VERSIONED = (*PEERS, "torchvision", "pillow", "kornia", "open_clip_torch", "liger-kernel", "siglip-kernel")

_kept: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def label(provider: str) -> str:
    """The provider's name in the CSV: ``lightly`` becomes ``lightly-1.6.0``."""
    return f"{provider}-{importlib.metadata.version(provider)}" if provider in VERSIONED else provider


def nt_xent(provider: str, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """NT-Xent of two views ([N, D] each) as ``provider`` computes it, mean over the 2N rows.

    Raises:
        Unavailable: the package, or what it needs, is not importable.
        ValueError: ``provider`` is not one of ``PEERS``.
    """
    builders = dict(zip(PEERS, (_lightly_nt_xent, _metric_learning_nt_xent, _memeff_nt_xent), strict=True))
    if provider not in builders:
        raise ValueError(f"provider={provider!r} has no NT-Xent; allowed: {', '.join(PEERS)}")
    return builders[provider](temperature)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} is not importable: {error}") from error


def _needs_gpu(package: str) -> None:
    if not torch.cuda.is_available():
        raise Unavailable(f"{package} runs on a CUDA GPU only")


def _import_memeff() -> Any:
    """memeff, whose products of float32 are TF32 unless told otherwise: not the same work."""
    _needs_gpu("memeff")
    os.environ.setdefault("MEMEFF_INPUT_PRECISION", "ieee")
    return _import("memeff")


def _import_torchvision() -> None:
    """Import torchvision, also a wheel that was built against another torch than the one beside it.

    Such a wheel's library does not load, and the import then ends at the fake kernels that it registers for two of its
    operators. Declaring these two first is enough: neither a loss nor an augmentation calls one.
    """
    try:
        importlib.import_module("torchvision")
        return
    except ImportError as error:
        raise Unavailable(f"torchvision is not importable: {error}") from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    importlib.import_module("torchvision")


def lightly_loss(module: str, name: str, **options: float) -> Callable[..., Tensor]:
    """``lightly.loss.<module>.<name>(**options)``.

    Raises:
        Unavailable: lightly, or the torchvision that it needs, is not importable.
    """
    _import("lightly")
    _import_torchvision()  # through lightly.loss.__init__, whatever loss one asks for
    return getattr(_import(f"lightly.loss.{module}"), name)(**options)


def lightly_momentum(momentum: float) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """``lightly.models.utils.update_momentum`` of tensors: two of PyTorch's kernels over all of them.

    Raises:
        Unavailable: lightly, or the torchvision that it needs, is not importable.
    """
    _import("lightly")
    _import_torchvision()
    update = _import("lightly.models.utils").update_momentum

    class Parameters(torch.nn.Module):
        """Nothing but parameters, which is all that it asks of a module."""

        def __init__(self, tensors: Sequence[Tensor]) -> None:
            super().__init__()
            self.tensors = tensors

        def parameters(self, recurse: bool = True) -> Any:
            return iter(self.tensors)

    return lambda teacher, student: update(Parameters(student), Parameters(teacher), m=momentum)


def _lightly_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lightly_loss("ntx_ent_loss", "NTXentLoss", temperature=temperature)


def _metric_learning_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    loss = _import("pytorch_metric_learning.losses").NTXentLoss(temperature=temperature)

    def function(z0: Tensor, z1: Tensor) -> Tensor:
        # Each image is a class of two: its loss leaves other positives out of the denominator, and here there are none.
        return loss(torch.cat([z0, z1]), torch.arange(len(z0), device=z0.device).repeat(2))

    return function


def _memeff_nt_xent(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """memeff has no NT-Xent, but its query-document loss with query-query negatives is NT-Xent's mean over one view.

    ``margin=2`` switches its mask for false negatives off; ``stable=False`` makes its gradient that of the value.
    """
    memeff = _import_memeff()
    loss = memeff.MemoryEfficientQwen3Loss(temperature, margin=2.0, use_qq_negatives=True, stable=False)
    return lambda z0, z1: 0.5 * (loss(z0, z1) + loss(z1, z0))


# -------------------------------------------------------------------------------------------------------- augmentation


def torchvision_v2() -> Any:
    """``torchvision.transforms.v2``.

    Raises:
        Unavailable: torchvision is not importable.
    """
    _import_torchvision()
    return _import("torchvision.transforms.v2")


def torchvision_pipeline(spec: ViewSpec) -> Callable[[Any], Tensor]:
    """``spec`` by torchvision's transforms, for one image: a uint8 tensor [3, H, W]; in ``pil`` semantics a PIL image.

    Bytes until the end, as torchvision advises. A PIL image is blurred by PIL, as in the published pipelines:
    torchvision would convert it to a tensor and back. Steps that never happen are left out.
    """
    v2 = torchvision_v2()
    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    mode = v2.InterpolationMode(spec.interpolation)
    steps = [
        v2.RandomResizedCrop(spec.height_width, spec.scale, spec.ratio, interpolation=mode, antialias=True),
        v2.RandomHorizontalFlip(spec.flip_p),
        v2.RandomApply([jitter], spec.jitter_p),
    ]
    if spec.grey_p > 0:
        steps.append(v2.RandomGrayscale(spec.grey_p))
    if spec.blur_p > 0 and spec.semantics == "pil":
        gaussian = _import("PIL.ImageFilter").GaussianBlur
        blur = v2.Lambda(lambda image: image.filter(gaussian(random.uniform(*spec.sigma))))
        steps.append(v2.RandomApply([blur], spec.blur_p))
    elif spec.blur_p > 0:
        steps.append(v2.RandomApply([v2.GaussianBlur(spec.blur_kernel, spec.sigma)], spec.blur_p))
    if spec.solarize_p > 0:
        steps.append(v2.RandomSolarize(_byte_threshold(spec), spec.solarize_p))
    if spec.semantics == "pil":
        steps.append(v2.PILToTensor())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*_normalisation(spec))])


def torchvision_view(image: Any, row: Sequence[float], spec: ViewSpec) -> Tensor:
    """The same steps with the choices of ``row`` (16 parameters): a uint8 or float tensor, or a PIL image."""
    v2 = torchvision_v2()
    f, mode = v2.functional, v2.InterpolationMode(spec.interpolation)
    top, left, height, width = (int(value) for value in row[:4])
    flip, factors, order, (grey, sigma, solarize) = row[4], row[5:9], row[9:13], row[13:16]
    x = f.resized_crop(image, top, left, height, width, list(spec.height_width), mode, antialias=True)
    x = f.horizontal_flip(x) if flip else x
    adjust = (f.adjust_brightness, f.adjust_contrast, f.adjust_saturation, f.adjust_hue)
    for operation in (int(o) for o in order if o >= 0):
        x = adjust[operation](x, factors[operation])
    x = f.rgb_to_grayscale(x, num_output_channels=3) if grey else x
    if sigma > 0 and spec.semantics == "pil":
        x = x.filter(_import("PIL.ImageFilter").GaussianBlur(sigma))
    elif sigma > 0:
        x = f.gaussian_blur(x, spec.blur_kernel, sigma)
    if solarize:
        float_tensor = isinstance(x, Tensor) and x.is_floating_point()
        x = f.solarize(x, spec.solarize_threshold if float_tensor else _byte_threshold(spec))
    x = f.pil_to_tensor(x) if spec.semantics == "pil" else x
    return f.normalize(f.to_dtype(x, torch.float32, scale=True), *_normalisation(spec))


def kornia_pipeline(spec: ViewSpec) -> Callable[[Tensor], Tensor]:
    """``spec`` by kornia, for a batch [B, 3, H, W] of uint8, each image with its own choices; no solarize.

    Not the same function to the last: kornia resamples without antialiasing, and shuffles the jitter once a batch.

    Raises:
        Unavailable: kornia, or the kornia_rs that it needs, is not importable.
    """
    k = _import("kornia.augmentation")
    jitter = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps = [
        k.RandomResizedCrop(spec.height_width, spec.scale, spec.ratio, resample=spec.interpolation.upper()),
        k.RandomHorizontalFlip(p=spec.flip_p),
        k.ColorJitter(*jitter, same_on_batch=False, p=spec.jitter_p),
    ]
    if spec.grey_p > 0:
        steps.append(k.RandomGrayscale(p=spec.grey_p))
    if spec.blur_p > 0:
        kernel = (spec.blur_kernel, spec.blur_kernel)
        steps.append(k.RandomGaussianBlur(kernel, spec.sigma, same_on_batch=False, p=spec.blur_p))
    mean, std = _normalisation(spec)
    pipeline = torch.nn.Sequential(*steps, k.Normalize(mean, std))
    return lambda images: pipeline(images / 255)


def kornia_colours(view: Tensor, row: Sequence[float], spec: ViewSpec) -> Tensor:
    """What follows on crop and flip, with the choices of ``row``: jitter, grey, blur and normalisation of one view.

    Args:
        view: [3, h, w] in [0, 1].
    """
    enhance, filters = _import("kornia.enhance"), _import("kornia.filters")
    factors, order, (grey, sigma, _) = row[5:9], row[9:13], row[13:16]
    adjust = (
        enhance.adjust_brightness_accumulative,
        enhance.adjust_contrast_with_mean_subtraction,
        enhance.adjust_saturation_with_gray_subtraction,
        lambda x, turns: enhance.adjust_hue(x, 2 * math.pi * turns),
    )
    x = view[None]
    for operation in (int(o) for o in order if o >= 0):
        x = adjust[operation](x, factors[operation])
    if grey:
        x = _import("kornia.color").rgb_to_grayscale(x).expand_as(x)
    if sigma > 0:
        x = filters.gaussian_blur2d(x, (spec.blur_kernel, spec.blur_kernel), (sigma, sigma))
    mean, std = (torch.tensor(values, device=x.device) for values in _normalisation(spec))
    return enhance.normalize(x, mean, std)[0]


def _normalisation(spec: ViewSpec) -> tuple[list[float], list[float]]:
    return list(spec.channels("mean", 3)), list(spec.channels("std", 3))


def _byte_threshold(spec: ViewSpec) -> int:
    """The byte from which solarize inverts: for 1/2 it is 128."""
    return math.ceil(255 * spec.solarize_threshold)
