"""solo-learn's loss functions (``solo.losses``) with sslfast's kernels in them.

Two releases are about: 1.0.2 from the package index, and 1.0.6 from the repository. What a function is given, and
whether it gathers over ranks, is read off the one that is installed.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import solo.losses
import solo.losses.dino
import torch
from torch import Tensor

from .._checks import accumulator, readable
from ..distributed.choose import scope_of
from ..losses.contrastive.group_nt_xent import group_members, group_nt_xent
from ..losses.contrastive.info_nce import info_nce
from ..losses.contrastive.moco import moco
from ..losses.contrastive.nt_xent import nt_xent
from ..losses.decorrelation.barlow_twins import barlow_twins
from ..losses.decorrelation.vibcreg import vibcreg
from ..losses.decorrelation.vicreg import vicreg
from ..losses.distillation.cross_entropy import assignment_cross_entropy, distillation_cross_entropy
from ..losses.distillation.re_ssl import re_ssl
from . import _cosine as cosine
from ._dino import as_views, sinkhorn_targets, unserved_views
from ._mae import patch_loss
from ._serve import (
    Package,
    Unserved,
    adapter_class,
    parameters,
    served,
    unserved_matrices,
    unserved_tensors,
)


def _over_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _unserved_numbers(**numbers: object) -> Unserved | None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return Unserved(f"{name}={value!r}")
    return None


def _unserved_temperature(temperature: object) -> Unserved | None:
    unserved = _unserved_numbers(temperature=temperature)
    if unserved is None and not 1e-8 <= abs(temperature) <= 1e8:  # type: ignore[arg-type]
        return Unserved(f"temperature={temperature!r}")
    return unserved


def _unserved_views(z1: Tensor, z2: Tensor, **weights: object) -> Unserved | None:
    """Two views [N, D] of at least two rows, whose columns then have a variance."""
    unserved = unserved_matrices(z1, z2) or _unserved_numbers(**weights)
    if unserved is None and z1.shape[0] < 2:
        return Unserved("a batch of one row")
    return unserved


def _as_tensor(loss: object) -> Tensor:
    assert isinstance(loss, Tensor)
    return loss


# ---------------------------------------------------------------------------------------------------------- contrastive


def _simclr(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor | Unserved:
    unserved = unserved_tensors(z, dim=2) or _unserved_temperature(temperature)
    if unserved:
        return unserved
    if not isinstance(indexes, Tensor) or indexes.shape != z.shape[:1] or indexes.device != z.device:
        return Unserved("indexes that are no vector beside z, one for each row")
    if indexes.is_floating_point() or indexes.is_complex() or indexes.dtype == torch.bool:
        return Unserved(f"indexes of {indexes.dtype}")
    if not readable(indexes):
        return Unserved("indexes on a GPU, or in a graph, where sslfast would have to wait for them")
    over_ranks = _over_ranks()
    if not over_ranks and 1 in group_members(indexes):
        return Unserved("an index that occurs once")
    return group_nt_xent(z, indexes, temperature, gather_distributed=over_ranks)


def _simclr_views(
    z1: Tensor, z2: Tensor, temperature: float = 0.1, extra_pos_mask: Tensor | None = None
) -> Tensor | Unserved:
    if extra_pos_mask is not None:
        return Unserved("extra_pos_mask")
    unserved = unserved_matrices(z1, z2) or _unserved_temperature(temperature)
    return unserved or _as_tensor(nt_xent(z1, z2, temperature))


def _nnclr(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor | Unserved:
    unserved = unserved_matrices(nn, p) or _unserved_temperature(temperature)
    return unserved or _as_tensor(info_nce(nn, p, temperature))


def _gathering_nnclr(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor | Unserved:
    unserved = unserved_matrices(nn, p) or _unserved_temperature(temperature)
    return unserved or _as_tensor(info_nce(nn, p, temperature, gather_distributed=_over_ranks()))


def _moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor | Unserved:
    unserved = unserved_matrices(query, key) or unserved_tensors(query, queue, dim=2)
    unserved = unserved or _unserved_temperature(temperature)
    if unserved:
        return unserved
    if queue.shape[0] != query.shape[1]:
        return Unserved(f"a queue of shape {tuple(queue.shape)}")
    if queue.requires_grad:
        return Unserved("a gradient for the queue")
    return _as_tensor(moco(query, key, queue.T, temperature, normalize=False))


def _mocov3(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor | Unserved:
    unserved = unserved_matrices(query, key) or _unserved_temperature(temperature)
    if unserved:
        return unserved
    over_ranks = _over_ranks()
    key = key.detach() if over_ranks else key  # only its gather is without a gradient
    return 2 * temperature * _as_tensor(info_nce(query, key, temperature, gather_distributed=over_ranks))


# --------------------------------------------------------------------------------------------------- the other families


def _barlow(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor | Unserved:
    unserved = _unserved_views(z1, z2, lamb=lamb, scale_loss=scale_loss)
    if unserved:
        return unserved
    if z1.dtype == torch.float64 and torch.get_default_dtype() != torch.float64:
        return Unserved("float64, which its batch normalisation has no statistics for")
    return barlow_twins(z1, z2, lamb, scale_loss=scale_loss, gather_distributed=_over_ranks(), statistics="local")


def _vicreg_of(gathers: bool) -> Callable[..., Any]:
    def fast(
        z1: Tensor,
        z2: Tensor,
        sim_loss_weight: float = 25.0,
        var_loss_weight: float = 25.0,
        cov_loss_weight: float = 1.0,
    ) -> Tensor | Unserved:
        weights = (sim_loss_weight, var_loss_weight, cov_loss_weight)
        unserved = _unserved_views(z1, z2, **dict(zip(("sim", "var", "cov"), weights, strict=True)))
        if unserved:
            return unserved
        return vicreg(z1, z2, *weights, variance_reduction="sum", gather_distributed=gathers and _over_ranks())

    return fast


def _vibcreg(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 200.0,
) -> Tensor | Unserved:
    weights = (sim_loss_weight, var_loss_weight, cov_loss_weight)
    unserved = _unserved_views(z1, z2, **dict(zip(("sim", "var", "cov"), weights, strict=True)))
    return unserved or vibcreg(z1, z2, *weights, gather_distributed=_over_ranks())


def _ressl(
    q: Tensor, k: Tensor, queue: Tensor, temperature_q: float = 0.1, temperature_k: float = 0.04
) -> Tensor | Unserved:
    unserved = unserved_matrices(q, k) or unserved_tensors(q, queue, dim=2)
    unserved = unserved or _unserved_temperature(temperature_q) or _unserved_temperature(temperature_k)
    if unserved:
        return unserved
    if queue.shape[1] != q.shape[1]:
        return Unserved(f"a queue of shape {tuple(queue.shape)}")
    if queue.requires_grad:
        return Unserved("a gradient for the queue")
    return _as_tensor(re_ssl(q, k, queue, temperature_q, temperature_k, normalize=False))


def _mae(imgs: Tensor, pred: Tensor, mask: Tensor, patch_size: int, norm_pix_loss: bool = True) -> Tensor | Unserved:
    return patch_loss(imgs, pred, mask, patch_size, bool(norm_pix_loss))


# ---------------------------------------------------------------------------------------------------------- prototypes


def _swav(preds: list[Tensor], assignments: list[Tensor], temperature: float = 0.1) -> Tensor | Unserved:
    predictions, targets = as_views(preds), as_views(assignments)
    unserved = unserved_views(predictions, targets) or _unserved_temperature(temperature)
    if unserved or len(predictions) != len(targets) or len(predictions) < 2:
        return unserved or Unserved("fewer than two views, or not as many of assignments as of predictions")
    return assignment_cross_entropy(predictions, targets, temperature=temperature, ignore_diagonal=True)


def _fast_sinkhorn(self: Any, Q: Tensor) -> Tensor | Unserved:  # noqa: N803
    return sinkhorn_targets(scope_of(_over_ranks()), Q, self.epsilon, self.num_iters)


def _fast_dino(self: Any, student_output: Tensor, teacher_output: Tensor) -> Tensor | Unserved:
    temperature = float(self.teacher_temp_schedule[self.epoch])
    unserved = unserved_matrices(student_output, teacher_output) or _unserved_temperature(temperature)
    unserved = unserved or _unserved_temperature(self.student_temp)
    if unserved:
        return unserved
    if self.num_large_crops != 2 or len(student_output) % 2:
        return Unserved("other views than two of equal size")
    if self.center.shape != (1, student_output.shape[1]) or self.center.device != student_output.device:
        return Unserved("a center that does not fit the views")
    loss = distillation_cross_entropy(
        student_output.unflatten(0, (2, -1)),
        teacher_output.unflatten(0, (2, -1)),
        student_temperature=self.student_temp,
        teacher_temperature=temperature,
        teacher_bias=(self.center.to(accumulator(student_output)) / -temperature).view(-1),
        ignore_diagonal=True,
    )
    self.update_center(teacher_output)
    return loss


class DINOLoss(solo.losses.dino.DINOLoss):
    """``solo.losses.dino.DINOLoss``: both views are read once each way; ``center`` is updated by solo-learn's code."""

    forward = served(solo.losses.dino.DINOLoss.forward, _fast_dino)


