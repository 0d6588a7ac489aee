"""Augmentation in plain PyTorch, one sample at a time, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def resized(image: Tensor, size: tuple[int, int], cubic: bool) -> Tensor:
    """Antialiased, with taps that end at the border of ``image`` [C, H, W]."""
    if size[1] == 1 < size[0]:  # torch 2.13 makes a wrong single column, and a right single row
        return resized(image.transpose(1, 2), (1, size[0]), cubic).transpose(1, 2)
    return F.interpolate(image[None], size, mode="bicubic" if cubic else "bilinear", antialias=True)[0]


# ----------------------------------------------------------------- torchvision: floats in [0, 1], tensor functional ops


def grey(image: Tensor) -> Tensor:
    """[C, H, W] → [1, H, W]; a grey image is its own."""
    if image.shape[0] == 1:
        return image
    r, g, b = image
    return (0.2989 * r + 0.587 * g + 0.114 * b)[None]


def blend(image: Tensor, other: Tensor | float, factor: float) -> Tensor:
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def hue_turned(image: Tensor, turn: float) -> Tensor:
    """Through HSV: H + turn modulo 1. V·S is written as max − min: S is not finite where max is 0 and min below."""
    r, g, b = image
    top, low = image.amax(0), image.amin(0)
    divisor = torch.where(top == low, torch.ones_like(top), top - low)
    rc, gc, bc = (top - r) / divisor, (top - g) / divisor, (top - b) / divisor
    h = torch.where(top == r, bc - gc, torch.where(top == g, 2 + rc - bc, 4 + gc - rc))
    h = (h / 6 + 1 + turn) % 1
    sector = torch.floor(6 * h)
    f = 6 * h - sector
    p = low.clamp(0, 1)
    q = (top - (top - low) * f).clamp(0, 1)
    t = (top - (top - low) * (1 - f)).clamp(0, 1)
    return by_sector(sector, top, p, q, t)


def by_sector(sector: Tensor, v: Tensor, p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """RGB from the sixths of the hue circle."""
    table = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)]
    stacked = torch.stack([torch.stack(rgb) for rgb in table])  # [6, 3, H, W]
    return stacked.gather(0, (sector.long() % 6).expand(1, 3, *sector.shape))[0]


def blurred(image: Tensor, kernel: int, sigma: float) -> Tensor:
    """Separable Gaussian of ``kernel`` taps, border mirrored."""
    x = torch.arange(kernel, dtype=image.dtype, device=image.device) - kernel // 2
    weight = torch.exp(-0.5 * (x / sigma) ** 2)
    weight = weight / weight.sum()
    half, channels = kernel // 2, image.shape[0]
    padded = F.pad(image[None], (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, weight.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, weight.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)[0]


# --------------------------------------------------------------------------- pil: whole numbers 0 … 255, held as floats


def pil_grey(image: Tensor) -> Tensor:
    if image.shape[0] == 1:
        return image
    r, g, b = image
    return torch.floor((19595 * r + 38470 * g + 7471 * b + 32768) / 65536)[None]


def pil_blend(image: Tensor, other: Tensor | float, factor: float) -> Tensor:
    return torch.floor((other + factor * (image - other)).clamp(0, 255))


def pil_hue_turned(image: Tensor, turn: float) -> Tensor:
    """Through HSV of bytes: each truncated, H turned modulo 256. Single and double precision stand where PIL's C has
    them, since a quotient that should be whole may be truncated one too low."""
    r, g, b = image.float()
    top, low = image.float().amax(0), image.float().amin(0)
    divisor = torch.where(top == low, torch.ones_like(top), top - low)
    rc, gc, bc = ((top - channel) / divisor for channel in (r, g, b))
    of_green, of_blue = 2 + rc.double() - bc, 4 + gc.double() - rc
    h = torch.where(top == r, bc - gc, torch.where(top == g, of_green.float(), of_blue.float()))
    h = ((h.double() / 6 + 1) % 1).float()
    h = torch.where(top == low, torch.zeros_like(top), torch.floor(255 * h.double()).float())
    saturation = torch.floor(255 * ((top - low) / top.clamp_min(1)).double()).float() / 255
    h = 6 * ((h + int(255 * turn)) % 256) / 255
    sector = torch.floor(h)
    f = h - sector
    p = torch.floor(top * (1 - saturation) + 0.5)
    q = torch.floor(top * (1 - saturation * f) + 0.5)
    t = torch.floor(top * (1 - saturation * (1 - f)) + 0.5)
    return by_sector(sector, top, p, q, t).to(image.dtype)


def pil_resized(image: Tensor, size: tuple[int, int], cubic: bool) -> Tensor:
    """Columns first, then rows, rounded and clamped to a byte after each."""
    for step in ((image.shape[1], size[1]), size):
        image = torch.floor(resized(image, step, cubic).clamp(0, 255) + 0.5)
    return image


def pil_blurred(image: Tensor, sigma: float) -> Tensor:
    """Three box filters each way whose variances add up to σ², the border repeated, rounded after each."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weight = int(2**24 / (2 * (whole + share) + 1))  # in fixed point
    end = (2**24 - (2 * whole + 1) * weight) // 2
    weights = torch.tensor([end, *[weight] * (2 * whole + 1), end], device=image.device)
    for _ in range(2):
        for _ in range(3):
            padded = F.pad(image[None], (whole + 1, whole + 1, 0, 0), mode="replicate")[0].long()
            image = (((padded.unfold(2, len(weights), 1) * weights).sum(-1) + 2**23) >> 24).to(image.dtype)
        image = image.transpose(1, 2)
    return image


