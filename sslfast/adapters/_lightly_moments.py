"""The fast forms of lightly's losses of second moments: Barlow Twins, VICReg(L), TiCo, MMCR, FroSSL, EMP-SSL, W-MSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightly.loss.vicreg_loss as vicreg_loss
import lightly.loss.vicregl_loss as vicregl_loss
import lightly.loss.wmse_loss as wmse_loss
import torch
from torch import Tensor

from ..distributed.choose import scope_of
from ..losses.decorrelation.barlow_twins import barlow_twins
from ..losses.decorrelation.emp_ssl import emp_ssl
from ..losses.decorrelation.frossl import frossl
from ..losses.decorrelation.mmcr import mmcr
from ..losses.decorrelation.tico import tico
from ..losses.decorrelation.vicreg import covariance_loss, vicreg
from ..losses.decorrelation.vicregl import vicregl
from ..losses.decorrelation.w_mse import whiten, whitened_pairs
from ._lightly_contrastive import gathers, in_dtype_of
from ._serve import Unserved, is_number, is_unhooked, overridden, unserved_matrices, unserved_tensors

ONE_ROW = Unserved("one row, which has no variance")


def fast_barlow_twins(self: Any, z_a: Tensor, z_b: Tensor) -> Tensor | Unserved:
    unserved = unserved_matrices(z_a, z_b)
    if unserved:
        return unserved
    gather = gathers(self)
    sizes = scope_of(gather).shard(z_a).sizes  # from here on every rank decides alike
    if len(set(sizes)) > 1:
        return Unserved("ranks with different numbers of rows: C is the mean of the ranks', however few their rows")
    if sizes[0] < 2:
        return ONE_ROW
    return in_dtype_of(z_a, barlow_twins(z_a, z_b, self.lambda_param, gather_distributed=gather, statistics="local"))


def _unserved_places(*tensors: object) -> Unserved | None:
    """Why these are not [N, ..., D] of one shape."""
    dim = tensors[0].dim() if isinstance(tensors[0], Tensor) else 2
    return unserved_tensors(*tensors, dim=max(dim, 2), same_shape=True)


def _unserved_eps(eps: object) -> Unserved | None:
    return None if is_number(eps) and eps > 0 else Unserved("eps that is no positive number")  # type: ignore[operator]


# Of a VICReg that is worth computing otherwise: with two or three rows every bit stays lightly's.
LEAST_ROWS = 4
# N·D from which sslfast's call for each place is faster than lightly's one einsum over all of them.
LEAST_PLACE = 2048
MANY_COLLECTIVES = Unserved("a collective for each place, where lightly gathers all places at once")
SMALL_PLACES = Unserved(f"places of fewer than {LEAST_PLACE} numbers, too few to gain anything")


def _unserved_sizes(self: Any, z: Tensor) -> Unserved | None:
    """Why views of this size are not worth it. Over ranks, nothing that may differ between them decides."""
    if gathers(self):
        return MANY_COLLECTIVES if z.dim() > 2 else None
    if len(z) < 2:
        return ONE_ROW
    if z.dim() > 2:
        return SMALL_PLACES if len(z) * z.shape[-1] < LEAST_PLACE else None
    return Unserved(f"fewer than {LEAST_ROWS} rows, too few to gain anything") if len(z) < LEAST_ROWS else None


def fast_vicreg(self: Any, z_a: Tensor, z_b: Tensor) -> Tensor | Unserved:
    unserved = _unserved_places(z_a, z_b) or _unserved_eps(self.eps) or _unserved_sizes(self, z_a)
    if unserved:
        return unserved
    loss = vicreg(
        z_a,
        z_b,
        self.lambda_param,
        self.mu_param,
        self.nu_param,
        eps=self.eps,
        gather_distributed=gathers(self),
        invariance="local",
    )
    return in_dtype_of(z_a, loss)


def fast_covariance_loss(x: Tensor) -> Tensor | Unserved:
    unserved = _unserved_places(x) or (ONE_ROW if len(x) < 2 else None)
    return unserved or in_dtype_of(x, covariance_loss(x))


_VICREGL_HOOKS = (
    "_global_loss",
    "_global_invariance_loss",
    "_global_variance_and_covariance_loss",
    "_local_loss",
    "_local_l2_loss",
    "_local_location_loss",
    "_nearest_neighbors_on_l2",
    "_nearest_neighbors_on_grid",
)


def _unserved_inner(self: Any) -> Unserved | None:
    """lightly's local loss is a VICRegLoss beside the outer one's weights; sslfast has one set of them."""
    inner = self.vicreg_loss
    unserved = overridden(inner, vicreg_loss.VICRegLoss, "forward") or _unserved_eps(self.eps)
    if unserved:
        return unserved
    outer = (self.lambda_param, self.mu_param, 0.5 * self.nu_param, self.eps, self.gather_distributed)
    if not all(map(is_number, outer[:3])):
        return Unserved("weights that are no numbers")
    if outer != (inner.lambda_param, inner.mu_param, inner.nu_param, inner.eps, inner.gather_distributed):
        return Unserved("vicreg_loss has weights of its own")
    return None


def _unserved_matches(num_matches: object) -> Unserved | None:
    two = isinstance(num_matches, (list, tuple)) and len(num_matches) == 2
    if two and all(m is None or (isinstance(m, int) and (m >= 1 or m == -1)) for m in num_matches):  # type: ignore[attr-defined]
        return None
    return Unserved("num_matches that are not two positive numbers, -1 or None")


def _unserved_views(*views: Any) -> Unserved | None:
    """Why they are not lists of features ([N, D], [N, H, W, C]) and of grids [N, H, W, 2]: global, then local ones."""
    if not all(isinstance(given, (list, tuple)) for given in views if given is not None):
        return Unserved("views in something else than lists or tuples")
    features, grids, local_features, local_grids = views
    if (local_features is None) != (local_grids is None) or not features or len(features) != len(grids or ()):
        return Unserved("views without features or without grids")
    if local_features is not None:
        if len(local_features) != len(local_grids):
            return Unserved("views without features or without grids")
        features, grids = [*features, *local_features], [*grids, *local_grids]
    if len(features) < 2:
        return Unserved("one view")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in features):
        return Unserved("views that are not pairs of features")
    wholes, places = [pair[0] for pair in features], [pair[1] for pair in features]
    unserved = unserved_matrices(*wholes) or unserved_tensors(*places, dim=4) or unserved_tensors(*grids, dim=4)
    if unserved:
        return unserved
    rows, width = len(wholes[0]), places[0].shape[3]
    for local, grid in zip(places, grids, strict=True):
        if local.device != wholes[0].device or grid.device != local.device:
            return Unserved("tensors on several devices")
        if local.shape[0] != rows or local.shape[3] != width or grid.shape != (*local.shape[:3], 2):
            return Unserved("local features that do not fit each other or their grid")
    # lightly pairs different objects: a tensor that is given twice is one view to it.
    if len({id(t) for t in (*wholes, *places)}) < 2 * len(features):
        return Unserved("one tensor for several views")
    if rows < 2:
        return ONE_ROW
    return SMALL_PLACES if wholes[0].numel() < LEAST_PLACE else None


def fast_vicregl(
    self: Any,
    global_view_features: Sequence[tuple[Tensor, Tensor]],
    global_view_grids: Sequence[Tensor],
    local_view_features: Sequence[tuple[Tensor, Tensor]] | None = None,
    local_view_grids: Sequence[Tensor] | None = None,
) -> Tensor | Unserved:
    views = (global_view_features, global_view_grids, local_view_features, local_view_grids)
    unserved = (
        overridden(self, vicregl_loss.VICRegLLoss, *_VICREGL_HOOKS)
        or _unserved_inner(self)
        or (MANY_COLLECTIVES if gathers(self) else None)
        or _unserved_matches(self.num_matches)
        or _unserved_views(*views)
    )
    if unserved:
        return unserved
    loss = vicregl(
        *views,
        lambda_param=self.lambda_param,
        mu_param=self.mu_param,
        nu_param=self.nu_param,
        alpha=self.alpha,
        eps=self.eps,
        num_matches=self.num_matches,
    )
    # Sums over pairs start from new_zeros(1) of the first view's features.
    return loss.to(global_view_features[0][0].dtype).reshape(1)


def fast_tico(self: Any, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor | Unserved:
    unserved = unserved_matrices(z_a, z_b)
    if unserved:
        return unserved
    gather = gathers(self)
    if len(z_a) < 2 and not gather:
        return ONE_ROW
    width, c = z_a.shape[1], self.C
    if c is not None:
        unserved = unserved_matrices(c)
        if unserved or c.shape != (width, width) or c.device != z_a.device:
            return unserved or Unserved("C is not [D, D] on the views' device")
        if c.dtype != z_a.dtype and not torch.is_autocast_enabled(z_a.device.type):
            return Unserved(f"C of {c.dtype} for {z_a.dtype}")
    loss, c = tico(z_a, z_b, c, self.beta, self.rho, gather_distributed=gather)
    c = c.to(z_a.dtype)  # under autocast too: the next call may be outside of it
    if update_covariance_matrix:
        self.C = c
    elif self.C is None:
        self.C = torch.zeros_like(c)
    return in_dtype_of(z_a, _value_of_all_ranks(loss) if gather else loss)


def _value_of_all_ranks(loss: Tensor) -> Tensor:
    """A rank's part of a mean over ranks, with the mean as its value: lightly's ranks all compute the whole."""
    mine = loss.detach()
    return loss + (scope_of(True).total(mine) / torch.distributed.get_world_size() - mine)


def fast_mmcr(self: Any, online: Tensor, momentum: Tensor) -> Tensor | Unserved:
    unserved = unserved_tensors(online, momentum, dim=3, same_shape=True)
    if unserved:
        return unserved
    if torch.float64 in (online.dtype, momentum.dtype):
        return Unserved("float64, half of whose digits a Gram matrix loses in small singular values")
    if not is_number(self.lmda) or self.lmda < 0:
        return Unserved("lmda that is no number from 0 on")
    return in_dtype_of(online, mmcr(online, momentum, self.lmda))


def _unserved_views_of_samples(z_views: Any) -> Unserved | None:
    if not isinstance(z_views, (list, tuple)) or len(z_views) < 2:
        return Unserved("z_views that are no list of two views or more")
    return unserved_matrices(*z_views)


def fast_frossl(self: Any, z_views: list[Tensor]) -> Tensor | Unserved:
    unserved = _unserved_views_of_samples(z_views)
    return unserved or in_dtype_of(z_views[0], frossl(z_views, self.invariance_weight))


def fast_emp_ssl(self: Any, z_views: list[Tensor]) -> Tensor | Unserved:
    unserved = _unserved_views_of_samples(z_views) or _unserved_eps(self.tcr_eps)
    if unserved:
        return unserved
    if not is_number(self.inv_coef):
        return Unserved("inv_coef that is no number")
    return emp_ssl(z_views, self.tcr_eps, self.inv_coef)  # float32 of 16-bit views, as lightly's


def _unserved_whitening(layer: Any, rows: int, width: int) -> Unserved | None:
    if width != layer.num_features:
        return Unserved("another number of features than num_features")
    if not is_number(layer.eps) or not is_number(layer.momentum):
        return Unserved("eps or momentum that is no number")
    return ONE_ROW if rows < 2 and (layer.training or not layer.track_running_stats) else None


def _whiten(layer: Any, x: Tensor) -> Tensor:
    """``x`` [S, w, D] by lightly's layer: its buffers move."""
    running = (layer.running_mean, layer.running_variance) if layer.track_running_stats else None
    white = whiten(x, running, training=layer.training, momentum=layer.momentum, eps=layer.eps)
    return in_dtype_of(x, white)


