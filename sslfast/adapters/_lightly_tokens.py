"""The fast forms of lightly's losses of patch tokens over prototypes: iBOT, iBOT++, CAPI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import accumulator, ids_checked, readable
from ..losses.distillation.capi import capi
from ..losses.distillation.cross_entropy import distillation_cross_entropy
from ..losses.distillation.ibot import all_token_weights, token_weights
from ..losses.distillation.sinkhorn import sinkhorn
from ._lightly_contrastive import in_dtype_of
from ._lightly_prototypes import over_ranks, rounded, unserved_iterations
from ._serve import Unserved, is_number, unserved_matrices, unserved_temperatures, unserved_tensors

EPSILON = 1e-8  # lightly's, in the denominators of CAPI's Sinkhorn; sslfast's has none


def _unserved_center(self: Any, prototypes: int, *temperatures: object) -> Unserved | None:
    center = getattr(self.center, "value", None)
    if not isinstance(center, Tensor) or center.shape != (1, prototypes):
        return Unserved("a center that is not [1, K]")
    return unserved_temperatures(*temperatures)


def _from_center(
    self: Any, teacher_out: Tensor, student_out: Tensor, temperature: float, weights: Tensor | None
) -> Tensor:
    """The cross entropy of rows [N, K], and the update of lightly's own ``center``."""
    temperature = rounded(temperature)
    loss = distillation_cross_entropy(
        student_out,
        teacher_out,
        student_temperature=self.student_temp,
        teacher_temperature=temperature,
        teacher_bias=(self.center.value / -temperature).view(-1),
        row_weights=weights,
    )
    self.center.update(teacher_out)
    return loss


def fast_ibot(self: Any, teacher_out: Any, student_out: Any, mask: Any, teacher_temp: Any = None) -> Tensor | Unserved:
    temperature = self.teacher_temp if teacher_temp is None else teacher_temp
    unserved = unserved_matrices(student_out, teacher_out)
    unserved = unserved or _unserved_center(self, student_out.shape[1], self.student_temp, temperature)
    if unserved:
        return unserved
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3 or mask.device != student_out.device:
        return Unserved("a mask that is no bool tensor [B, H, W] on the logits' device")
    if readable(mask) and int(mask.sum()) != len(student_out):  # on a GPU it would wait, as lightly does
        return Unserved("a mask of another number of tokens")
    weights = token_weights(mask, len(student_out), accumulator(student_out))[0] / len(mask)
    return _from_center(self, teacher_out, student_out, temperature, weights)


def fast_ibot_plus_plus(
    self: Any,
    teacher_out: Any,
    student_out: Any,
    mask: Any = None,
    teacher_temp: Any = None,
    visible_loss_weight: Any = 1.0,
) -> Tensor | Unserved:
    temperature = self.teacher_temp if teacher_temp is None else teacher_temp
    dim = student_out.dim() if isinstance(student_out, Tensor) else 0
    unserved = unserved_tensors(student_out, teacher_out, dim=3 if dim == 3 else 2, same_shape=True)
    unserved = unserved or _unserved_center(self, student_out.shape[-1], self.student_temp, temperature)
    if unserved:
        return unserved
    if not is_number(visible_loss_weight):
        return Unserved("a visible_loss_weight that is no number")
    teacher, student = teacher_out.flatten(0, -2), student_out.flatten(0, -2)
    weights = None
    if mask is None:
        if dim == 2:
            return Unserved("logits [B·N, K] without a mask")
    else:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 2 or mask.device != student.device:
            return Unserved("a mask that is no bool tensor [B, H, W] or [B, N] on the logits' device")
        if mask.numel() != len(student) or (dim == 3 and len(mask) != len(student_out)):
            return Unserved("a mask of another number of tokens")
        weights = all_token_weights(mask, visible_loss_weight, accumulator(student)) / len(mask)
    loss = _from_center(self, teacher, student, temperature, weights)
    like = self.center.value.new_empty(0, dtype=torch.promote_types(student.dtype, self.center.value.dtype))
    result: Tensor = in_dtype_of(like, loss)
    return result


def _unserved_epsilon(logits: Tensor, epsilon: object) -> Unserved | None:
    """Logits of float64 show an epsilon that is far below the rounding of the others."""
    if not is_number(epsilon) or not 0 <= epsilon <= EPSILON:  # type: ignore[operator]
        return Unserved(f"an epsilon of {epsilon!r}")
    if logits.dtype == torch.float64 and epsilon != 0:
        return Unserved("float64, whose last digits the epsilon of 1e-8 changes")
    return None


def fast_sinkhorn_knopp(
    logits: Any, iterations: Any = 3, gather_distributed: Any = False, epsilon: Any = EPSILON
) -> Tensor | Unserved:
    """``lightly.loss.capi_loss.sinkhorn_knopp``, where a script calls it by itself."""
    unserved = unserved_tensors(logits, dim=3) or unserved_iterations(iterations)
    unserved = unserved or _unserved_epsilon(logits, epsilon)
    if unserved:
        return unserved
    found = sinkhorn(logits, 1.0, iterations, gather_distributed=over_ranks(gather_distributed))
    result: Tensor = in_dtype_of(logits, found)
    return result


def fast_capi(self: Any, teacher_logits: Any, student_logits: Any, teacher_index: Any = None) -> Tensor | Unserved:
    unserved = unserved_tensors(student_logits, teacher_logits, dim=3)
    unserved = unserved or unserved_temperatures(self.teacher_temperature, self.student_temperature)
    unserved = unserved or unserved_iterations(self.sinkhorn_iterations) or _unserved_epsilon(teacher_logits, EPSILON)
    unserved = unserved or _unserved_tokens(teacher_logits, student_logits, teacher_index)
    if unserved:
        return unserved
    loss = capi(
        teacher_logits,
        student_logits,
        teacher_index,
        teacher_temperature=self.teacher_temperature,
        student_temperature=self.student_temperature,
        sinkhorn_iterations=self.sinkhorn_iterations,
        gather_distributed=over_ranks(self.gather_distributed),
    )
    result: Tensor = in_dtype_of(student_logits, loss)
    return result


def _unserved_tokens(teacher: Tensor, student: Tensor, index: object) -> Unserved | None:
    """Why the student's tokens are not the teacher's at ``index``, or all of them."""
    if index is None:
        return None if teacher.shape == student.shape else Unserved("logits of several shapes, and no teacher_index")
    if teacher.shape[::2] != student.shape[::2]:
        return Unserved("logits of several shapes")
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != student.shape[:2]:
        return Unserved("a teacher_index that is not [B, P] int64")
    if index.device != student.device:
        return Unserved("tensors on several devices")
    if ids_checked(index) and not ((index >= 0) & (index < teacher.shape[1])).all():
        return Unserved("a teacher_index beyond the tokens")
    return None
