"""Calls of everything public that takes tensors, which ``test_fake_cuda.py`` tries on tensors of other kinds."""

from __future__ import annotations

from . import distillation, images, losses
from .inputs import Case

# Calls that look at values, as their documentation says: on fake and meta tensors they raise PyTorch's own error.
WAITS = {
    "pair_nt_xent": "how many positives an anchor has decides how it is computed",
    "self_labelling": "the error says whether to go on",
    "masking.multiblock_masks/the shortest": "the length of the result is that of the shortest context",
}
CASES: dict[str, Case] = {
    **losses.CONTRASTIVE,
    **losses.DECORRELATION,
    **distillation.DISTILLATION,
    **losses.MASKED,
    **losses.AVERAGES,
    **images.TOKENS,
    **images.MASKS,
    **images.AUGMENTATION,
}
