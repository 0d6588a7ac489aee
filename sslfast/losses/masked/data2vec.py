"""data2vec's regression: the student predicts, at masked positions, the mean of the teacher's last blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import FLOATS, accumulator, real_number, whole_number, without_autocast
from ...ops.masked_feature_loss import LOSSES, masked_feature_loss

# What is averaged of [B, L, D] to standardise it.
NORMS = {"none": (), "layer": (2,), "instance": (1,), "batch": (0, 1)}
EPS = 1e-5  # added to variances, as PyTorch's normalisations do

Layers = Tensor | Sequence[Tensor]


class Data2VecDiagnostics(NamedTuple):
    """Spreads over the masked positions of this rank, each [] float32 (float64 for float64 inputs), without gradient.

    The standard deviation of each feature, mean over the features, of the targets and of the predictions. The loss is
    small where both have collapsed to a constant; these are then near 0.001, the root of a floor of 1e-6 that is added
    to each variance. fairseq stops a run of data2vec 2.0 whose targets fall below 0.1 or predictions below 0.01.

    Example:
        >>> criterion = sslfast.Data2VecLoss(top_k=1, diagnostics=True)
        >>> loss, found = criterion(torch.zeros(2, 2, 8), [torch.ones(2, 4, 8)], torch.tensor([[0, 2], [1, 3]]))
        >>> round(found.target_std.item(), 4)
        0.001
    """

    target_std: Tensor
    prediction_std: Tensor


def data2vec(
    pred: Tensor,
    layers: Layers,
    ids: Tensor,
    *,
    top_k: int = 8,
    normalize_layers: str = "none",
    normalize_targets: str = "none",
    loss: str = "mse",
    beta: float = 1.0,
    scale: float | None = None,
) -> Tensor:
    """Regression of the mean of a teacher's last ``top_k`` blocks, summed over features, mean over masked positions.

        y = norm( 1/k Σ_j norm(layers_j) ),   the last k blocks
        loss = scale · mean over masked positions of Σ_d ℓ(pred_d − y_d),      scale = 1/√D

    One array of the mean is written; its rows are gathered, normalised and compared as they are read. Several masks of
    one teacher's forward (data2vec 2.0) share it.

    Args:
        pred: [S, B, K, D], predictions for S masks of each of B images, or [S·B, K, D]; [B, K, D] for one mask.
            float32, float64, bfloat16 or float16.
        layers: the teacher's block outputs, first to last, [B, L, D] each without class tokens, in a sequence or
            stacked [blocks, B, L, D]; any of these dtypes. No gradient.
        ids: [S, B, K] or [B, K] int64, the masked positions, as :func:`masked_feature_loss` takes them.
        top_k: k, how many of the last blocks count (default 8).
        normalize_layers: each block's output first, to mean 0 and variance 1: "none" (default); "layer", over the
            features of a position; "instance", over the positions of an image, feature by feature; "batch", over all
            positions of the batch.
        normalize_targets: their mean, likewise. data2vec 2.0's image models: "instance" blocks, "layer" targets.
        loss: "mse" (default; fairseq's ``loss_beta`` of 0) or "smooth_l1".
        beta: of the smooth L1 loss, as :func:`masked_feature_loss` (default 1; 0 makes it the L1 loss).
        scale: factor (default 1/√D).

    Returns:
        [] float32 (float64 for float64 ``pred``). Differentiable in ``pred``, twice through the reference. Without a
        position it is NaN, as the mean of nothing.

    Raises:
        TypeError, ValueError: an argument does not fit, or there are fewer than ``top_k`` layers; it is named.

    Source: Baevski et al. 2022, "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and
    Language", equation 2 and section 3.3; value as fairseq's data2vec_vision and data2vec_multi, the sum of the loss
    over the sample size.

    Example:
        >>> layers = [torch.zeros(2, 4, 16), torch.ones(2, 4, 16)]
        >>> ids = torch.tensor([[0, 2], [1, 3]])
        >>> sslfast.data2vec(torch.zeros(2, 2, 16), layers, ids, top_k=2).item()  # 16 · 0.5²/√16
        1.0
    """
    norms = _checked_norms(normalize_layers, normalize_targets)
    return _regression(pred, layers, ids, top_k, norms, (loss, beta, scale))[0]


def _regression(
    pred: Tensor,
    layers: Layers,
    ids: Tensor,
    top_k: int,
    norms: tuple[str, str],
    how: tuple[str, float, float | None],
    diagnostics: bool = False,
) -> tuple[Tensor, Data2VecDiagnostics | None]:
    """``norms``: of the layers and of the targets; ``how``: loss, beta and scale."""
    last = _checked_layers(layers, top_k, pred)
    (loss, beta, scale), width = how, last[0].shape[-1]
    factor = width * (1 / math.sqrt(width) if scale is None else real_number("scale", scale))
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, got {scale}")
    targets = _mean_of(last, norms[0], torch.promote_types(accumulator(last[0]), accumulator(pred)))
    by_row = norms[1] == "layer"  # as the rows are read
    targets = targets if by_row else _standardised(targets, norms[1])
    mean = masked_feature_loss(pred, targets, ids, loss=loss, beta=beta, layer_norm=by_row, eps=EPS)
    if not diagnostics:
        return factor * mean, None
    return factor * mean, _spreads(pred, _standardised(targets, "layer") if by_row else targets, ids)


@torch.no_grad()
def _mean_of(layers: list[Tensor], norm: str, kind: torch.dtype) -> Tensor:
    """The mean of normalised layers, [B, L, D] of dtype ``kind``."""
    total = torch.zeros_like(layers[0], dtype=kind)
    for layer in layers:
        total.add_(_standardised(layer.to(kind), norm) if norm != "none" else layer)
    return total.div_(len(layers))


def _standardised(x: Tensor, norm: str) -> Tensor:
    """``x`` [B, L, D] with mean 0 and variance 1 over what ``norm`` names."""
    if norm == "none":
        return x
    with without_autocast(x):
        if norm == "layer":
            return F.layer_norm(x, x.shape[-1:], eps=EPS)
        variance, mean = torch.var_mean(x, NORMS[norm], correction=0, keepdim=True)
        return (x - mean) * (variance + EPS).rsqrt()


def _checked_layers(layers: Layers, top_k: int, pred: Tensor) -> list[Tensor]:
    """The last ``top_k`` of the blocks' outputs, detached."""
    if not isinstance(pred, Tensor):
        raise TypeError(f"pred must be a torch.Tensor, got {type(pred).__name__}")
    count = whole_number("top_k", top_k, 1)
    if not isinstance(layers, (Tensor, Sequence)) or isinstance(layers, Tensor) and layers.dim() != 4:
        got = f"shape {tuple(layers.shape)}" if isinstance(layers, Tensor) else type(layers).__name__
        raise TypeError(f"layers must be a sequence of tensors [B, L, D], or one tensor [blocks, B, L, D], got {got}")
    if len(layers) < count:
        raise ValueError(f"layers must be at least top_k = {count} blocks' outputs, got {len(layers)}")
    last = list(layers[-count:])
    for x in last:
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            dtype = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"layers must be float32, float64, bfloat16 or float16 tensors, got {dtype}")
        if x.dim() != 3 or x.shape != last[0].shape:
            raise ValueError(
                f"layers must be [B, L, D], all of one shape, got {tuple(last[0].shape)} and {tuple(x.shape)}"
            )
        if x.device != pred.device:
            raise ValueError(f"layers must be on pred's device {pred.device}, got {x.device}")
    return [x.detach() for x in last]


