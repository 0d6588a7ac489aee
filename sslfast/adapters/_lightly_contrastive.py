"""The fast forms of lightly's losses that contrast rows: NT-Xent and its relatives, alignment and uniformity."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightly.loss.dcl_loss as dcl_loss
import lightly.loss.detcon_loss as detcon_loss
import lightly.loss.regularizer.co2 as co2_module
import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import FLOATS, readable
from ..losses.contrastive.co2 import co2
from ..losses.contrastive.dcl import dcl
from ..losses.contrastive.det_con import det_con_b, det_con_s
from ..losses.contrastive.hypersphere import hypersphere
from ..losses.contrastive.macl import EPS, macl
from ..losses.contrastive.moco import moco
from ..losses.contrastive.nt_xent import nt_xent
from ._serve import Unserved, is_number, is_unhooked, overridden, unserved_matrices, unserved_tensors


def gathers(loss: Any) -> bool:
    """lightly gathers over a process group of several ranks, and is silent where there is none."""
    distributed = torch.distributed
    if not (loss.gather_distributed and distributed.is_available() and distributed.is_initialized()):
        return False
    return bool(distributed.get_world_size() > 1)


def in_dtype_of(x: Tensor, result: Any) -> Any:
    """``result`` in the dtype of ``x``, as lightly returns it; float32 where autocast chooses dtypes."""
    return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


def _unserved_temperature(temperature: object, like: Tensor) -> Unserved | None:
    """lightly divides by anything; a tensor's value is looked at where that does not wait for a device."""
    if isinstance(temperature, Tensor):
        if temperature.dim() or temperature.dtype not in FLOATS or temperature.device != like.device:
            return Unserved("a temperature tensor that has dimensions, is elsewhere or is not floating point")
        if not readable(temperature):
            return None
        temperature = float(temperature.detach())
    if not is_number(temperature) or not 1e-8 <= abs(temperature) <= 1e8:  # type: ignore[arg-type]
        return Unserved("a temperature that is no number between 1e-8 and 1e8 in size")
    return None


def _unserved_cross_entropy(criterion: object) -> Unserved | None:
    plain = (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.ignore_index < 0
        and criterion.reduction == "mean"
        and criterion.label_smoothing == 0
        and is_unhooked(criterion)
    )
    return None if plain else Unserved("cross_entropy is not the plain one")


