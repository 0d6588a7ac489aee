"""The losses of facebookresearch/dinov2 (``dinov2.loss``) with sslfast's kernels in them.

That code has no releases, and is copied and changed. So each method is tried out on small inputs, and served where it
gives the numbers and gradients of sslfast's form; the others stay as they are.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import dinov2.loss
import torch
from torch import Tensor

from ..losses.distillation.cross_entropy import assignment_cross_entropy
from ._dino import (
    as_views,
    centered_targets,
    kind_of,
    koleo_of_batch,
    masked_loss,
    patch_loss,
    reduced_center,
    sinkhorn_of_patches,
    sinkhorn_of_rows,
    unserved_views,
)
from ._dino_trials import K, Of, contents_of, logits, losses_with_center, masked_calls, named, patch_calls, targets
from ._serve import Package, Unserved, own_method, unserved_temperatures
from ._trial import SINGLE, Trial

ORIGIN = "facebookresearch/dinov2"


def _center(self: Any, teacher_output: Tensor, teacher_temp: float) -> Tensor | Unserved:
    return centered_targets(self, teacher_output, teacher_temp)


def _center_patches(self: Any, teacher_patch_tokens: Tensor, teacher_temp: float) -> Tensor | Unserved:
    return centered_targets(self, teacher_patch_tokens, teacher_temp)


def _pairs(self: Any, student_output_list: Any, teacher_out_softmaxed_centered_list: Any) -> Tensor | Unserved:
    student, teacher = as_views(student_output_list), as_views(teacher_out_softmaxed_centered_list)
    unserved = unserved_views(student, teacher) or unserved_temperatures(self.student_temp)
    if unserved:
        return unserved
    mean = assignment_cross_entropy(student, teacher, temperature=self.student_temp)
    return (len(student) * len(teacher) * mean).to(kind_of(*student, *teacher))


def _dino(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    module = sys.modules[cls.__module__]
    x, views = logits(6, K), logits(2, 5, K, learn=True)
    counted = [(x, 0.1), (x, 0.3, 1), (logits(4, K).float(), 0.2, 2)]
    return losses_with_center(cls, (1, K)), {
        "softmax_center_teacher": Trial(_center, [(x, 0.1), (-x, 0.3)]),
        "sinkhorn_knopp_teacher": Trial(partial(sinkhorn_of_rows, module), counted, SINGLE, sums=6),
        "forward": Trial(_pairs, [(views, targets(3, 5, K)), (views[:1], targets(1, 5, K))]),
        "reduce_center_update": Trial(partial(reduced_center, own_method(cls, "reduce_center_update")), [(x,)], sums=2),
    }


def _ibot(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    module = sys.modules[cls.__module__]
    x = logits(6, K)
    counted = [(x, 0.1, torch.tensor([6])), (x, 0.3, torch.tensor([6]), 1)]
    return losses_with_center(cls, (1, 1, K)), {
        "softmax_center_teacher": Trial(_center_patches, [(logits(1, 6, K), 0.1), (logits(2, 3, K), 0.3)]),
        "sinkhorn_knopp_teacher": Trial(partial(sinkhorn_of_patches, module), counted, SINGLE, sums=4),
        "forward": Trial(partial(patch_loss, False), patch_calls()),
        "forward_masked": Trial(partial(masked_loss, False), masked_calls()),
    }


def _spread(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    return [cls()], {"forward": Trial(koleo_of_batch, [(logits(9, 5, learn=True),), (logits(2, 3, learn=True),)])}


_OWN = "the package's own, on K numbers"
CLASSES = (
    Of("DINOLoss", ("out_dim", "student_temp", "center_momentum"), _dino, {"apply_center_update": _OWN}),
    Of(
        "iBOTPatchLoss",
        ("patch_out_dim", "student_temp", "center_momentum"),
        _ibot,
        {"apply_center_update": _OWN, "reduce_center_update": "one pass over the logits already"},
    ),
    Of("KoLeoLoss", (), _spread),
)


def contents() -> Package:
    """What :func:`sslfast.patch` replaces in ``dinov2.loss``, and what stays the package's own."""
    return contents_of(dinov2.loss, CLASSES, ORIGIN, __name__)


def __getattr__(name: str) -> Any:
    return named(__name__, name, contents)
