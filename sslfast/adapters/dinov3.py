"""The losses of facebookresearch/dinov3 (``dinov3.loss``) with sslfast's kernels in them.

That code has no releases, and is copied and changed. So each method is tried out on small inputs, and served where it
gives the numbers and gradients of sslfast's form; the others stay as they are.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from types import ModuleType
from typing import Any

import dinov3.loss
import torch
from torch import Tensor

from .._checks import autocasts, is_whole
from ..losses.distillation.cross_entropy import assignment_cross_entropy
from ..losses.distillation.gram_anchor import gram_anchor
from ..losses.distillation.koleo import koleo
from ._dino import (
    as_views,
    at_most_single,
    centered_targets,
    koleo_of_batch,
    masked_loss,
    patch_loss,
    reduced_center,
    sinkhorn_of_patches,
    sinkhorn_of_rows,
    unserved_views,
)
from ._dino_trials import K, Of, contents_of, logits, losses_with_center, masked_calls, named, patch_calls, targets
from ._serve import Package, Unserved, own_method, unserved_distance, unserved_temperatures, unserved_tensors
from ._trial import SINGLE, Trial

ORIGIN = "facebookresearch/dinov3"


def _center(self: Any, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True) -> Tensor | Unserved:
    return centered_targets(self, teacher_output, teacher_temp, bool(update_centers))


def _center_patches(
    self: Any, teacher_patch_tokens: Tensor, teacher_temp: float, update_centers: bool = True
) -> Tensor | Unserved:
    return centered_targets(self, teacher_patch_tokens, teacher_temp, bool(update_centers))


def _pairs(
    self: Any, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
) -> Tensor | Unserved:
    if not all(isinstance(x, Tensor) and x.dim() == 3 for x in (student_logits, teacher_probs)):
        return Unserved("logits or targets that are not [crops, B, K]")
    student, teacher = as_views(student_logits), as_views(teacher_probs)
    unserved = unserved_views(student, teacher) or unserved_temperatures(self.student_temp)
    if unserved or student_logits.numel() == 0:
        return unserved or Unserved("an empty tensor")
    if ignore_diagonal and len(student) == len(teacher) == 1:
        return Unserved("one view")
    if teacher_probs.dtype != torch.float32 and not autocasts(teacher_probs):
        return Unserved(f"targets of {teacher_probs.dtype}")  # of which the package's own product is an error
    return assignment_cross_entropy(
        at_most_single(student_logits),
        at_most_single(teacher_probs),
        temperature=self.student_temp,
        ignore_diagonal=bool(ignore_diagonal),
    )


def _koleo_over_ranks(module: ModuleType, self: Any, student_output: Tensor, eps: float = 1e-8) -> Tensor | Unserved:
    unserved = unserved_tensors(student_output, dim=2) or unserved_distance(self.pdist, eps)
    if unserved:
        return unserved
    world = module.dist.get_world_size() if module.dist.is_enabled() else 1
    rows = len(student_output)
    group = world * rows if self.loss_group_size is None else self.loss_group_size
    if not is_whole(group) or group % rows or world * rows % group:
        return Unserved("a group that does not consist of whole ranks, or does not divide them")
    if not is_whole(self.topk) or not 1 <= self.topk < group:
        return Unserved("more neighbours than there are other rows")
    loss = koleo(student_output, self.topk, loss_group_size=self.loss_group_size, eps=eps, gather_distributed=world > 1)
    return loss.float()


def _gram(self: Any, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor | Unserved:
    images = []
    for x in (output_feats, target_feats):
        unserved = unserved_tensors(x, dim=2 if isinstance(x, Tensor) and x.dim() == 2 and not img_level else 3)
        if unserved:
            return unserved
        images.append(at_most_single(x) if img_level else at_most_single(x).reshape(1, -1, x.shape[-1]))
    student, teacher = images
    if student.shape != teacher.shape or student.device != teacher.device:
        return Unserved("features of several shapes, or on several devices")
    if teacher.requires_grad:
        return Unserved("a gradient for the teacher")
    negatives = "clamp" if self.remove_neg else "clamp_teacher" if self.remove_only_teacher_neg else "keep"
    return gram_anchor(student, teacher, normalize=bool(self.apply_norm), negatives=negatives)


def _dino(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    module = sys.modules[cls.__module__]
    x, views = logits(6, K), logits(3, 5, K, learn=True)
    counted = [(x, 0.1), (x, 0.3, 1), (logits(4, K).float(), 0.2, 2)]
    pairs = [(views, targets(2, 5, K).float(), ignore) for ignore in (False, True)]
    return losses_with_center(cls, (1, K)), {
        "softmax_center_teacher": Trial(_center, [(x, 0.1), (-x, 0.3, False)]),
        "sinkhorn_knopp_teacher": Trial(partial(sinkhorn_of_rows, module), counted, SINGLE, sums=6),
        "forward": Trial(_pairs, pairs, SINGLE),
        "reduce_center_update": Trial(partial(reduced_center, own_method(cls, "reduce_center_update")), [(x,)], sums=2),
    }


def _assigning(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    x = logits(6, K)
    counted = [(x, 0.1, torch.tensor([6])), (x, 0.3, torch.tensor([6]), 1)]
    fast = partial(sinkhorn_of_patches, sys.modules[cls.__module__])
    return [cls()], {"forward": Trial(fast, counted, SINGLE, sums=4)}


def _ibot(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    return losses_with_center(cls, (1, 1, K)), {
        "softmax_center_teacher": Trial(_center_patches, [(logits(1, 6, K), 0.1), (logits(2, 3, K), 0.3, False)]),
        "forward": Trial(partial(patch_loss, True), patch_calls(), SINGLE),
        "forward_masked": Trial(partial(masked_loss, True), masked_calls(), SINGLE),
    }


def _spread(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    return [cls()], {"forward": Trial(koleo_of_batch, [(logits(9, 5, learn=True),), (logits(2, 3, learn=True),)])}


def _spread_over_ranks(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    fast, calls = partial(_koleo_over_ranks, sys.modules[cls.__module__]), [(logits(9, 5, learn=True),)]
    return [cls(), cls(3), cls(2, 9)], {"forward": Trial(fast, calls, SINGLE)}


def _anchoring(cls: Any) -> tuple[list[Any], dict[str, Trial]]:
    options = [(norm, True, *signs) for norm, signs in itertools.product((True, False), ((1, 0), (0, 1), (0, 0)))]
    features = logits(2, 5, 4, learn=True), logits(2, 5, 4)
    calls = [features, (*features, False), (*(x.detach()[0] for x in features), False)]
    return [cls(*each) for each in options], {"forward": Trial(_gram, calls, SINGLE)}


_OWN = "the package's own, on K numbers"
_CENTERED = ("student_temp", "center_momentum")
CLASSES = (
    Of("DINOLoss", ("out_dim", *_CENTERED), _dino, {"apply_center_update": _OWN}),
    Of(
        "iBOTPatchLoss",
        ("patch_out_dim", *_CENTERED),
        _ibot,
        {"apply_center_update": _OWN, "reduce_center_update": "one pass over the logits already"},
    ),
    Of("SinkhornKnoppTeacher", (), _assigning, beside="iBOTPatchLoss"),
    Of("KoLeoLoss", (), _spread),
    Of("KoLeoLossDistributed", ("topk", "loss_group_size"), _spread_over_ranks),
    Of("GramLoss", ("apply_norm", "img_level", "remove_neg", "remove_only_teacher_neg"), _anchoring),
)


def contents() -> Package:
    """What :func:`sslfast.patch` replaces in ``dinov3.loss``, and what stays the package's own."""
    return contents_of(dinov3.loss, CLASSES, ORIGIN, __name__)


def __getattr__(name: str) -> Any:
    return named(__name__, name, contents)