# --------------------------------------------------------------------------------------------------------------- a view


def augment_view(
    image: Tensor,
    row: Sequence[float],
    *,
    size: tuple[int, int],
    cubic: bool,
    blur_kernel: int,
    threshold: float,
    pil: bool,
) -> Tensor:
    """One view of ``image`` [C, H, W] on the scale 0 … 1, before normalisation; ``row``: its 16 parameters."""
    top, left, height, width = (int(value) for value in row[:4])
    flip, factors, order, (grey_on, sigma, solarize) = row[4], row[5:9], row[9:13], row[13:16]
    x = image[:, top : top + height, left : left + width]
    to_grey, mix, turned = (pil_grey, pil_blend, pil_hue_turned) if pil else (grey, blend, hue_turned)
    if pil:
        x = torch.floor(255 * x.nan_to_num(0).clamp(0, 1) + 0.5)
    x = pil_resized(x, size, cubic) if pil else resized(x, size, cubic)
    if flip:
        x = x.flip(2)
    for operation in order:
        factor = factors[int(operation)]
        if operation == 0:
            x = mix(x, 0.0, factor)
        if operation == 1:
            mean = to_grey(x).mean()
            x = mix(x, torch.floor(mean + 0.5) if pil else mean, factor)
        if operation == 2 and len(x) == 3:
            x = mix(x, to_grey(x), factor)
        if operation == 3 and len(x) == 3:
            x = turned(x, factor)
    if grey_on:
        x = to_grey(x).expand(len(x), -1, -1)
    if sigma > 0:
        x = pil_blurred(x, sigma) if pil else blurred(x, blur_kernel, sigma)
    if solarize:
        white, limit = (255, 256 * threshold) if pil else (1, threshold)
        x = torch.where(x >= limit, white - x, x)
    return x / 255 if pil else x


def augment_views(
    images: Sequence[Tensor],
    params: Tensor,
    *,
    size: tuple[int, int],
    cubic: bool = False,
    blur_kernel: int = 23,
    threshold: float = 0.5,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    pil: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[V, B, C, h, w] in ``dtype`` (float64 for the truth of tests): see ``sslfast.ops.augment_views``."""
    each = list(images[0]) if images[0].dim() == 4 else list(images)
    shift, scale = (torch.tensor(v, dtype=dtype, device=each[0].device)[:, None, None] for v in (mean, std))
    views = []
    for of_view in params.tolist():
        for image, row in zip(each, of_view, strict=True):
            x = image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)
            view = augment_view(x, row, size=size, cubic=cubic, blur_kernel=blur_kernel, threshold=threshold, pil=pil)
            views.append((view - shift) / scale)
    if not views:
        return each[0].new_empty((*params.shape[:2], len(each[0]), *size), dtype=dtype)
    return torch.stack(views).unflatten(0, params.shape[:2])
