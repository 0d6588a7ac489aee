"""What every test of an operation shares: the error budget and the grid of shapes."""

from __future__ import annotations

import torch
from torch import Tensor

# Tolerance on top of twice the reference's own error, relative to the largest entry of the truth (or the norm).
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# (rows, features): aligned to the tiles, ragged, prime, tiny, one row, one feature, more than one tile in both.
SHAPES = [(64, 64), (100, 48), (127, 61), (3, 5), (1, 8), (33, 1), (200, 130), (301, 257)]


def within_budget(
    name: str, kernel: Tensor, reference: Tensor, truth: Tensor, dtype: torch.dtype, floor: float = 1e-6
) -> None:
    """Assert ``err(kernel) ≤ 2·err(reference) + tolerance``, by the largest entry and by the norm; NaN fails.

    Args:
        kernel: what the kernel gave, in ``dtype`` or wider.
        reference: what plain PyTorch gave in ``dtype``.
        truth: the reference in float64.
        floor: the size of one entry's terms before they cancel, where that can be more than what is left of them: the
            tolerance is relative to the larger of the two.
    """
    assert kernel.shape == truth.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(truth.shape)}"
    kernel, reference, truth = (t.detach().double().cpu() for t in (kernel, reference, truth))
    norm_floor = floor * truth.numel() ** 0.5
    for how, size, least in (("largest entry", _largest, floor), ("norm", torch.linalg.vector_norm, norm_floor)):
        err, err_reference = size(kernel - truth).item(), size(reference - truth).item()
        allowed = 2 * err_reference + TOLERANCE[dtype] * max(size(truth).item(), least)
        assert err <= allowed, (
            f"{name}: error {err:.3e} by {how}, allowed {allowed:.3e} (reference's {err_reference:.3e})"
        )


def _largest(t: Tensor) -> Tensor:
    return t.abs().max()


def same_nonfinite(name: str, kernel: Tensor, reference: Tensor) -> None:
    """NaN and Inf appear in the same places, finite entries agree to 1e-4."""
    torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{name}: {m}")
