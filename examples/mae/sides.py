"""The masked parts of a step, twice: as MAE's authors write them in PyTorch, and with sslfast.

Both take the same noise [B, L]: in every image the K = int(L · (1 − ratio)) patches of smallest noise stay visible. All
else, the two transformers among it, is the same code for both (``model.py``).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sslfast import masked_patch_loss
from sslfast.masking import Masks, embed_patches, random_masks, scatter_tokens

from .model import MaskedAutoencoder


class Side(Protocol):
    """One way to compute the masked parts; ``masks`` is what the side keeps of an embedding's masks for the others."""

    def embed(self, model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Any]:
        """[B, 1 + K, D]: the class token and the visible patches of images [B, C, H, H], projected and placed."""

    def fill(self, model: MaskedAutoencoder, encoded: Tensor, masks: Any) -> Tensor:
        """[B, 1 + L, D']: the decoder's input: encoded [B, 1 + K, D'], and mask tokens where patches are masked."""

    def loss(self, images: Tensor, pred: Tensor, masks: Any, patch: int, normalise: bool) -> Tensor:
        """Mean squared error of pred [B, L, patch² · C] over the masked patches.

        Args:
            normalise: against patches that are standardised each by its own mean and variance, else against the pixels.
        """


class Plain:
    """After https://github.com/facebookresearch/mae, ``models_mae.py``."""

    def embed(
        self, model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = model.project(images).flatten(2).transpose(1, 2)  # all patches
        x = x + model.position
        n, length, width = x.shape
        kept = int(length * (1 - ratio))
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        ids_keep = ids_shuffle[:, :kept]
        x = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones(n, length, device=x.device)
        mask[:, :kept] = 0
        mask = torch.gather(mask, dim=1, index=ids_restore)
        return torch.cat([model.class_token.expand(n, 1, -1), x], dim=1), (mask, ids_restore)

    def fill(self, model: MaskedAutoencoder, encoded: Tensor, masks: tuple[Tensor, Tensor]) -> Tensor:
        _, ids_restore = masks
        n, length = ids_restore.shape
        width = encoded.shape[2]
        tokens = model.mask_token.repeat(n, length + 1 - encoded.shape[1], 1)
        x = torch.cat([encoded[:, 1:], tokens], dim=1)
        x = torch.gather(x, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, width))
        return torch.cat([encoded[:, :1], x], dim=1) + model.decoder_position

    def loss(self, images: Tensor, pred: Tensor, masks: tuple[Tensor, Tensor], patch: int, normalise: bool) -> Tensor:
        mask, _ = masks
        target = patchify(images, patch)
        if normalise:
            mean = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(dim=-1)
        return (loss * mask).sum() / mask.sum()


class Fused:
    """The same with sslfast: only visible patches are projected, only masked ones compared, each part in one pass."""

    def embed(self, model: MaskedAutoencoder, images: Tensor, noise: Tensor, ratio: float) -> tuple[Tensor, Masks]:
        masks = random_masks(range(len(images)), model.shape.grid, ratio, order="noise", noise=noise)
        project = model.project
        tokens = embed_patches(
            images,
            masks.ids_keep,
            project.weight,
            project.bias,
            patch_size=model.shape.patch,
            position=model.position,
            prefix=model.class_token,
        )
        return tokens, masks

    def fill(self, model: MaskedAutoencoder, encoded: Tensor, masks: Masks) -> Tensor:
        return scatter_tokens(encoded, masks.ids_restore, model.mask_token, position=model.decoder_position, passed=1)

    def loss(self, images: Tensor, pred: Tensor, masks: Masks, patch: int, normalise: bool) -> Tensor:
        target = "mae" if normalise else "pixels"
        return masked_patch_loss(images, pred, masks.mask, patch_size=patch, target=target)


SIDES: dict[str, Side] = {"fused": Fused(), "plain": Plain()}


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, L, patch² · C] from images [B, C, H, W]; values of a patch in the order (row, column, channel)."""
    n, channels, height, width = images.shape
    x = images.reshape(n, channels, height // patch, patch, width // patch, patch)
    x = torch.einsum("nchpwq->nhwpqc", x)
    return x.reshape(n, (height // patch) * (width // patch), patch**2 * channels)


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """Square images [B, C, H, H] from patches [B, L, patch² · C]: the inverse of ``patchify``."""
    side = round(patches.shape[1] ** 0.5)
    x = patches.reshape(len(patches), side, side, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(patches), channels, side * patch, side * patch)
