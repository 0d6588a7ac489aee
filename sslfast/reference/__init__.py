"""The formulas in plain PyTorch: any dtype, any device, differentiable twice; they share no code with a kernel."""

from .augment_views import augment_views
from .block_mask import block_mask
from .characteristic_sums import characteristic_sums
from .distillation_cross_entropy import distillation_cross_entropy
from .ema_update import ema_update
from .embed_patches import embed_patches
from .gather_patches import gather_patches, scatter_patches
from .gather_tokens import gather_tokens
from .gram_anchor import gram_anchor
from .koleo import koleo
from .l2_normalize import l2_normalize
from .mask_tokens import mask_tokens
from .masked_feature_loss import masked_feature_loss
from .masked_patch_loss import masked_patch_loss
from .masked_rows import masked_rows
from .mean_assignment import mean_assignment
from .multiblock_mask import multiblock_mask
from .nearest_neighbours import nearest_neighbours, neighbour_similarity
from .negative_cosine import negative_cosine
from .neighbour_distance import neighbour_distance, sums_by_index
from .nt_xent import nt_xent
from .partition_mask import partition_mask
from .prototype_columns import prototype_columns, prototype_rows
from .prototype_cross_entropy import normalized_prototypes, prototype_cross_entropy
from .random_mask import random_mask
from .scatter_tokens import scatter_tokens
from .second_moment import second_moment
from .similarity_logsigmoid import similarity_logsigmoid
from .similarity_lse import similarity_lse, similarity_terms
from .sinkhorn import sinkhorn_assign, sinkhorn_bias, sinkhorn_sums, sinkhorn_update
from .unit_slices import unit_slices
from .view_params import view_params

__all__ = [
    "augment_views",
    "block_mask",
    "characteristic_sums",
    "ema_update",
    "distillation_cross_entropy",
    "embed_patches",
    "gather_patches",
    "gather_tokens",
    "gram_anchor",
    "koleo",
    "l2_normalize",
    "mask_tokens",
    "masked_feature_loss",
    "masked_patch_loss",
    "masked_rows",
    "mean_assignment",
    "multiblock_mask",
    "negative_cosine",
    "nearest_neighbours",
    "neighbour_distance",
    "neighbour_similarity",
    "normalized_prototypes",
    "nt_xent",
    "partition_mask",
    "prototype_columns",
    "prototype_cross_entropy",
    "prototype_rows",
    "random_mask",
    "scatter_patches",
    "scatter_tokens",
    "second_moment",
    "similarity_logsigmoid",
    "similarity_lse",
    "similarity_terms",
    "unit_slices",
    "sums_by_index",
    "sinkhorn_assign",
    "sinkhorn_bias",
    "sinkhorn_sums",
    "sinkhorn_update",
    "view_params",
]
