"""The fast forms of lightly's losses over prototypes, of whole views: SwAV, DINO, MSN. Those of tokens are beside."""

from __future__ import annotations

from typing import Any

import lightly.loss.dino_loss as dino_loss
import lightly.loss.swav_loss as swav_loss
import torch
from torch import Tensor

from .._library import constant_to_the_compiler
from ..losses.distillation.cross_entropy import distillation_cross_entropy
from ..losses.distillation.msn import MSNOptions, floored, msn_loss
from ..losses.distillation.sinkhorn import sinkhorn
from ..losses.distillation.swav import swav
from ._lightly_contrastive import in_dtype_of
from ._serve import Unserved, is_number, overridden, unserved_matrices, unserved_temperatures, unserved_tensors


def unserved_iterations(iterations: object) -> Unserved | None:
    if isinstance(iterations, int) and not isinstance(iterations, bool) and iterations >= 1:
        return None
    return Unserved("no iteration of Sinkhorn's")


def over_ranks(gather_distributed: object) -> bool:
    """As lightly reads it: without a process group it is the local loss."""
    distributed = torch.distributed
    return bool(gather_distributed) and distributed.is_available() and distributed.is_initialized()


def _unserved_lists(*lists: object) -> Unserved | None:
    """Why they are not lists of matrices [B, K] of one shape, dtype and device."""
    if not all(isinstance(views, (list, tuple)) for views in lists):
        return Unserved("views in something else than lists or tuples")
    every = [x for views in lists for x in views]  # type: ignore[attr-defined]
    return unserved_matrices(*every) if every else Unserved("no view")


@constant_to_the_compiler
def rounded(temperature: float) -> float:
    """As lightly's, which is a tensor of the default dtype."""
    return float(torch.tensor(temperature, device="cpu"))


def fast_swav(
    self: Any, high_resolution_outputs: Any, low_resolution_outputs: Any, queue_outputs: Any = None
) -> Tensor | Unserved:
    high, low = high_resolution_outputs, low_resolution_outputs
    unserved = overridden(self, swav_loss.SwaVLoss, "subloss") or _unserved_lists(high, low)
    unserved = unserved or unserved_temperatures(self.temperature, self.sinkhorn_epsilon)
    if unserved:
        return unserved
    if not high or len(high) + len(low) < 2:
        return Unserved("fewer than two views, or none of high resolution")
    unserved = unserved_iterations(self.sinkhorn_iterations)
    if unserved:
        return unserved
    if queue_outputs is not None:
        unserved = _unserved_lists(queue_outputs)
        if unserved:
            return unserved
        first = queue_outputs[0]
        if len(queue_outputs) != len(high) or first.shape[1] != high[0].shape[1] or first.dtype != high[0].dtype:
            return Unserved("a queue that does not fit the views")
        if first.device != high[0].device:
            return Unserved("tensors on several devices")
    loss = swav(
        high,
        low,
        queue_outputs,
        temperature=self.temperature,
        sinkhorn_iterations=self.sinkhorn_iterations,
        sinkhorn_epsilon=self.sinkhorn_epsilon,
        sinkhorn_gather_distributed=over_ranks(self.sinkhorn_gather_distributed),
    )
    result: Tensor = in_dtype_of(high[0], loss.view(1))
    return result


def fast_sinkhorn(
    out: Any, iterations: Any = 3, epsilon: Any = 0.05, gather_distributed: Any = False
) -> Tensor | Unserved:
    """``lightly.loss.swav_loss.sinkhorn``, where a script calls it by itself."""
    unserved = unserved_tensors(out, dim=2) or unserved_iterations(iterations) or unserved_temperatures(epsilon)
    if unserved:
        return unserved
    found = sinkhorn(out, epsilon, iterations, gather_distributed=over_ranks(gather_distributed))
    result: Tensor = in_dtype_of(out, found)
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
    unserved = unserved or unserved_temperatures(self.student_temp, temperature)
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
    temperature = rounded(temperature)
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


def fast_msn(
    self: Any, anchors: Any, targets: Any, prototypes: Any, target_sharpen_temperature: Any = 0.25
) -> Tensor | Unserved:
    unserved = unserved_tensors(anchors, targets, prototypes, dim=2)
    unserved = unserved or unserved_temperatures(self.temperature, target_sharpen_temperature)
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
    gather = over_ranks(self.gather_distributed)
    loss, _ = msn_loss(anchors, targets, prototypes, options, prior, gather_distributed=gather, targets_alone=True)
    result: Tensor = in_dtype_of(anchors, loss)
    return result