# -------------------------------------------------------------------------------------------------- what is installed


class _Known(NamedTuple):
    module: str
    name: str
    fast: Callable[..., Any]
    gathers: bool | None = None  # whether the module must have solo-learn's gather; None: does not matter


_KNOWN = (
    _Known("barlow", "barlow_loss_func", _barlow),
    _Known("byol", "byol_loss_func", cosine.byol),
    _Known("mae", "mae_loss_func", _mae),
    _Known("moco", "moco_loss_func", _moco),
    _Known("mocov2plus", "mocov2plus_loss_func", _moco),
    _Known("mocov3", "mocov3_loss_func", _mocov3),
    _Known("nnclr", "nnclr_loss_func", _nnclr, gathers=False),
    _Known("nnclr", "nnclr_loss_func", _gathering_nnclr, gathers=True),
    _Known("ressl", "ressl_loss_func", _ressl),
    _Known("simclr", "simclr_loss_func", _simclr_views, gathers=False),
    _Known("simclr", "simclr_loss_func", _simclr, gathers=True),
    _Known("simsiam", "simsiam_loss_func", cosine.sim_siam),
    _Known("swav", "swav_loss_func", _swav),
    _Known("vibcreg", "vibcreg_loss_func", _vibcreg, gathers=True),
    _Known("vicreg", "vicreg_loss_func", _vicreg_of(False), gathers=False),
    _Known("vicreg", "vicreg_loss_func", _vicreg_of(True), gathers=True),
)
_UNCHANGED = {
    "deepclusterv2_loss_func": "a cross entropy with hard labels, one pass over the logits already",
    "manual_simclr_loss_func": "masks that are N × N already",
    "wmse_loss_func": "no matrix that could be avoided",
}


