"""The loss of predicted patches, as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...ops.masked_patch_loss import LOSSES, ORDERS, TARGETS, masked_patch_loss


class MaskedPatchLoss(nn.Module):
    """The module form of :func:`sslfast.masked_patch_loss`, for MAE, SimMIM and VideoMAE.

    Args:
        patch_size: p or (ph, pw), or (pt, ph, pw) for video.
        loss, target, mean, std, order: as the function takes them.

    Shapes:
        ``images`` [B, C, H, W] or [B, C, T, H, W]; ``pred`` [B, L, n] or [B, M, n]; ``masks`` [B, L] or ids [B, M], or
        :class:`Masks`; output: [].

    Raises:
        As :func:`sslfast.masked_patch_loss`.

    Example:
        >>> criterion = sslfast.MaskedPatchLoss(patch_size=16)
        >>> images, masks = torch.ones(2, 3, 32, 32), torch.tensor([[True, False, False, True]] * 2)
        >>> criterion(images, torch.zeros(2, 4, 768), masks).item()
        1.0
    """

    def __init__(
        self,
        patch_size: int | Sequence[int] = 16,
        *,
        loss: str = "mse",
        target: str = "pixels",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        order: str = "channels_last",
    ) -> None:
        super().__init__()
        for name, value, allowed in (("loss", loss, LOSSES), ("target", target, TARGETS), ("order", order, ORDERS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.patch_size = patch_size
        self.loss = loss
        self.target = target
        self.mean = mean
        self.std = std
        self.order = order

    def forward(self, images: Tensor, pred: Tensor, masks: Any) -> Tensor:
        """The loss of the predictions at the masked patches."""
        return masked_patch_loss(
            images,
            pred,
            masks,
            patch_size=self.patch_size,
            loss=self.loss,
            target=self.target,
            mean=self.mean,
            std=self.std,
            order=self.order,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, loss={self.loss!r}, target={self.target!r}, order={self.order!r}"