def fast_whitening(self: Any, x: Tensor) -> Tensor | Unserved:
    unserved = unserved_matrices(x) or _unserved_whitening(self, *x.shape)
    return unserved or _whiten(self, x.unsqueeze(0)).squeeze(0)


def fast_w_mse(self: Any, input: Tensor) -> Tensor | Unserved:
    unserved = (
        unserved_matrices(input)
        or overridden(self.whitening, wmse_loss.Whitening2d, "forward")
        or _unserved_whitening(self.whitening, self.w_size, input.shape[1])
    )
    if unserved:
        return unserved
    if not is_unhooked(self.whitening):
        return Unserved("hooks on whitening, which is called for each sub-batch")
    rows, views = input.shape[0], self.num_samples
    if views < 2 or self.w_iter < 1 or rows % views or rows // views < self.w_size or rows // views % self.w_size:
        return Unserved("rows that are not num_samples times a multiple of w_size")
    loss = torch.tensor(0.0, device=input.device, requires_grad=True)  # lightly's: it can always be differentiated
    for white_i, white_j in whitened_pairs(
        input,
        lambda x: _whiten(self.whitening, x),
        w_size=self.w_size,
        w_iter=self.w_iter,
        num_samples=views,
    ):
        loss = loss + self.loss_f(white_i, white_j)
    return loss / (self.w_iter * self.num_pairs)
