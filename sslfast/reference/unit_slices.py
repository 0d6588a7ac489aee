"""Random directions: Gaussian columns by Box and Muller's formula, divided by their length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._random.philox import LOW, philox
from .._random.streams import stream_of


def unit_slices(step: Tensor, seed: int, features: int, count: int) -> Tensor:
    """[D, S] float64 unit columns for ``step`` [] int64."""
    block = torch.arange(-(-features // 4), device=step.device)[:, None] | stream_of("slices") << 16
    column = torch.arange(count, device=step.device)[None]
    words = philox((block, step & LOW, column & LOW, column >> 32), seed)  # 4 × [D/4, S]
    normals = []
    for first, second in (words[:2], words[2:]):
        radius = (-2 * (((first >> 9) + 0.5) * 2.0**-23).double().log()).sqrt()
        angle = (second >> 8).double() * (2 * math.pi * 2.0**-24)
        normals += [radius * angle.cos(), radius * angle.sin()]
    z = torch.stack(normals, 1).flatten(0, 1)[:features]
    return z / torch.linalg.vector_norm(z, dim=0)