def fast_nt_xent(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unserved:
    unserved = (
        unserved_matrices(out0, out1)
        or _unserved_temperature(self.temperature, out0)
        or _unserved_cross_entropy(self.cross_entropy)
        or overridden(self.memory_bank, MemoryBankModule, "forward")
    )
    if unserved:
        return unserved
    if self.memory_bank.size[0]:
        return _with_bank(self, out0, out1)
    gather = gathers(self)
    if len(out0) < 2 and not gather:
        return Unserved("one pair, which has no negative: the loss is zero to the last bit")
    return in_dtype_of(out0, nt_xent(out0, out1, self.temperature, gather_distributed=gather))


def _unserved_bank(module: Any, like: Tensor) -> Unserved | None:
    """A bank [K, D] of rows like these."""
    bank = module.bank
    if bank.dim() != 2 or bank.shape[1] != like.shape[1] or not module.feature_dim_first:
        return Unserved("a memory bank whose keys are not [K, D]")
    if bank.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        return Unserved(f"a memory bank of {bank.dtype} for {like.dtype}")
    return None


def _with_bank(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unserved:
    """The bank's own code updates it, with rows that lightly's normalisation made: every bit of it stays lightly's."""
    unserved = _unserved_bank(self.memory_bank, out0)
    if unserved:
        return unserved
    q, k = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    k, negatives = self.memory_bank.forward(k, update=q.requires_grad)
    return in_dtype_of(out0, moco(q, k, negatives.to(q.device).T, self.temperature, normalize=False))


def _mises_fisher_weights(z0: Tensor, z1: Tensor, sigma: float) -> Tensor:
    """lightly's, of this rank's rows, without its copy by ``torch.tensor``: that warns, and is not traced."""
    with torch.no_grad():
        return 2 - len(z0) * F.softmax((z0 * z1).sum(1) / sigma, dim=0)


def _sigma(weight_fn: object) -> Any:
    """σ of lightly's own weights; ``None`` where ``weight_fn`` is something else."""
    function, given = weight_fn, {"sigma": 0.5}
    if isinstance(weight_fn, partial) and not weight_fn.args:
        function, given = weight_fn.func, given | weight_fn.keywords
    return given["sigma"] if function is dcl_loss.negative_mises_fisher_weights and len(given) == 1 else None


def fast_dcl(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unserved:
    unserved = (
        unserved_matrices(out0, out1)
        or _unserved_temperature(self.temperature, out0)
        or overridden(self, dcl_loss.DCLLoss, "_loss")
    )
    if unserved:
        return unserved
    weights = None
    if self.weight_fn:
        sigma = _sigma(self.weight_fn)
        if not is_number(sigma):
            return Unserved("a weight_fn of its own")
        weights = partial(_mises_fisher_weights, sigma=sigma)
    loss = dcl(out0, out1, self.temperature, weight_fn=weights, gather_distributed=gathers(self))
    return in_dtype_of(out0, loss)


def fast_macl(self: Any, z0: Tensor, z1: Tensor) -> Tensor | Unserved:
    unserved = unserved_matrices(z0, z1) or _unserved_temperature(self.temperature, z0)
    if unserved:
        return unserved
    if not all(is_number(x) and 0 <= x <= 1 for x in (self.alpha, self.A_0)) or self.eps != EPS:
        return Unserved("alpha or A_0 that is no number between 0 and 1, or another eps")
    if len(z0) < 2:
        return Unserved("one pair, which has no negative")
    return in_dtype_of(z0, macl(z0, z1, self.temperature, alpha=self.alpha, A_0=self.A_0))


def _unserved_regions(loss: Any, views: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> Unserved | None:
    unserved = unserved_tensors(*views, dim=3, same_shape=True) or _unserved_temperature(loss.temperature, views[0])
    if unserved:
        return unserved
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dtype not in _INTEGERS or mask.shape != views[0].shape[:2]:
            return Unserved("a mask that is not [B, M] integers")
        if mask.device != views[0].device:
            return Unserved("tensors on several devices")
    return None


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def fast_det_con_s(
    self: Any, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor
) -> Tensor | Unserved:
    inner, masks = self.detconbloss, (mask_view0, mask_view1)
    if overridden(inner, detcon_loss.DetConBLoss, "forward") or not is_unhooked(inner):
        return inner(view0, view1, view0, view1, *masks)  # as lightly calls it
    unserved = _unserved_regions(inner, (view0, view1), masks)
    if unserved:
        return unserved
    return det_con_s(view0, view1, *masks, inner.temperature, gather_distributed=gathers(inner))


def fast_det_con_b(
    self: Any,
    pred_view0: Tensor,
    pred_view1: Tensor,
    target_view0: Tensor,
    target_view1: Tensor,
    mask_view0: Tensor,
    mask_view1: Tensor,
) -> Tensor | Unserved:
    views, masks = (pred_view0, pred_view1, target_view0, target_view1), (mask_view0, mask_view1)
    unserved = _unserved_regions(self, views, masks)
    if unserved:
        return unserved
    return det_con_b(*views, *masks, self.temperature, gather_distributed=gathers(self))


def fast_co2(self: Any, out0: Tensor, out1: Tensor) -> Tensor | Unserved:
    """lightly's result is a copy by ``torch.tensor``, which has no gradient: so has this."""
    bank, divergence = self.memory_bank, self.kl_div
    unserved = (
        unserved_matrices(out0, out1)
        or _unserved_temperature(self.t_consistency, out0)
        or overridden(bank, MemoryBankModule, "forward")
        or overridden(self, co2_module.CO2Regularizer, "_get_pseudo_labels")
        or (_unserved_bank(bank, out0) if bank.size[0] else None)
    )
    if unserved:
        return unserved
    plain = type(divergence) is nn.KLDivLoss and divergence.reduction == "batchmean" and divergence.log_target
    if not (plain and self.log_target and is_unhooked(divergence) and is_number(self.alpha)):
        return Unserved("kl_div is not the plain one, or alpha is no number")
    with torch.no_grad():
        q, k = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        k, negatives = bank.forward(k, update=True)
        queue = None if negatives is None else negatives.to(q.device).T
        return in_dtype_of(out0, self.alpha * co2(q, k, queue, self.t_consistency, normalize=False))


def fast_hypersphere(self: Any, z_a: Tensor, z_b: Tensor) -> Tensor | Unserved:
    unserved = unserved_matrices(z_a, z_b)
    if unserved:
        return unserved
    if len(z_a) < 2:
        return Unserved("one row, which has no pair")
    if not (is_number(self.t) and self.t > 0 and is_number(self.alpha) and self.alpha > 0):
        return Unserved("t or alpha that is no positive number")
    return in_dtype_of(z_a, hypersphere(z_a, z_b, self.t, self.lam, self.alpha))
