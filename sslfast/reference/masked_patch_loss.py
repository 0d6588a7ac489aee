"""The loss of predicted patches in plain PyTorch: all patches cut out, compared, and the masked ones averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patch_targets(
    images: Tensor, patch: Sequence[int], target: str, mean: Sequence[float], std: Sequence[float], channels_inner: bool
) -> Tensor:
    """[B, L, values]: the patches of ``images`` [B, C, T, H, W], normalised as ``target`` says.

    Rows in raster order; columns (pt, ph, pw, C) if ``channels_inner``, else (C, pt, ph, pw). ``mean`` and ``std`` have
    a number a channel, or none.
    """
    b, c, *size = images.shape
    (t, h, w), (pt, ph, pw) = (n // p for n, p in zip(size, patch, strict=True)), patch
    if mean:
        images = images - images.new_tensor(mean)[:, None, None, None]
    if std:
        images = images / images.new_tensor(std)[:, None, None, None]
    x = images.reshape(b, c, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    x = x.reshape(b, t * h * w, pt * ph * pw, c)
    if target == "mae":
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-6).sqrt()
    elif target == "videomae":
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True).sqrt() + 1e-6)
    return (x if channels_inner else x.transpose(2, 3)).flatten(2)


def masked_patch_loss(
    images: Tensor,
    pred: Tensor,
    index: Tensor,
    patch: Sequence[int],
    loss: str = "mse",
    target: str = "pixels",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels_inner: bool = True,
) -> Tensor:
    """Mean loss of the masked patches.

    ``index`` is [B, L] bool with ``pred`` [B, L, values], or ids [B, M] with ``pred`` [B, M, values].
    """
    x = patch_targets(images, patch, target, mean, std, channels_inner)
    if index.dtype == torch.bool:
        # A patch that is not masked takes no part, whatever stands there.
        difference = torch.where(index[..., None], pred, 0.0) - torch.where(index[..., None], x, 0.0)
        count = index.sum()
    else:
        difference = pred - x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        count = torch.tensor(index.numel(), device=pred.device)
    point = difference.square() if loss == "mse" else difference.abs()
    return point.mean(2).sum() / count.to(pred.dtype)
