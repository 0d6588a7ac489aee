"""The fast form of lightly's SIGReg, which LeJEPA and LeWM call too."""

from __future__ import annotations

from typing import Any

import lightly.loss.lejepa_loss as lejepa_loss
import torch
from torch import Tensor

from .._checks import accumulator, readable, without_autocast
from ..distributed.choose import scope_of
from ..losses.decorrelation.sigreg import distance
from ..ops.characteristic_sums import characteristic_sums
from ._lightly_contrastive import gathers
from ._serve import Unserved, overridden, unserved_tensors

_HOOKS = (
    "_project_embeddings_to_unit_vector",
    "_compute_cf_error_at_each_frequency",
    "_integrate_via_trapezoidal_rule",
)


def _unserved_frequencies(loss: Any, proj: Tensor) -> Unserved | None:
    """Frequencies that are not lightly's, equally spaced from 0; values are looked at where nothing waits for it."""
    t, phi, weights = loss.t, loss.phi, loss.weights
    unserved = unserved_tensors(t, phi, weights, dim=1, same_shape=True)
    if unserved or t.device != proj.device or len(t) < 2 or t.requires_grad or phi.requires_grad:
        return unserved or Unserved("t, phi or weights of another kind or on another device")
    if readable(t) and not torch.allclose(t, torch.linspace(0, float(t[-1]), len(t), dtype=t.dtype), rtol=1e-2):
        return Unserved("frequencies that are not equally spaced from 0")
    return None


def fast_sigreg(self: Any, proj: Tensor) -> Tensor | Unserved:
    dim = proj.dim() if isinstance(proj, Tensor) else 2
    unserved = (
        overridden(self, lejepa_loss.SIGReg, *_HOOKS)
        or unserved_tensors(proj, dim=max(dim, 2))
        or _unserved_frequencies(self, proj)
    )
    if unserved:
        return unserved
    kind = accumulator(proj)
    views = proj.flatten(0, -3) if dim > 3 else proj if dim == 3 else proj.unsqueeze(0)  # [V, N, D]
    scope = scope_of(gathers(self))
    rows = scope.shard(views.transpose(0, 1)).total
    slices = self._generate_unit_vectors(proj.device, proj.dtype, proj.shape[-1])
    with without_autocast(proj):
        t, phi, weights = (x.to(kind) for x in (self.t, self.phi, self.weights))
        # The step is a number on the device: it scales the slices, and nothing waits for it.
        sums = scope.total(characteristic_sums(views, slices.to(kind) * t[1], len(t) - 1, 1.0))
        target = torch.stack([-phi[1:], torch.zeros_like(phi[1:])]).view(2, 1, -1, 1)
        total = distance(sums, target, weights[1:].unsqueeze(1), rows) * (rows / (len(views) * slices.shape[1]))
    # lightly's product with the float32 frequencies makes a loss of their dtype of 16-bit embeddings.
    if torch.is_autocast_enabled(proj.device.type):
        return total
    return total.to(torch.promote_types(proj.dtype, self.t.dtype))
