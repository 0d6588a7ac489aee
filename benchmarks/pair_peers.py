"""Other packages' CLIP and SigLIP as plain functions of (image, text, scale[, bias]), for a case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import Unavailable
from .contrastive import Loss
from .harness import Case
from .peers import _import, _import_memeff, _import_torchvision, _needs_gpu


def _open_clip(name: str) -> Loss:
    _import_torchvision()
    return getattr(_import("open_clip.loss"), name)()


def open_clip_clip(case: Case) -> Loss:
    return _open_clip("ClipLoss")


def open_clip_sig_lip(case: Case) -> Loss:
    return _open_clip("SigLipLoss")


def torch_clip(case: Case) -> Loss:
    """PyTorch's own chunked cross-entropy of a product (2.13 and later), once for each direction."""
    linear_cross_entropy: Any = getattr(F, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    options: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    label = torch.arange(case.shape["N"], device=case.device)

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        scaled = scale.to(image.dtype) * image
        rows = linear_cross_entropy(scaled, text, label, options=options)
        return (rows + linear_cross_entropy(text, scaled, label, options=options)) / 2

    return clip


def liger_clip(case: Case) -> Loss:
    """Liger's fused linear cross-entropy, once for each direction."""
    _needs_gpu("liger-kernel")
    loss: Any = _import("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    label = torch.arange(case.shape["N"], device=case.device)

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        scaled = scale.to(image.dtype) * image
        return (loss(text, scaled, label) + loss(scaled, text, label)) / 2

    return clip


def memeff_clip(temperature: float) -> Loss:
    """Without a gradient of the scale, which is a Python number there; ``stable=False``: the value's own gradient."""
    return _import_memeff().MemoryEfficientCLIPLoss(temperature, normalized_inputs=True, stable=False)


def siglip_kernel(case: Case) -> Loss:
    _needs_gpu("siglip-kernel")
    loss = _import("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(image, text, scale.log(), bias)