def _installed() -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Served functions by name, and what stays solo-learn's own with the reason."""
    found: dict[str, Callable[..., Any]] = {}
    unchanged = {name: reason for name, reason in _UNCHANGED.items() if hasattr(solo.losses, name)}
    for known in _KNOWN:
        try:
            module = importlib.import_module(f"solo.losses.{known.module}")
        except ModuleNotFoundError:
            continue
        original = getattr(module, known.name)
        same_arguments = parameters(original) == parameters(known.fast)
        if same_arguments and known.gathers in (None, hasattr(module, "gather")):
            found[known.name] = served(original, known.fast)
        elif known.name not in found:
            unchanged[known.name] = "this version of solo-learn takes or gathers something else"
    return found, {name: reason for name, reason in unchanged.items() if name not in found}


def _classes() -> tuple[type, ...]:
    """Adapter classes; of ``solo.utils``, which solo-learn itself imports, where it is loaded."""
    utils: Any = sys.modules.get("solo.utils.sinkhorn_knopp")
    if utils is None:
        return (DINOLoss,)
    cls = utils.SinkhornKnopp
    return DINOLoss, adapter_class(cls, {"forward": served(cls.forward, _fast_sinkhorn)}, __name__)


def __getattr__(name: str) -> Any:
    found = {**_installed()[0], **{cls.__name__: cls for cls in _classes()}}
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


def contents() -> Package:
    functions, unchanged = _installed()
    served_functions = tuple(functions[name] for name in sorted(functions))
    return Package(classes=_classes(), functions=served_functions, unchanged=unchanged)
