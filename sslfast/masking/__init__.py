"""Masks of patches and of words, and what is computed from the kept or the masked ones alone."""

from . import compat as compat
from .block_masks import beit_masks, block_masks, ibot_masks
from .dino_masks import PatchMasks, dinov2_masks, dinov3_masks
from .masks import Masks
from .multiblock import MultiBlockMasks, multiblock_masks
from .patches import embed_patches, gather_patches, patchify, scatter_patches, unpatchify
from .random_masks import grid_masks, random_masks, tube_masks
from .text import mask_tokens
from .tokens import gather_tokens, replace_tokens, scatter_tokens

__all__ = [
    "Masks",
    "MultiBlockMasks",
    "PatchMasks",
    "beit_masks",
    "block_masks",
    "dinov2_masks",
    "dinov3_masks",
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "grid_masks",
    "ibot_masks",
    "mask_tokens",
    "multiblock_masks",
    "patchify",
    "random_masks",
    "replace_tokens",
    "scatter_patches",
    "scatter_tokens",
    "tube_masks",
    "unpatchify",
]
