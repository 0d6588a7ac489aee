"""The fast form of lightly's patch kernel alignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import readable
from ..losses.distillation.patch_kernel_alignment import patch_kernel_alignment
from ._serve import Unserved, unserved_tensors


def fast_patch_kernel_alignment(
    self: Any, student_features: Any, teacher_features: Any, mask: Any = None
) -> Tensor | Unserved:
    student, teacher, most = student_features, teacher_features, self.max_tokens
    unserved = unserved_tensors(student, teacher, dim=3, same_shape=True)
    if unserved:
        return unserved
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 2):
        return Unserved("max_tokens that is no whole number of at least 2")
    if mask is not None:
        plain = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == student.shape[:2]
        if not plain or mask.device != student.device:
            return Unserved("a mask that is no bool tensor [B, N] on the features' device")
    # lightly's zero is then in another dtype. On a GPU, where it would wait for the mask, it stays float32 here.
    few = student.shape[1] < 2 or (mask is not None and readable(mask) and int((~mask).sum(1).max()) < 2)
    if few:
        return Unserved("no image with two tokens that count")
    return patch_kernel_alignment(student, teacher, mask, max_tokens=most).float()
