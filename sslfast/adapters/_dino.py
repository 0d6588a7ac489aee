"""What DINOv2's and DINOv3's losses compute alike, of stored logits: targets, and cross entropies with them; KoLeo.

Each returns ``Unserved`` for what it does not compute exactly as the packages' code does. The dtype of a result is that
of PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import accumulator, autocasts, is_whole, readable
from ..distributed.choose import scope_of
from ..distributed.scope import Scope
from ..losses.distillation.cross_entropy import assignment_cross_entropy
from ..losses.distillation.ibot import token_weights
from ..losses.distillation.koleo import koleo
from ..ops.sinkhorn import assigned
from ._serve import Unserved, unserved_distance, unserved_temperatures, unserved_tensors


def scope_in(module: ModuleType) -> Scope:
    """Over which ranks the code of ``module`` sums, as it asks its own names for them."""
    if not module.dist.is_initialized():
        return Scope()
    group = module.get_process_subgroup() if hasattr(module, "get_process_subgroup") else None
    return scope_of(module.dist.get_world_size(group) > 1, group=group)


def kind_of(*tensors: Tensor) -> torch.dtype:
    """The dtype of a softmax or a sum of these tensors, which a GPU's autocast has in float32."""
    kind = tensors[0].dtype
    for x in tensors[1:]:
        kind = torch.promote_types(kind, x.dtype)
    return torch.promote_types(kind, torch.float32) if tensors[0].is_cuda and autocasts(tensors[0]) else kind


def at_most_single(x: Any) -> Any:
    """For a kernel whose sums of 16-bit numbers are float32 what ``x.float()`` is."""
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x


# ------------------------------------------------------------------------------------------------------------- targets


def centered_targets(loss: Any, logits: Any, temperature: Any, update: bool = True) -> Tensor | Unserved:
    """``softmax((logits − center)/τ)`` of any rows; before, the update that waits is applied by the package's code."""
    center = loss.center
    unserved = unserved_temperatures(temperature)
    for x in (logits, center):
        unserved = unserved or unserved_tensors(x, dim=x.dim() if isinstance(x, Tensor) else 2, without_rows=True)
    if unserved:
        return unserved
    prototypes = center.numel()
    if center.shape[-1] != prototypes or logits.shape[-1] != prototypes or logits.dim() < center.dim():
        return Unserved(f"logits of shape {tuple(logits.shape)} for a center of shape {tuple(center.shape)}")
    if logits.device != center.device:
        return Unserved("tensors on several devices")
    if center.dtype == torch.float64 != logits.dtype:
        return Unserved(f"a center of {center.dtype} for logits of {logits.dtype}")
    if update:
        loss.apply_center_update()
    x = logits.detach().reshape(-1, 1, prototypes)
    bias = (loss.center.to(accumulator(x)) / -temperature).view(1, prototypes)
    return assigned(x, bias, temperature).view(logits.shape).to(kind_of(logits, loss.center))


def sinkhorn_targets(scope: Scope, logits: Any, temperature: Any, iterations: Any) -> Tensor | Unserved:
    """Assignments of logits [B, K], float32 (float64 for float64); a rank may have no row."""
    unserved = unserved_tensors(logits, dim=2, without_rows=True) or unserved_temperatures(temperature)
    if unserved:
        return unserved
    if not is_whole(iterations) or iterations < 1:
        return Unserved("no iteration of Sinkhorn's")
    x = logits.detach().unsqueeze(1)
    return assigned(x, scope.sinkhorn_bias(x, temperature, iterations), temperature).squeeze(1)


def sinkhorn_of_rows(
    module: ModuleType, self: Any, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
) -> Tensor | Unserved:
    """``DINOLoss.sinkhorn_knopp_teacher``, in float32."""
    return sinkhorn_targets(scope_in(module), at_most_single(teacher_output), teacher_temp, n_iterations)


def sinkhorn_of_patches(
    module: ModuleType,
    self: Any,
    teacher_output: Tensor,
    teacher_temp: float,
    n_masked_patches_tensor: Tensor,
    n_iterations: int = 3,
) -> Tensor | Unserved:
    """That of masked tokens, whose number cancels: it is neither read nor summed over the ranks."""
    return sinkhorn_of_rows(module, self, teacher_output, teacher_temp, n_iterations)


def reduced_center(original: Callable[..., None], self: Any, teacher_output: Tensor) -> Unserved | None:
    """``DINOLoss.reduce_center_update`` by the package's own code, of a sum that 16-bit logits do not overflow."""
    unserved = unserved_tensors(teacher_output, dim=2, without_rows=True)
    if unserved or self.center.dtype not in (torch.float32, torch.float64):
        return unserved or Unserved(f"a center of {self.center.dtype}")
    original(self, teacher_output.sum(0, keepdim=True, dtype=accumulator(teacher_output)))
    self.len_teacher_output = len(teacher_output)
    return None


# ------------------------------------------------------------------------------------------------------ cross entropies


def as_views(views: Any) -> list[Tensor]:
    """A sequence of views, or views that are stacked; empty where it is neither."""
    stacked = isinstance(views, Tensor) and views.dim() > 0
    return list(views) if stacked or isinstance(views, (list, tuple)) else []


