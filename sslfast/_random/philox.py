"""Philox4x32-10 for tensors and for integers: the numbers of ``csrc/common/philox.h``, bit for bit.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3". A random number depends on who draws it (seed,
sample, epoch, stream) and not on where: it is the same on every device, in every batch, worker and rank. The reference
has an implementation of its own, in NumPy, for tests to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .key import key_of
from .streams import FIRST, LAST

LOW = 0xFFFFFFFF
BLOCKS = 2**16  # the counter's first word is block | stream << 16

Word = TypeVar("Word", int, Tensor)


def _product(word: Word, factor: int) -> tuple[Word, Word]:
    """High and low 32 bits of word · factor, both below 2^32.

    The product has 64 bits and int64 holds 63, so the factor is split: word · (f₁·2^16 + f₀), each part below 2^48.
    """
    low = word * (factor & 0xFFFF)
    rest = word * (factor >> 16) + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: Sequence[Word], seed: int) -> tuple[Word, Word, Word, Word]:
    """Four random words for each counter: four words, integers or int64 tensors that broadcast."""
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
        stream: what they are for, one of :mod:`sslfast._random.streams`.

    Returns:
        [B, count] float64 in [0, 1), multiples of 2^−32, on ``ids``' device.

    Raises:
        ValueError: a number is out of its range.
    """
    seed, epoch, _ = key_of(seed, epoch)
    if not FIRST <= stream <= LAST:
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
