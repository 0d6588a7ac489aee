"""What the pretext tasks share: random numbers that depend on who a sample is and not on where it is drawn, and checks.

Philox4x32-10 (Salmon et al., SC 2011) with the key and the counter of ``csrc/common/philox.h``, in int64 arithmetic of
PyTorch: the same numbers on every device, in every batch, worker and rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._checks import FLOATS
from ..._ids import Ids as Ids
from ..._ids import sample_ids as sample_ids

# Streams take the place of the view's number in the counter. They begin at 2^15, and views are numbered from 0, so a
# task shares no number with a view of the same sample unless there are more than 32768 views.
ROTATION, JIGSAW, PERMUTATIONS, RELATIVE_LOCATION, COLOR_NOISE, INPAINTING, REGION = range(2**15, 2**15 + 7)

LOW = 0xFFFFFFFF
BLOCKS = 2**16  # the counter's first word is block | stream << 16
GREY = (0.2989, 0.587, 0.114)  # as torchvision's, and as the views'


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of word · factor, both below 2^32.

    The product has 64 bits and int64 holds 63, so the factor is split: word · (f₁·2^16 + f₀), each part below 2^48.
    """
    low = word * (factor & 0xFFFF)
    rest = word * (factor >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: Sequence[Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter (four words each, int64 tensors that broadcast)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def uniforms(ids: Tensor, count: int, *, seed: int = 0, epoch: int = 0, stream: int) -> Tensor:
    """Random numbers of samples.

    Args:
        ids: [B] int64.
        count: how many for each, at most 2^18.
        seed: any 64-bit whole number. Default 0.
        epoch: 0 to 2³² − 1. Default 0.
        stream: 2^15 to 2^16 − 1: what they are for.

    Returns:
        [B, count] float64 in [0, 1), multiples of 2^−32, on ``ids``' device.

    Raises:
        ValueError: a number is out of its range.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a 64-bit whole number, got {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be between 0 and 2^32 − 1, got {epoch}")
    if not 2**15 <= stream < 2**16:
        raise ValueError(f"stream must be between 2^15 and 2^16 − 1, got {stream}")
    blocks = -(-count // 4)
    if not 0 <= blocks <= BLOCKS:
        raise ValueError(f"count must be between 0 and {4 * BLOCKS}, got {count}")
    block = torch.arange(blocks, device=ids.device)[None] | stream << 16  # [1, blocks]
    sample = ids[:, None]  # [B, 1]
    words = philox((block, torch.full_like(block, epoch), sample & LOW, sample >> 32 & LOW), seed)
    return torch.stack(words, dim=2).reshape(len(ids), 4 * blocks)[:, :count].to(torch.float64) * 2.0**-32


def below(uniform: Tensor, count: Tensor | int) -> Tensor:
    """Whole numbers 0 … count − 1, int64, from uniform numbers: one multiplication, so alike on every device."""
    return (uniform * count).to(torch.int64)


def check_images(images: Tensor, channels: Sequence[int] | None = None) -> None:
    """``images`` is a batch [B, C, H, W] of uint8 or floating point, not empty, with an allowed number of channels."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise TypeError(f"images must be uint8, float32, float64, bfloat16 or float16, got {images.dtype}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images must be a batch [B, C, H, W] that is not empty, got shape {tuple(images.shape)}")
    if channels is not None and images.shape[1] not in channels:
        allowed = " or ".join(map(str, channels))
        raise ValueError(f"images must have {allowed} channels, got {images.shape[1]} in shape {tuple(images.shape)}")


def check_share(name: str, value: float) -> None:
    """``value`` is between 0 and 1."""
    if not 0 <= value <= 1:  # false for NaN too
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def check_whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """``value`` is a whole number from ``least`` on, up to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")


def unit_scale(pixels: Tensor) -> Tensor:
    """Pixels on the scale 0 … 1 in float32 (float64 stays)."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 255
    return pixels if pixels.dtype == torch.float64 else pixels.to(torch.float32)


def cut(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Patches of images at places of their own, in one gather.

    Args:
        images: [B, C, H, W].
        rows, columns: [B, P, C or 1] int64, top left corners of P patches, for each channel or for all, and the
            patches' pixels in a last dimension [B, P, C or 1, p].

    Returns:
        [B, P, C, p, p].
    """
    batch = torch.arange(images.shape[0], device=images.device)[:, None, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[batch, channel, rows[..., None], columns[..., None, :]]
