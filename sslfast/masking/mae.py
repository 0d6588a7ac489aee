"""The loss of facebookresearch/mae, argument for argument."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.masked_patch_loss import masked_patch_loss


def forward_loss(
    imgs: Tensor, pred: Tensor, mask: Tensor, *, patch_size: int | Sequence[int], norm_pix_loss: bool = False
) -> Tensor:
    """``MaskedAutoencoderViT.forward_loss``: the mean squared error of the masked patches.

    Args:
        imgs: [N, 3, H, W]; pred: [N, L, p²·3]; mask: [N, L], 0 kept, 1 removed; as there.
        patch_size: p, which MAE takes from its ``patch_embed``.
        norm_pix_loss: compare with pixels normalised by their patch's mean and variance (default: plain pixels).

    Returns:
        [] as :func:`sslfast.ops.masked_patch_loss`, of which this is a call; and so are the errors.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; ``models_mae.py`` of that repository.

    Example:
        >>> imgs, pred, mask = torch.ones(1, 3, 32, 32), torch.zeros(1, 4, 768), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
        >>> sslfast.masking.forward_loss(imgs, pred, mask, patch_size=16).item()
        1.0
    """
    return masked_patch_loss(imgs, pred, mask, patch_size=patch_size, target="mae" if norm_pix_loss else "pixels")
