"""The fast forms of lightly's losses over prototypes: SwAV, DINO, iBOT, MSN, PMSN."""

from __future__ import annotations

from typing import Any

import lightly.loss.dino_loss as dino_loss
import lightly.loss.swav_loss as swav_loss
import torch
from torch import Tensor

from .._checks import accumulator, readable
from .._library import constant_to_the_compiler
from ..losses.distillation.cross_entropy import distillation_cross_entropy
from ..losses.distillation.ibot import token_weights
from ..losses.distillation.msn import MSNOptions, floored, msn_loss
from ..losses.distillation.swav import swav
from ._lightly_contrastive import in_dtype_of, is_number
from ._serve import Unserved, overridden, unserved_matrices, unserved_tensors


def _unserved_temperatures(*temperatures: object) -> Unserved | None:
    if all(is_number(t) and 1e-8 <= abs(t) <= 1e8 for t in temperatures):  # type: ignore[arg-type]
        return None
    return Unserved("a temperature that is no number from 1e-8 to 1e8 in size")


def _unserved_lists(*lists: object) -> Unserved | None:
    """Why they are not lists of matrices [B, K] of one shape, dtype and device."""
    if not all(isinstance(views, (list, tuple)) for views in lists):
        return Unserved("views in something else than lists or tuples")
    every = [x for views in lists for x in views]  # type: ignore[attr-defined]
    return unserved_matrices(*every) if every else Unserved("no view")


@constant_to_the_compiler
def _rounded(temperature: float) -> float:
    """As lightly's, which is a tensor of the default dtype."""
    return float(torch.tensor(temperature, device="cpu"))


def fast_swav(
    self: Any, high_resolution_outputs: Any, low_resolution_outputs: Any, queue_outputs: Any = None
) -> Tensor | Unserved:
    high, low = high_resolution_outputs, low_resolution_outputs
    unserved = overridden(self, swav_loss.SwaVLoss, "subloss") or _unserved_lists(high, low)
    unserved = unserved or _unserved_temperatures(self.temperature, self.sinkhorn_epsilon)
    if unserved:
        return unserved
    if not high or len(high) + len(low) < 2:
        return Unserved("fewer than two views, or none of high resolution")
    if not isinstance(self.sinkhorn_iterations, int) or self.sinkhorn_iterations < 1:
        return Unserved("no iteration of Sinkhorn's")
    if queue_outputs is not None:
        unserved = _unserved_lists(queue_outputs)
        if unserved:
            return unserved
        first = queue_outputs[0]
        if len(queue_outputs) != len(high) or first.shape[1] != high[0].shape[1] or first.dtype != high[0].dtype:
            return Unserved("a queue that does not fit the views")
        if first.device != high[0].device:
            return Unserved("tensors on several devices")
    distributed = torch.distributed
    gather = self.sinkhorn_gather_distributed and distributed.is_available() and distributed.is_initialized()
    loss = swav(
        high,
        low,
        queue_outputs,
        temperature=self.temperature,
        sinkhorn_iterations=self.sinkhorn_iterations,
        sinkhorn_epsilon=self.sinkhorn_epsilon,
        sinkhorn_gather_distributed=gather,
    )
    result: Tensor = in_dtype_of(high[0], loss.view(1))
    return result


def fast_dino(
    self: Any, teacher_out: Any, student_out: Any, teacher_temp: Any = None, epoch: Any = None
) -> Tensor | Unserved:
    unserved = overridden(self, dino_loss.DINOLoss, "update_center") or _unserved_lists(teacher_out, student_out)
    temperature = teacher_temp if teacher_temp is not None else self.teacher_temp
    if teacher_temp is None and epoch is not None and isinstance(epoch, int) and not isinstance(epoch, bool):
        if epoch < self.warmup_teacher_temp_epochs:
            temperature = float(self.teacher_temp_schedule[epoch])
    elif teacher_temp is None and epoch is not None:
        return Unserved("an epoch that is no whole number")
    unserved = unserved or _unserved_temperatures(self.student_temp, temperature)
    if unserved:
        return unserved
    if not teacher_out or not student_out or len(teacher_out) == len(student_out) == 1:
        return Unserved("one view")
    like = student_out[0]
    if self.center.shape != (1, 1, like.shape[1]) or self.center.device != like.device:
        return Unserved("a center that does not fit the views")
    half = like.dtype in (torch.float16, torch.bfloat16)
    if half and self.center.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        return Unserved("half precision beside a center that is not")
    temperature = _rounded(temperature)
    loss = distillation_cross_entropy(
        student_out,
        teacher_out,
        student_temperature=self.student_temp,
        teacher_temperature=temperature,
        teacher_bias=(self.center / -temperature).view(-1),
        ignore_diagonal=True,
    )
    # lightly's own update, of the views' means in place of the views.
    self.update_center(torch.stack([x.detach().mean(0, keepdim=True) for x in teacher_out]))
    result: Tensor = in_dtype_of(like, loss)
    return result


def fast_ibot(self: Any, teacher_out: Any, student_out: Any, mask: Any, teacher_temp: Any = None) -> Tensor | Unserved:
    temperature = self.teacher_temp if teacher_temp is None else teacher_temp
    unserved = unserved_matrices(student_out, teacher_out) or _unserved_temperatures(self.student_temp, temperature)
    if unserved:
        return unserved
    center = getattr(self.center, "value", None)
    if not isinstance(center, Tensor) or center.shape != (1, student_out.shape[1]):
        return Unserved("a center that is not [1, K]")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 3 or mask.device != student_out.device:
        return Unserved("a mask that is no bool tensor [B, H, W] on the logits' device")
    if readable(mask) and int(mask.sum()) != len(student_out):  # on a GPU it would wait, as lightly does
        return Unserved("a mask of another number of tokens")
    temperature = _rounded(temperature)
    loss = distillation_cross_entropy(
        student_out,
        teacher_out,
        student_temperature=self.student_temp,
        teacher_temperature=temperature,
        teacher_bias=(center / -temperature).view(-1),
        row_weights=token_weights(mask, len(student_out), accumulator(student_out))[0] / len(mask),
    )
    self.center.update(teacher_out)
    return loss


def fast_msn(
    self: Any, anchors: Any, targets: Any, prototypes: Any, target_sharpen_temperature: Any = 0.25
) -> Tensor | Unserved:
    unserved = unserved_tensors(anchors, targets, prototypes, dim=2)
    unserved = unserved or _unserved_temperatures(self.temperature, target_sharpen_temperature)
    if unserved:
        return unserved
    if not anchors.shape[1] == targets.shape[1] == prototypes.shape[1] or len(anchors) % len(targets):
        return Unserved("embeddings of several widths, or anchors that are no whole number of views of the targets")
    if not is_number(self.regularization_weight):
        return Unserved("a regularization_weight that is no number")
    if not isinstance(self.sinkhorn_iterations, int):
        return Unserved("iterations of Sinkhorn's that are no whole number")

    def prior(mean: Tensor) -> Tensor:  # K numbers: lightly's own code, or a subclass's
        loss: Tensor = self.regularization_loss(mean_anchor_probs=floored(mean))
        return loss

    options = MSNOptions(
        self.temperature,
        target_sharpen_temperature,
        max(self.sinkhorn_iterations, 0),
        max(self.regularization_weight, 0.0),
    )
    distributed = torch.distributed
    gather = bool(self.gather_distributed) and distributed.is_available() and distributed.is_initialized()
    loss, _ = msn_loss(anchors, targets, prototypes, options, prior, gather_distributed=gather, targets_alone=True)
    result: Tensor = in_dtype_of(anchors, loss)
    return result
