"""open_clip's losses (``open_clip.loss``) with sslfast's kernels in them.

Over several ranks the value is open_clip's, and the gradient is that of the global batch under DDP's average whatever
``local_loss`` and ``gather_with_grad`` say: they choose what is reported, not what is learned.
"""

from __future__ import annotations

from typing import Any

import open_clip.loss as upstream
import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import FLOATS
from ..distributed.choose import scope_of
from ..losses.contrastive.clip import clip
from ..losses.contrastive.sig_lip import sig_lip
from ._serve import Package, Unserved, overridden, served, unserved_matrices

_Loss = Tensor | dict[str, Tensor] | Unserved


METHODS = ("get_logits", "get_ground_truth")


def _unserved_inputs(
    loss: Any, image_features: Any, text_features: Any, logit_scale: Any, logit_bias: Any
) -> Unserved | None:
    return (
        unserved_matrices(image_features, text_features)
        or _unserved_number("logit_scale", logit_scale, image_features)
        or (None if logit_bias is None else _unserved_number("logit_bias", logit_bias, image_features))
        or _unserved_ranks(loss)
    )


def _clip(
    self: Any,
    image_features: Any,
    text_features: Any,
    logit_scale: Any,
    logit_bias: Any = None,
    output_dict: Any = False,
) -> _Loss:
    unserved = overridden(self, upstream.ClipLoss, *METHODS) or _unserved_inputs(
        self, image_features, text_features, logit_scale, logit_bias
    )
    if unserved:
        return unserved
    several = self.world_size > 1
    loss = clip(image_features, text_features, logit_scale, logit_bias, gather_distributed=several)
    assert isinstance(loss, Tensor)
    if several and not self.local_loss:  # every rank reports the loss of the global batch
        loss = scope_of(True).total(loss) / self.world_size
    return {"contrastive_loss": loss} if output_dict else loss


def _sig_lip(
    self: Any, image_features: Any, text_features: Any, logit_scale: Any, logit_bias: Any, output_dict: Any = False
) -> _Loss:
    unserved = overridden(self, upstream.SigLipLoss, *METHODS, "_loss") or _unserved_inputs(
        self, image_features, text_features, logit_scale, logit_bias
    )
    if unserved:
        return unserved
    # As there, a rank that sends round a ring never holds the texts of all.
    strategy = "ring" if self.dist_impl in ("bidir", "shift") else "gather"
    loss = sig_lip(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        gather_distributed=self.world_size > 1,
        strategy=strategy,
    )
    return {"contrastive_loss": loss} if output_dict else loss


def _unserved_number(name: str, value: object, like: Tensor) -> Unserved | None:
    """Why ``value`` is not one number beside ``like``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None
    if not isinstance(value, Tensor):
        return Unserved(f"{name} is no number but {type(value).__name__}")
    if value.numel() != 1 or value.dim() > 1 or value.dtype not in FLOATS:
        return Unserved(f"{name} of shape {tuple(value.shape)}, {value.dtype}")
    if value.device != like.device:
        return Unserved(f"{name} on another device than the features")
    # A number of shape [1] takes part in type promotion, which one of shape [] does not.
    widens = value.dim() == 1 and torch.promote_types(value.dtype, like.dtype) != like.dtype
    if widens and not torch.is_autocast_enabled(like.device.type):
        return Unserved(f"{name} of shape (1,), {value.dtype}, which is wider than the features' {like.dtype}")
    return None


def _unserved_ranks(loss: Any) -> Unserved | None:
    """Why the ranks that ``loss`` was told of are not those of torch.distributed."""
    if loss.world_size <= 1:
        return None
    if getattr(loss, "use_horovod", False):
        return Unserved("use_horovod=True")
    if not dist.is_available() or not dist.is_initialized():
        return Unserved("world_size > 1 without an initialised process group")
    if (dist.get_rank(), dist.get_world_size()) != (loss.rank, loss.world_size):
        return Unserved("its rank and world_size are not those of the process group")
    return None


class ClipLoss(upstream.ClipLoss):
    """``open_clip.ClipLoss``.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as there. Over several ranks
            ``local_loss=False`` (default) returns the global loss on every rank and ``True`` this rank's share of it;
            the gradients are the global batch's either way (open_clip's own are not, without ``gather_with_grad``:
            open_clip #616, #894), and every rank has to call ``backward``.

    Shapes:
        ``image_features``, ``text_features``: [N, D], normalised, float32, float64, bfloat16 or float16;
        ``logit_scale``, ``logit_bias``: a float or a one-element tensor. Output: [] float32 (float64 for float64), or
        ``{"contrastive_loss": []}`` with ``output_dict=True``.

    Raises:
        What open_clip raises.
    """

    forward = served(upstream.ClipLoss.forward, _clip)


class CoCaLoss(upstream.CoCaLoss, ClipLoss):
    """``open_clip.CoCaLoss``: its contrastive half is :class:`ClipLoss`, its caption half open_clip's own.

    Args, shapes, errors: as there.
    """


class SigLipLoss(upstream.SigLipLoss):
    """``open_clip.loss.SigLipLoss``.

    Args:
        cache_labels, rank, world_size, dist_impl (and ``chunk_size`` where the installed open_clip has it, which is not
            needed: no N×N matrix exists): as there. ``dist_impl`` ``"bidir"`` (default) and ``"shift"`` send texts
            round a ring, ``"gather"`` and ``"reduce"`` gather them.

    Shapes:
        As :class:`ClipLoss`.

    Raises:
        What open_clip raises.
    """

    forward = served(upstream.SigLipLoss.forward, _sig_lip)


def contents() -> Package:
    return Package(
        classes=(ClipLoss, CoCaLoss, SigLipLoss),
        unchanged={
            "CoCaLoss's caption loss": "a cross entropy over the vocabulary, with no matrix of pairs",
            "DistillClipLoss": "it needs both full pair matrices, the student's and the teacher's",
        },
    )
