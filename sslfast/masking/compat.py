"""Functions of other packages under their names, with their arguments and results: MAE's ``random_masking`` and
``forward_loss``, and the token functions of ``lightly.models.utils``. New code wants those of :mod:`sslfast.masking`.

Ids that these packages draw are distinct, but their functions take any. On the CPU ids are looked at: a gather of
repeated ones sums their gradients, as ``torch.gather`` does, and ids that are out of range get PyTorch's error. Where
looking would wait for a GPU, or end a graph of ``torch.compile``, ``get_at_index`` and ``set_at_index`` are
``torch.gather`` and ``torch.scatter``; for distinct ids ``gather_tokens`` and ``scatter_tokens`` are faster there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOATS, check_tokens, readable, whole_numbers
from ..ops.gather_tokens import select_and_gather
from ..ops.masked_patch_loss import masked_patch_loss
from ..ops.scatter_tokens import replace_tokens
from .patches import unpatchify as unpatchify_grid

__all__ = [
    "forward_loss",
    "get_at_index",
    "mask_at_index",
    "random_masking",
    "random_token_mask",
    "repeat_token",
    "set_at_index",
    "unpatchify",
]


def random_masking(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's per-image random masking by argsort of noise: the same tokens for the same state of torch's generator.

    Source: ``MaskedAutoencoderViT.random_masking`` of facebookresearch/mae.

    Args:
        x: [N, L, D] tokens, float32, float64, bfloat16 or float16.
        mask_ratio: int(L · (1 − mask_ratio)) tokens are kept.
        noise: [N, L], small is kept; default ``torch.rand(N, L, device=x.device)``, as in MAE. Hugging Face's ViTMAE
            takes it as an argument.

    Returns:
        (x_masked [N, K, D] in the order of the noise, mask [N, L] float32 with 0 for kept and 1 for removed tokens,
        ids_restore [N, L] int64). The gradient of x is written, not added up.

    Raises:
        TypeError, ValueError: ``x`` is no batch of floating-point tokens, or ``noise`` has another shape.

    Example:
        >>> x_masked, mask, ids_restore = sslfast.masking.compat.random_masking(torch.zeros(2, 196, 8), 0.75)
        >>> x_masked.shape, mask.sum(1).tolist()
        (torch.Size([2, 49, 8]), [147.0, 147.0])
    """
    check_tokens("x", x)
    batch, length = x.shape[:2]
    if noise is None:
        noise = torch.rand(batch, length, device=x.device)
    elif noise.shape != (batch, length):
        raise ValueError(f"noise must have shape {(batch, length)}, got {tuple(noise.shape)}")
    ids_keep, mask, restore = by_noise(noise, int(length * (1 - mask_ratio)))
    return select_and_gather(x, ids_keep, None, None, None, packed=False), mask, restore