def unserved_views(student: Sequence[Any], teacher: Sequence[Any]) -> Unserved | None:
    """Why they are not logits and targets [B, K] of the same rows and prototypes; dtypes may be several."""
    every = [*student, *teacher]
    if not student or not teacher:
        return Unserved("no view")
    for x in every:
        unserved = unserved_tensors(x, dim=2, without_rows=True)
        if unserved:
            return unserved
        if x.device != every[0].device or x.shape != every[0].shape:
            return Unserved("views on several devices" if x.device != every[0].device else "views of several shapes")
    if any(x.requires_grad for x in teacher):
        return Unserved("a gradient for the teacher's targets")
    return None


def masked_loss(
    single: bool,
    self: Any,
    student_patch_tokens_masked: Tensor,
    teacher_patch_tokens_masked: Tensor,
    student_masks_flat: Tensor,
    n_masked_patches: int | None = None,
    masks_weight: Tensor | None = None,
) -> Tensor | Unserved:
    """``iBOTPatchLoss.forward_masked``: ``(1/B) Σ_r w_r · CE_r`` over masked tokens [N, K], or over the first of them.

    ``single``: the package computes it in float32 (dinov3), or in the dtype of its inputs (dinov2).
    """
    student, teacher = student_patch_tokens_masked, teacher_patch_tokens_masked
    masks, count, weights = student_masks_flat, n_masked_patches, masks_weight
    unserved = unserved_views([student], [teacher]) or unserved_temperatures(self.student_temp)
    if unserved:
        return unserved
    if not isinstance(masks, Tensor) or masks.dim() < 1 or len(masks) == 0 or masks.device != student.device:
        return Unserved("masks that are no tensor with a row for each image on the logits' device")
    if count is not None:
        if not is_whole(count) or count < 0:
            return Unserved("a number of masked tokens that is no whole number")
        student, teacher = student[:count], teacher[:count]
    if weights is None:
        if masks.dtype != torch.bool or masks.dim() != 2:
            return Unserved("masks that are not [B, L] of bool")
        if readable(masks) and int(masks.sum()) != len(student):  # on a GPU it would wait, as the package does
            return Unserved("masks of another number of tokens")
        weights = token_weights(masks, len(student), torch.float32)[0]
    else:
        unserved = unserved_tensors(weights, dim=1, without_rows=True)
        if unserved or weights.shape != student.shape[:1] or weights.device != student.device or weights.requires_grad:
            return unserved or Unserved("weights that are not one for each token on their device, or with a gradient")
    loss = _weighted(single, student, teacher, self.student_temp, weights) / len(masks)
    return loss.to(torch.promote_types(_kind(single, student, teacher), weights.dtype))


def patch_loss(
    single: bool, self: Any, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor
) -> Tensor | Unserved:
    """``iBOTPatchLoss.forward``: the mean over images of that of their masked patches, of all patches' logits."""
    masks = student_masks_flat
    if not all(isinstance(x, Tensor) and x.dim() == 3 for x in (student_patch_tokens, teacher_patch_tokens)):
        return Unserved("logits that are not [B, L, K]")
    student, teacher = student_patch_tokens.flatten(0, 1), teacher_patch_tokens.flatten(0, 1)
    unserved = unserved_views([student], [teacher]) or unserved_temperatures(self.student_temp)
    if unserved or len(student) == 0 or student_patch_tokens.shape != teacher_patch_tokens.shape:
        return unserved or Unserved("no logits, or of several shapes")
    if not isinstance(masks, Tensor) or masks.shape != student_patch_tokens.shape[:2] or masks.device != student.device:
        return Unserved("masks that are not [B, L] on the logits' device")
    if masks.requires_grad or masks.is_complex():
        return Unserved("masks with a gradient, or of complex numbers")
    weights = masks.to(accumulator(student)) / masks.sum(-1, keepdim=True).clamp(min=1.0)
    loss = _weighted(single, student, teacher, self.student_temp, weights.flatten()) / len(masks)
    return loss.to(torch.promote_types(_kind(single, student, teacher), torch.float32))


def _weighted(single: bool, student: Tensor, teacher: Tensor, temperature: float, weights: Tensor) -> Tensor:
    if single:
        student, teacher = at_most_single(student), at_most_single(teacher)
    return assignment_cross_entropy(student, teacher, temperature=temperature, row_weights=weights)


def _kind(single: bool, *tensors: Tensor) -> torch.dtype:
    return torch.float32 if single else kind_of(*tensors)


# --------------------------------------------------------------------------------------------------------------- KoLeo


def koleo_of_batch(self: Any, student_output: Tensor, eps: float = 1e-8) -> Tensor | Unserved:
    """``KoLeoLoss.forward``: of this rank's rows, in their dtype, for both packages put autocast off."""
    unserved = unserved_tensors(student_output, dim=2) or unserved_distance(self.pdist, eps)
    if unserved or len(student_output) < 2:
        return unserved or Unserved("one row, which has no neighbour but itself")
    return koleo(student_output, eps=eps).to(student_output.dtype)
