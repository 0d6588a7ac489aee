"""The steps of a masked autoencoder that several packages write alike: masks, visible tokens, decoder input, loss.

Each returns ``Unserved`` for what it does not compute exactly as the packages' code does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATS, readable
from ..masking.compat import by_noise
from ..masking.patches import embed_patches
from ..masking.tokens import gather_tokens, scatter_tokens
from ..ops.masked_patch_loss import masked_patch_loss
from ._serve import Unserved, unserved_tensors


def masks(
    tokens: tuple[int, int], ratio: float, device: torch.device, noise: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | Unserved:
    """``ids_keep`` [N, K], ``mask`` and ``ids_restore`` [N, L], by the random numbers that the packages draw."""
    if torch.get_default_dtype() != torch.float32:
        return Unserved(f"a default dtype of {torch.get_default_dtype()}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        return Unserved(f"a mask ratio of {ratio!r}")
    kept = int(tokens[1] * (1 - ratio))
    if kept == 0:
        return Unserved("a mask that keeps nothing")
    if noise is None:
        noise = torch.rand(*tokens, device=device)
    elif not isinstance(noise, Tensor) or noise.shape != tokens or noise.device != device:
        return Unserved("noise of another shape or device than the tokens")
    return by_noise(noise, kept)


def masked_tokens(x: Tensor, ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | Unserved:
    """``random_masking`` of tokens ``x`` [N, L, D]."""
    unserved = unserved_tensors(x, dim=3)
    if unserved:
        return unserved
    chosen = masks((x.shape[0], x.shape[1]), ratio, x.device, noise)
    if isinstance(chosen, Unserved):
        return chosen
    ids_keep, mask, restore = chosen
    return gather_tokens(x, ids_keep), mask, restore


def unserved_projection(projection: Any, images: Tensor) -> Unserved | None:
    """Why a patch projection is not the product of whole patches with one matrix, for images [N, C, H, W]."""
    unserved = unserved_tensors(images, dim=4)
    if unserved:
        return unserved
    if type(projection) is not nn.Conv2d:
        return Unserved(f"patches projected by {type(projection).__name__}")
    if hooked(projection):
        return Unserved("hooks on the patch projection")
    p = projection.kernel_size
    plain = (projection.stride, projection.padding, projection.dilation, projection.groups)
    if plain != (p, (0, 0), (1, 1), 1):
        return Unserved("a patch projection whose patches overlap, or are padded, spread or split by channel")
    if images.shape[1] != projection.in_channels or images.shape[2] % p[0] or images.shape[3] % p[1]:
        return Unserved(f"images of shape {tuple(images.shape)}")
    if images.device != projection.weight.device:
        return Unserved("images and weights on several devices")
    if images.dtype != projection.weight.dtype and not torch.is_autocast_enabled(images.device.type):
        return Unserved(f"images of {images.dtype} and weights of {projection.weight.dtype}")
    return None


def hooked(*modules: Any) -> bool:
    """Some module has hooks, which do not run where sslfast computes its part."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def unserved_positions(images: Tensor, projection: nn.Conv2d, position: Tensor, class_token: Tensor) -> Unserved | None:
    """Why :func:`visible_tokens` cannot place these patches; asked before any random number is drawn."""
    p, weight = projection.kernel_size, projection.weight
    patches = (images.shape[2] // p[0]) * (images.shape[3] // p[1])
    if position.shape != (1, 1 + patches, weight.shape[0]) or class_token.shape != (1, 1, weight.shape[0]):
        return Unserved(f"a position table of shape {tuple(position.shape)} for {patches} patches")
    if not (position.device == class_token.device == images.device):
        return Unserved("images and positions on several devices")
    wide = torch.promote_types(_projected(projection), position.dtype)
    if class_token.dtype != position.dtype or position.dtype != wide:
        kinds = f"{weight.dtype}, {position.dtype} and {class_token.dtype}"
        return Unserved(f"projection, positions and class token of {kinds}")
    return None


def _projected(projection: nn.Conv2d) -> torch.dtype:
    """What a convolution returns: autocast has it in 16 bits."""
    weight = projection.weight
    if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def visible_tokens(images: Tensor, projection: nn.Conv2d, ids: Tensor, position: Tensor, class_token: Tensor) -> Tensor:
    """[N, 1 + K, D]: the class token and the patches ``ids``, each with its row of ``position`` [1, 1 + L, D].

    Only these patches are projected: the others are not read.
    """
    p, weight, bias = projection.kernel_size, projection.weight, projection.bias
    size, prefix = (p[0], p[1]), class_token + position[:, :1]
    if _projected(projection) == position.dtype and not torch.is_autocast_enabled(images.device.type):
        return embed_patches(images, ids, weight, bias, patch_size=size, position=position[:, 1:], prefix=prefix)
    tokens = embed_patches(images, ids, weight, bias, patch_size=size)
    # Positions are added in their own precision, not in that of the projection.
    return gather_tokens(tokens.to(position.dtype), ids, position=position[:, 1:], prefix=prefix, packed=True)


def unserved_places(tokens: Tensor, restore: Tensor, mask_token: Tensor, position: Tensor) -> Unserved | None:
    """Why :func:`restored_tokens` cannot place ``tokens`` [N, 1 + K, any], asked before the decoder embeds them.

    Embedded by sslfast and by the package's code after it, they would cost twice, and hooks would run twice.
    """
    unserved = unserved_tensors(tokens, dim=3)
    if unserved:
        return unserved
    if not isinstance(restore, Tensor) or restore.dim() != 2:
        return Unserved("ids_restore that are no tensor of 2 dimensions")
    length = restore.shape[1]
    if restore.dtype != torch.int64 or len(restore) != len(tokens) or tokens.shape[1] > 1 + length:
        return Unserved(f"ids_restore of shape {tuple(restore.shape)} and {restore.dtype} for {tuple(tokens.shape)}")
    if mask_token.shape != (1, 1, position.shape[-1]) or position.shape[:-1] != (1, 1 + length):
        return Unserved(f"a position table of shape {tuple(position.shape)} for {length} patches")
    if not (tokens.device == restore.device == mask_token.device == position.device):
        return Unserved("tensors on several devices")
    if readable(restore):
        places = torch.arange(length, device=restore.device).expand_as(restore)
        if not torch.equal(restore.sort(dim=1).values, places):
            return Unserved("ids_restore that do not name every place once")
    return None


def restored_tokens(x: Tensor, restore: Tensor, mask_token: Tensor, position: Tensor) -> Tensor | Unserved:
    """[N, 1 + L, D]: the class token, tokens in their places, mask tokens elsewhere, all with their positions.

    ``x`` [N, 1 + K, D]: the embedded tokens, which :func:`unserved_places` let through before.
    """
    unserved = unserved_tensors(x, dim=3)
    if unserved:
        return unserved
    if x.shape[0] != restore.shape[0] or x.shape[1] > position.shape[1] or x.shape[2] != position.shape[2]:
        return Unserved(f"embedded tokens of shape {tuple(x.shape)} for positions of {tuple(position.shape)}")
    if x.device != position.device:
        return Unserved("tensors on several devices")
    wide = torch.promote_types(x.dtype, mask_token.dtype)  # as torch.cat does
    if position.dtype != wide or wide not in FLOATS:
        return Unserved(f"positions of {position.dtype} for tokens of {wide}")
    return scatter_tokens(x.to(wide), restore, mask_token.to(wide), position=position, passed=1)


def patch_loss(images: Tensor, pred: Tensor, mask: Tensor, patch_size: int, normalise: bool) -> Tensor | Unserved:
    """``forward_loss``: the mean squared error over the patches where ``mask`` [N, L] is 1."""
    for name, t, dim in (("images", images, 4), ("predictions", pred, 3), ("mask", mask, 2)):
        if not isinstance(t, Tensor) or t.dim() != dim or t.device != pred.device:
            return Unserved(f"{name} that are no tensor of {dim} dimensions beside the predictions")
    unserved = unserved_tensors(images, dim=4) or unserved_tensors(pred, dim=3)
    if unserved:
        return unserved
    if images.requires_grad or mask.requires_grad:
        return Unserved("a gradient for the images or the mask")
    batch, channels, height, width = images.shape
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        return Unserved(f"a patch size of {patch_size!r}")
    length = (height // patch_size) ** 2
    fits = channels == 3 and height == width and height % patch_size == 0
    if not fits or pred.shape != (batch, length, 3 * patch_size**2) or mask.shape != (batch, length):
        return Unserved(f"images of shape {tuple(images.shape)} with predictions of shape {tuple(pred.shape)}")
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        return Unserved(f"a mask of {mask.dtype}")
    result = torch.promote_types(torch.promote_types(images.dtype, pred.dtype), mask.dtype)
    if (result == torch.float64) != (pred.dtype == torch.float64):
        return Unserved(f"images of {images.dtype}, predictions of {pred.dtype} and a mask of {mask.dtype}")
    soft = None
    if mask.dtype != torch.bool:
        soft = ((mask != 0) & (mask != 1)).any()
        if readable(mask) and bool(soft):
            return Unserved("a mask of other numbers than 0 and 1")
    target = "mae" if normalise else "pixels"
    chosen = mask if soft is None else mask != 0
    loss = masked_patch_loss(images, pred, chosen, patch_size=patch_size, target=target).to(result)
    # On a GPU and in a graph the mask is not read: one that is no mask gives NaN, not a number that is wrong.
    return loss if soft is None or readable(mask) else torch.where(soft, torch.nan, loss)
