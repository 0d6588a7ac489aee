"""The formulas in plain PyTorch: any dtype, any device, differentiable twice; they share no code with a kernel."""

from .augment_views import augment_views
from .block_mask import block_mask
from .embed_patches import embed_patches
from .gather_patches import gather_patches, scatter_patches
from .gather_tokens import gather_tokens
from .l2_normalize import l2_normalize
from .mask_tokens import mask_tokens
from .masked_feature_loss import masked_feature_loss
from .masked_patch_loss import masked_patch_loss
from .masked_rows import masked_rows
from .multiblock_mask import multiblock_mask
from .nt_xent import nt_xent
from .partition_mask import partition_mask
from .prototype_cross_entropy import normalized_prototypes, prototype_cross_entropy
from .random_mask import random_mask
from .scatter_tokens import scatter_tokens
from .second_moment import second_moment
from .similarity_logsigmoid import similarity_logsigmoid
from .similarity_lse import similarity_lse, similarity_terms
from .view_params import view_params

__all__ = [
    "augment_views",
    "block_mask",
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "l2_normalize",
    "mask_tokens",
    "masked_feature_loss",
    "masked_patch_loss",
    "masked_rows",
    "multiblock_mask",
    "normalized_prototypes",
    "nt_xent",
    "partition_mask",
    "prototype_cross_entropy",
    "random_mask",
    "scatter_patches",
    "scatter_tokens",
    "second_moment",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "view_params",
]