def _checked_norms(of_layers: str, of_targets: str) -> tuple[str, str]:
    for name, norm in (("normalize_layers", of_layers), ("normalize_targets", of_targets)):
        if norm not in NORMS:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    return of_layers, of_targets


class Data2VecLoss(nn.Module):
    """The module form of :func:`data2vec`.

    Args:
        top_k, normalize_layers, normalize_targets, loss, beta, scale: as :func:`data2vec`.
        diagnostics: return :class:`Data2VecDiagnostics` beside the loss.

    Shapes:
        ``pred`` [S, B, K, D], [S·B, K, D] or [B, K, D]; ``layers``: a sequence of [B, L, D], or [blocks, B, L, D];
        ``ids`` [S, B, K] or [B, K]; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`data2vec`.

    Example:
        >>> criterion = sslfast.Data2VecLoss(top_k=2, normalize_layers="instance", normalize_targets="layer")
        >>> layers, ids = torch.ones(3, 2, 4, 16), torch.tensor([[0, 2], [1, 3]])
        >>> criterion(torch.ones(2, 2, 16), layers, ids).item()  # constant targets are 0
        4.0
    """

    def __init__(
        self,
        top_k: int = 8,
        *,
        normalize_layers: str = "none",
        normalize_targets: str = "none",
        loss: str = "mse",
        beta: float = 1.0,
        scale: float | None = None,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        _checked_norms(normalize_layers, normalize_targets)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        self.top_k = whole_number("top_k", top_k, 1)
        self.normalize_layers = normalize_layers
        self.normalize_targets = normalize_targets
        self.loss = loss
        self.beta = beta
        self.scale = scale
        self.diagnostics = diagnostics

    def forward(self, pred: Tensor, layers: Layers, ids: Tensor) -> Tensor | tuple[Tensor, Data2VecDiagnostics]:
        """The loss of the predictions against the mean of the last blocks at ``ids``."""
        norms = (self.normalize_layers, self.normalize_targets)
        how = (self.loss, self.beta, self.scale)
        loss, found = _regression(pred, layers, ids, self.top_k, norms, how, self.diagnostics)
        return loss if found is None else (loss, found)

    def extra_repr(self) -> str:
        return (
            f"top_k={self.top_k}, normalize_layers={self.normalize_layers!r}, "
            f"normalize_targets={self.normalize_targets!r}, loss={self.loss!r}, beta={self.beta}, scale={self.scale}"
        )


@torch.no_grad()
def _spreads(pred: Tensor, targets: Tensor, ids: Tensor) -> Data2VecDiagnostics:
    images = torch.arange(len(targets), device=ids.device)[:, None]
    rows = (targets[images, ids].flatten(0, -2), pred.flatten(0, -2).to(targets.dtype))  # [S·B·K, D] each
    return Data2VecDiagnostics(*((x.var(0) + 1e-6).sqrt().mean() for x in rows))