def by_noise(noise: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's masks from ``noise`` [N, L]: the ``kept`` smallest numbers of each row stay.

    Returns:
        (ids_keep [N, K] int64 in the order of the noise, mask [N, L] float32, ids_restore [N, L] int64).
    """
    length = noise.shape[1]
    # Not a stable sort: MAE's is not, and equal numbers do occur among 196 float32 ones of many images.
    shuffle = torch.argsort(noise, dim=1)
    # The inverse of a permutation needs no second sort.
    places = torch.arange(length, device=noise.device).expand_as(shuffle)
    restore = torch.empty_like(shuffle).scatter_(1, shuffle, places)
    return shuffle[:, :kept], (restore >= kept).to(torch.float32), restore


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """lightly's random token mask, with the same numbers from torch's generator.

    Args:
        size: (batch_size, sequence_length), the class token counted.
        mask_ratio: share of tokens to mask. Default 0.6.
        mask_class_token: whether token 0 may be masked. Default False: it is always the first one kept.
        device: of the ids. Default: torch's.

    Returns:
        (idx_keep [B, K], idx_mask [B, L − K]), int64, in the order of the noise.

    Example:
        >>> idx_keep, idx_mask = sslfast.masking.compat.random_token_mask((2, 50), mask_ratio=0.6)
        >>> idx_keep.shape, idx_mask.shape, idx_keep[:, 0].tolist()
        (torch.Size([2, 20]), torch.Size([2, 30]), [0, 0])
    """
    batch, length = whole_numbers("size", size, "(batch_size, sequence_length)")
    kept = int((length - int(not mask_class_token)) * (1 - mask_ratio))
    noise = torch.rand(batch, length, device=device)
    if not mask_class_token and length > 0:
        noise[:, 0] = -1
        kept = max(1, kept + 1)
    order = torch.argsort(noise, dim=1)
    return order[:, :kept], order[:, kept:]


def _rows_of(tokens: Tensor, index: Tensor) -> bool:
    """``index`` [B, K] names rows of ``tokens`` [B, L, D], as far as one may look."""
    if tokens.dim() != 3 or index.dim() != 2 or len(tokens) != len(index) or tokens.shape[2] == 0:
        return False
    if tokens.dtype not in FLOATS or index.dtype != torch.int64 or tokens.device != index.device or not readable(index):
        return False
    numbers = index.numpy()
    return index.numel() == 0 or bool(numbers.min() >= 0 and numbers.max() < tokens.shape[1])


def _expanded(index: Tensor, tokens: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])


def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
    """lightly's: ``token`` (1, 1, D) as [B, L, D] for ``size`` (B, L), in memory of its own.

    Example:
        >>> sslfast.masking.compat.repeat_token(torch.zeros(1, 1, 8), (2, 50)).shape
        torch.Size([2, 50, 8])
    """
    return token.repeat(*size, 1)


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    """lightly's: row k of the result [B, K, D] is ``tokens[b, index[b, k]]``.

    Args:
        tokens: [B, L, D].
        index: [B, K] int64, 0 … L − 1; may repeat.

    Example:
        >>> tokens, index = torch.arange(4.0).view(1, 4, 1), torch.tensor([[3, 0]])
        >>> sslfast.masking.compat.get_at_index(tokens, index).flatten().tolist()
        [3.0, 0.0]
    """
    if _rows_of(tokens, index):
        return select_and_gather(tokens, index, None, None, None, packed=False)
    return torch.gather(tokens, 1, _expanded(index, tokens))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor | float) -> Tensor:
    """lightly's: a copy of ``tokens`` in which row ``index[b, k]`` is ``value[b, k]``.

    Args:
        tokens: [B, L, D].
        index: [B, K] int64, 0 … L − 1. Where it repeats an id one of its values is written, as by ``torch.scatter``.
        value: [B, K, D], or a number.

    Example:
        >>> tokens, index = torch.arange(4.0).view(1, 4, 1), torch.tensor([[3, 0]])
        >>> sslfast.masking.compat.set_at_index(tokens, index, 9.0).flatten().tolist()
        [9.0, 1.0, 2.0, 9.0]
    """
    if not isinstance(value, Tensor):
        return torch.scatter(tokens, 1, _expanded(index, tokens), value)
    if not _rows_of(tokens, index) or value.shape != (*index.shape, tokens.shape[2]) or value.dtype != tokens.dtype:
        return torch.scatter(tokens, 1, _expanded(index, tokens), value)
    # Whole rows at a time; the gradients have the same formulas as those of scatter, for repeated ids too.
    batch, length, width = tokens.shape
    rows = (index + length * torch.arange(batch, device=index.device)[:, None]).reshape(-1)
    return tokens.reshape(-1, width).index_copy(0, rows, value.reshape(-1, width)).view(batch, length, width)


def mask_at_index(tokens: Tensor, index: Tensor, mask_token: Tensor) -> Tensor:
    """lightly's: ``tokens`` with the mask token at the rows ``index[b, k]``.

    A row that is replaced leaves nothing behind; in lightly's formula, ``(1 − mask)·tokens + mask·mask_token``, a NaN
    or an infinity that stood there makes a NaN.

    Args:
        tokens: [B, L, D].
        index: [B, K] int64, 0 … L − 1; may repeat.
        mask_token: (1, 1, D); of another floating-point type, the result is of the wider one, as in lightly.

    Example:
        >>> tokens, index = torch.arange(4.0).view(1, 4, 1), torch.tensor([[3, 0]])
        >>> sslfast.masking.compat.mask_at_index(tokens, index, torch.full((1, 1, 1), 9.0)).flatten().tolist()
        [9.0, 1.0, 2.0, 9.0]
    """
    width = tokens.shape[-1]
    if tokens.dim() != 3 or width == 0 or mask_token.shape not in ((width,), (1, 1, width)):
        mask = set_at_index(tokens.new_zeros(tokens.shape), index, 1)
        return (1 - mask) * tokens + mask * mask_token
    masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, index, True)
    wider = torch.promote_types(tokens.dtype, mask_token.dtype)
    return replace_tokens(tokens.to(wider), masked, mask_token.to(wider))


def unpatchify(patches: Tensor, patch_size: int, channels: int = 3) -> Tensor:
    """lightly's: square images [B, C, S, S] from patches [B, L, p²·C], with L = (S/p)².

    Raises:
        ValueError: L is no square. :func:`sslfast.masking.unpatchify` takes the grid.

    Example:
        >>> sslfast.masking.compat.unpatchify(torch.zeros(2, 196, 768), 16).shape
        torch.Size([2, 3, 224, 224])
    """
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"patches must be those of a square, got {patches.shape[1]}: sslfast.masking.unpatchify takes their grid"
        )
    return unpatchify_grid(patches, patch_size, channels, grid=side)


def forward_loss(
    imgs: Tensor, pred: Tensor, mask: Tensor, *, patch_size: int | Sequence[int], norm_pix_loss: bool = False
) -> Tensor:
    """``MaskedAutoencoderViT.forward_loss``: the mean squared error of the masked patches.

    Args:
        imgs: [N, 3, H, W]; pred: [N, L, p²·3]; mask: [N, L], 0 kept, 1 removed; as there.
        patch_size: p, which MAE takes from its ``patch_embed``.
        norm_pix_loss: compare with pixels normalised by their patch's mean and variance (default: plain pixels).

    Returns:
        [], as :func:`sslfast.masked_patch_loss`, of which this is a thin wrapper: same result and errors.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; ``models_mae.py`` of that repository.

    Example:
        >>> imgs, pred, mask = torch.ones(1, 3, 32, 32), torch.zeros(1, 4, 768), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
        >>> sslfast.masking.compat.forward_loss(imgs, pred, mask, patch_size=16).item()
        1.0
    """
    return masked_patch_loss(imgs, pred, mask, patch_size=patch_size, target="mae" if norm_pix_loss else "pixels")
