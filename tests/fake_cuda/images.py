"""Calls of masks, tokens, patches, views and pretext tasks, named as those of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslfast import augment, masking, pretext
from sslfast.ops.augment_views import augment_views
from sslfast.ops.block_mask import block_mask
from sslfast.ops.mask_tokens import mask_tokens
from sslfast.ops.masked_rows import masked_rows
from sslfast.ops.multiblock_mask import multiblock_mask
from sslfast.ops.partition_mask import partition_mask
from sslfast.ops.random_mask import random_mask
from sslfast.ops.view_params import view_params

from .inputs import PATCH, SIDE, B, Case, D, Inputs, L


def _masks(x: Inputs) -> masking.Masks:
    return masking.random_masks(x.ids(B), L)


def _weights(x: Inputs) -> dict[str, Any]:
    return {"weight": x.z(D, 3, PATCH, PATCH), "bias": x.z(D), "patch_size": PATCH}


TOKENS: dict[str, Case] = {
    "masking.gather_tokens": lambda x: masking.gather_tokens(
        x.z(B, L, D), x.ids(B, 5), position=x.z(L, D), prefix=x.z(1, D)
    ),
    "masking.gather_tokens/masks of the same": lambda x: masking.gather_tokens(x.z(B, L, D), x.ids(3, B, 5)),
    "masking.gather_tokens/a token": lambda x: masking.gather_tokens(
        None, x.ids(B, 5), token=x.z(1, 1, D), position=x.z(1, L, D)
    ),
    "masking.scatter_tokens": lambda x: masking.scatter_tokens(
        x.z(B, 6, D), x.ids(B, L), x.z(D), position=x.z(L + 1, D), passed=1
    ),
    "masking.replace_tokens": lambda x: masking.replace_tokens(
        x.z(B, L, D), x.mask(), x.z(D), position=x.z(L, D), prefix=x.z(1, D)
    ),
    "masking.gather_patches": lambda x: masking.gather_patches(x.images(), x.ids(B, 5), patch_size=PATCH, mean=0.5),
    "masking.gather_patches/a gradient": lambda x: masking.gather_patches(
        x.z(B, 3, SIDE, SIDE), patch_size=PATCH, std=[0.2] * 3
    ),
    "masking.scatter_patches": lambda x: masking.scatter_patches(
        x.z(B, 5, 48), x.ids(B, 5), size=(3, SIDE, SIDE), patch_size=PATCH
    ),
    "masking.embed_patches": lambda x: masking.embed_patches(
        x.z(B, 3, SIDE, SIDE), x.ids(B, 5), **_weights(x), position=x.z(L, D), prefix=x.z(1, D), mean=0.5
    ),
    "masking.embed_patches/all of bytes": lambda x: masking.embed_patches(x.images(), None, **_weights(x)),
    "masking.patchify": lambda x: masking.patchify(x.z(B, 3, SIDE, SIDE), PATCH),
    "masking.unpatchify": lambda x: masking.unpatchify(x.z(B, L, 48), PATCH, grid=4),
    "masking.compat.unpatchify": lambda x: masking.compat.unpatchify(x.z(B, L, 48), PATCH),
    "masking.compat.get_at_index": lambda x: masking.compat.get_at_index(x.z(B, L, D), x.ids(B, 5)),
    "masking.compat.set_at_index": lambda x: masking.compat.set_at_index(x.z(B, L, D), x.ids(B, 5), x.z(B, 5, D)),
    "masking.compat.set_at_index/a number": lambda x: masking.compat.set_at_index(x.z(B, L, D), x.ids(B, 5), 1.0),
    "masking.compat.mask_at_index": lambda x: masking.compat.mask_at_index(x.z(B, L, D), x.ids(B, 5), x.z(1, 1, D)),
    "masking.compat.repeat_token": lambda x: masking.compat.repeat_token(x.z(1, 1, D), (B, L)),
    "masking.compat.random_masking": lambda x: masking.compat.random_masking(x.z(B, L, D), 0.75),
    "masking.compat.random_masking/noise": lambda x: masking.compat.random_masking(
        x.z(B, L, D), 0.75, torch.rand(B, L, device=x.device)
    ),
}

MASKS: dict[str, Case] = {
    "masking.random_masks": _masks,
    "masking.random_masks/a number of images": lambda x: masking.random_masks(B, (4, 4), device=x.device),
    "masking.random_masks/a list": lambda x: masking.random_masks([5, 7], (2, 2, 4), order="noise", device=x.device),
    "masking.random_masks/noise": lambda x: masking.random_masks(
        x.ids(B), L, noise=torch.rand(B, L, device=x.device), order="noise"
    ),
    "masking.tube_masks": lambda x: masking.tube_masks(x.ids(B), (3, 4, 4)),
    "masking.grid_masks": lambda x: masking.grid_masks(x.ids(B), (8, 8), unit=4),
    "masking.Masks": lambda x: _masks(x).mask,
    "masking.Masks/from a mask": lambda x: masking.Masks.from_mask(x.mask(), kept=12).to(x.device),
    "masking.block_masks": lambda x: masking.block_masks(x.ids(B), (14, 14), 75),
    "masking.block_masks/counts": lambda x: masking.block_masks(x.ids(B), (14, 14), x.ids(B) + 5, complete=True),
    "masking.block_masks/a list": lambda x: masking.block_masks([3, 4], (14, 14), [7, 8.5], device=x.device),
    "masking.beit_masks": lambda x: masking.beit_masks(x.ids(B), complete=True),
    "masking.ibot_masks": lambda x: masking.ibot_masks(x.ids(B), (14, 14), (0, 0.3), (0, 0.2)),
    "masking.ibot_masks/random": lambda x: masking.ibot_masks(x.ids(B), (14, 14), shape="random"),
    "masking.dinov2_masks": lambda x: masking.dinov2_masks(x.ids(8), (16, 16)),
    "masking.dinov3_masks": lambda x: masking.dinov3_masks(x.ids(8), (16, 16), circular_shift=True),
    "masking.multiblock_masks": lambda x: masking.multiblock_masks(x.ids(B), (14, 14), context_size=28),
    "masking.multiblock_masks/overlap": lambda x: masking.multiblock_masks(
        B, (14, 14), allow_overlap=True, device=x.device
    ),
    "masking.multiblock_masks/the shortest": lambda x: masking.multiblock_masks(x.ids(B), (14, 14)),
    "masking.compat.random_token_mask": lambda x: masking.compat.random_token_mask((B, L), device=x.device),
    "masking.mask_tokens": lambda x: masking.mask_tokens(
        x.ids(B, L), x.ids(B), mask_id=103, vocab_size=1000, special=x.mask(), word_ids=x.ids(B, L) // 2, exact=True
    ),
    "masking.mask_tokens/no samples": lambda x: masking.mask_tokens(x.ids(B, L), mask_id=103, vocab_size=1000),
    "ops.masked_rows.masked_rows": lambda x: masked_rows(x.mask(), 8),
    "ops.partition_mask.partition_mask": lambda x: partition_mask(x.mask(), 12),
    "ops.random_mask.random_mask": lambda x: random_mask(x.ids(B), (1, 4, 4), 4),
    "ops.block_mask.block_mask": lambda x: block_mask(
        x.ids(B), x.ids(B).double(), (14, 14), area=(4.0, 99.0), aspect=(0.3, 3.0)
    ),
    "ops.multiblock_mask.multiblock_mask": lambda x: multiblock_mask(x.ids(B), (14, 14), 4, (5, 6), (13, 13), 28),
    "ops.mask_tokens.mask_tokens": lambda x: mask_tokens(
        x.ids(B, L), x.ids(B), None, None, (2**30, 2**31, 2**31), mask_id=103, vocab_size=1000
    ),
}


def _ragged(x: Inputs) -> list[Tensor]:
    return [x.images()[0], x.images(side=24)[1]]


def _views(x: Inputs, images: Any, name: str = "simclr") -> Any:
    views = augment.recipe(name, 12)
    params = augment.sample_params(images, views, x.ids(B))
    return augment.apply(images, params, views)


AUGMENTATION: dict[str, Case] = {
    "augment.apply": lambda x: _views(x, x.images()),
    "augment.apply/a list of sizes": lambda x: _views(x, _ragged(x)),
    "augment.apply/floats, channels last": lambda x: augment.apply(
        x.pixels(),
        augment.sample_params(x.pixels(), augment.recipe("dino", 12, 8), [0, 1]),
        augment.recipe("dino", 12, 8),
        dtype=torch.bfloat16,
        channels_last=True,
    ),
    "augment.sample_params": lambda x: augment.sample_params(x.images(), augment.recipe("dino")).table,
    "augment.sample_params/a list of sizes": lambda x: augment.sample_params(_ragged(x), augment.recipe("dino")).table,
    "augment.MultiViewTransform": lambda x: augment.MultiViewTransform(augment.recipe("simclr", 12))(
        x.images(), [0, 1]
    ),
    "augment.MultiViewTransform/stacked": lambda x: augment.MultiViewTransform(
        augment.recipe("simclr", 12), stacked=True
    )(x.images()),
    "augment.MultiViewTransform/a list of sizes": lambda x: augment.MultiViewTransform(augment.recipe("simclr", 12))(
        _ragged(x), x.ids(B)
    ),
    "augment.ViewParams": lambda x: [
        augment.sample_params(x.images(), augment.recipe("simclr"), [0, 1]).to(x.device)[0].clone().order,
    ],
    "ops.augment_views.augment_views": lambda x: augment_views(
        [x.images()], augment.sample_params(x.images(), augment.recipe("simclr")).table, size=(12, 12)
    ),
    "ops.view_params.view_params": lambda x: view_params(x.ids(B), (16, 16), [augment.recipe("simclr")[0].numbers()]),
    "ops.view_params.view_params/sizes": lambda x: view_params(
        x.ids(B), torch.full((B, 2), 16, device=x.device), [augment.recipe("simclr")[0].numbers()]
    ),
    "pretext.rotation": lambda x: pretext.rotation(x.images(), x.ids(B), all_four=False),
    "pretext.Rotation": lambda x: pretext.Rotation()(x.pixels()),
    "pretext.jigsaw": lambda x: pretext.jigsaw(x.images(), [0, 1], tile=4, cell=5),
    "pretext.Jigsaw": lambda x: pretext.Jigsaw(tile=4, cell=5, permutations=10)(x.pixels()),
    "pretext.Jigsaw/table": lambda x: pretext.Jigsaw(permutations=10).permutation_table(x.device),
    "pretext.relative_location": lambda x: pretext.relative_location(
        x.images(), patch=5, gap=2, jitter=1, least_pixels=4
    ),
    "pretext.RelativeLocation": lambda x: pretext.RelativeLocation(
        patch=5, gap=2, jitter=1, least_pixels=4, colour="projection"
    )(x.pixels(), x.ids(B)),
    "pretext.colorization": lambda x: pretext.colorization(x.images(), stride=2),
    "pretext.Colorization": lambda x: pretext.Colorization(neighbours=3)(x.pixels()),
    "pretext.color_bins": lambda x: pretext.color_bins(x.device),
    "pretext.dense_colors": lambda x: pretext.dense_colors(x.ids(B, 5, 4, 4), x.fixed(B, 5, 4, 4).float()),
    "pretext.decode_colors": lambda x: pretext.decode_colors(x.fixed(B, 313, 4, 4)),
    "pretext.rebalancing_weights": lambda x: pretext.rebalancing_weights(torch.ones(313, device=x.device)),
    "pretext.rgb_to_lab": lambda x: pretext.rgb_to_lab(x.images()),
    "pretext.lab_to_rgb": lambda x: pretext.lab_to_rgb(x.pixels().float()),
    "pretext.inpainting": lambda x: pretext.inpainting(x.images(), [0, 1]),
    "pretext.inpainting/blocks": lambda x: pretext.inpainting(x.images(), hole="blocks", overlap=1),
    "pretext.Inpainting": lambda x: pretext.Inpainting(hole="region")(x.pixels(), x.ids(B)),
}
