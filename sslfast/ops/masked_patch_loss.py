"""The loss of predicted patches, read off the images themselves: masked patches alone, forward and backward.

    loss = 1/M Σ_masked 1/n Σ_d ℓ(pred_d − target_d),      dpred_d = g/(M·n) · ℓ'(pred_d − target_d)

over the n values of each of the M masked patches. The target is made in the cache, patch by patch: no patch is copied,
none that is not masked is read, and the backward makes the targets again from the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _library, reference
from .._checks import FLOATS, accumulator, ids_checked, without_autocast
from . import _devices
from ._patches import channel_numbers, check_images, length_of, patch_sides

BACKENDS = ("cpu", "cuda", "reference")
LOSSES = ("mse", "l1")
TARGETS = ("pixels", "mae", "videomae")
ORDERS = ("channels_first", "channels_last")
# A CUDA block keeps the target of its patch in shared memory.
LARGEST_ON_CUDA = 46 << 10  # bytes


def _forward_fake(images: Tensor, pred: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kind = accumulator(pred)
    return pred.new_empty((), dtype=kind), pred.new_empty((), dtype=kind)


def _backward_fake(grad_loss: Tensor, images: Tensor, pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, pred, index, *ctx.options = inputs
    ctx.save_for_backward(images, pred, index, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if grad_loss is None or not ctx.needs_input_grad[1]:
        return nothing
    images, pred, index, count = ctx.saved_tensors
    if torch.is_grad_enabled() and (pred.requires_grad or grad_loss.requires_grad):

        def function(pred: Tensor) -> Tensor:
            return by_reference(images, pred, index, *ctx.options)

        (dpred,) = _library.second_order(function, (pred,), (True,), grad_loss)
    else:
        dpred = torch.ops.sslfast.masked_patch_loss_backward(grad_loss, images, pred, index, count, *ctx.options)
    return (None, dpred, *nothing[2:])


_OPTIONS = "int[] patch, int kind, int target, float[] mean, float[] std, bool channels_inner"
_library.define(
    f"masked_patch_loss(Tensor images, Tensor pred, Tensor index, {_OPTIONS}) -> (Tensor loss, Tensor count)",
    _forward_fake,
)
_library.define(
    "masked_patch_loss_backward(Tensor grad_loss, Tensor images, Tensor pred, Tensor index, Tensor count,"
    f" {_OPTIONS}) -> Tensor",
    _backward_fake,
)
_library.autograd("masked_patch_loss", _backward, _setup_context)


def by_reference(
    images: Tensor,
    pred: Tensor,
    index: Tensor,
    patch: Sequence[int],
    kind: int,
    target: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels_inner: bool,
) -> Tensor:
    """The reference with the kernels' precision, bytes as shares of 255, also inside an autocast region."""
    wide = accumulator(pred)
    with without_autocast(pred):
        x = images.to(wide) / 255 if images.dtype == torch.uint8 else images.to(wide)
        return reference.masked_patch_loss(
            x, pred.to(wide), index, patch, LOSSES[kind], TARGETS[target], mean, std, channels_inner
        )


def why_not(backend: str, pred: Tensor) -> str | None:
    """The reason ``backend`` cannot serve ``pred``, or ``None`` if it can."""
    if backend == "cuda" and pred.is_cuda and pred.shape[-1] * accumulator(pred).itemsize > LARGEST_ON_CUDA:
        return f"a patch of {pred.shape[-1]} values does not fit the shared memory of a block"
    return _devices.why_not("masked_patch_loss", "pred", backend, pred)


class _Images(NamedTuple):
    """Checked images [B, C, T, H, W] and how they are cut."""

    x: Tensor
    patch: tuple[int, ...]  # (pt, ph, pw)
    cells: int  # L
    width: int  # values of a patch
    mean: list[float]
    std: list[float]


def _checked_images(
    images: Tensor,
    patch_size: int | Sequence[int],
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
) -> _Images:
    check_images(images)
    patch = patch_sides(patch_size, images.shape[2:])
    channels = images.shape[1]
    x = images.detach() if images.dim() == 5 else images.detach().unsqueeze(2)
    numbers = (channel_numbers("mean", mean, channels), channel_numbers("std", std, channels))
    return _Images(x, tuple(patch), length_of(x.shape[2:], patch), channels * math.prod(patch), *numbers)


def _checked_index(masks: Any, pred: Tensor, count: int) -> Tensor:
    """``masks`` as a bool [B, L] for predictions of all patches, or ids [B, M] for those of the masked ones alone."""
    index = getattr(masks, "ids_mask", masks)
    if not isinstance(index, Tensor):
        raise TypeError(f"masks must be Masks or a torch.Tensor, got {type(masks).__name__}")
    if index.device != pred.device:
        raise ValueError(f"masks must be on pred's device {pred.device}, got {index.device}")
    batch, rows = pred.shape[:2]
    if index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(f"masks must be [{batch}, {count}], or ids [{batch}, M], got shape {tuple(index.shape)}")
    checked = ids_checked(index)
    if index.dtype == torch.int64:
        if checked and index.numel():
            low, high = (int(i) for i in torch.aminmax(index))
            if low < 0 or high >= count:
                raise ValueError(f"masks must hold patches, 0 to {count - 1}, got {low} to {high}")
        if rows == index.shape[1]:
            if checked and index.shape[1] > 1:
                ordered = index.sort(dim=1).values
                if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                    raise ValueError("masks must not hold a patch of an image twice (a mask is of bool, not of int64)")
            return index
        _check_rows(rows, count, f"{count} patches, or of the {index.shape[1]} masked ones")
        mask = torch.zeros(batch, count, dtype=torch.bool, device=index.device).scatter_(1, index, True)
        if checked and int(mask.sum()) != index.numel():
            raise ValueError("masks must not hold a patch of an image twice")
        return mask
    if index.dtype != torch.bool and not index.dtype.is_floating_point:
        raise TypeError(f"masks must be bool, floating point of 0 and 1, or int64 ids, got {index.dtype}")
    if index.shape[1] != count:
        raise ValueError(f"masks must be [{batch}, {count}], a row of the images' patches, got {tuple(index.shape)}")
    _check_rows(rows, count, f"{count} patches")
    if index.dtype == torch.bool:
        return index
    mask = index != 0
    if checked and not torch.equal(mask.to(index.dtype), index):
        raise ValueError("masks must be of 0 (kept) and 1 (masked) where they are floating point")
    return mask


def _check_rows(rows: int, count: int, wanted: str) -> None:
    if rows != count:
        raise ValueError(f"pred must have a row for each of {wanted}, got {rows}")


def masked_patch_loss(
    images: Tensor,
    pred: Tensor,
    masks: Any,
    *,
    patch_size: int | Sequence[int],
    loss: str = "mse",
    target: str = "pixels",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    order: str = "channels_last",
) -> Tensor:
    """Mean loss of predicted patches over the masked ones, with pixels or normalised pixels as the target.

    The mean over a patch's values, then over all masked patches of the batch. Patches are cut from the image as the
    loss goes: no patchified copy, and nothing is read or computed for a patch that is not masked (there ``pred`` may be
    anything, NaN too). Without a masked patch the loss is NaN, as the mean of nothing, with zero gradient.

    Args:
        images: [B, C, H, W] or [B, C, T, H, W]; uint8 (shares of 255), float32, float64, bfloat16 or float16; any
            strides. They receive no gradient.
        pred: [B, L, n] for all L patches in raster order, or [B, M, n] for the masked ones alone, in the order of
            their ids; ``n`` values a patch; float32, float64, bfloat16 or float16. A slice of rows, as of a sequence
            without its class token, is read where it lies.
        masks: [B, L] bool, True where masked; or the same in floating point, 1 where masked (MAE's); or ids [B, M]
            int64 of the masked patches, without repetition; or :class:`Masks`. Values are checked on the CPU, and on
            a GPU with ``SSLFAST_CHECK_IDS=1``. As many ids as patches with ``pred`` of as many rows: row k is patch
            ``ids[b, k]``.
        patch_size: p or (ph, pw) for images, (pt, ph, pw) for video; divides the size.
        loss: "mse" (default) or "l1".
        target: "pixels" (default); "mae", the patch's pixels less their mean, divided by ``sqrt(var + 1e-6)``;
            "videomae", each channel of the patch less its mean, divided by ``sqrt(var) + 1e-6``. Variances are
            unbiased.
        mean, std: one number, or one a channel; ``(images − mean) / std`` comes first (default: as they are). What an
            image was normalised with is undone by ``-mean / std`` and ``1 / std``.
        order: of a patch's values, "channels_last" (default; (pt, ph, pw, C), as MAE and VideoMAE) or
            "channels_first" ((C, pt, ph, pw), as a convolution's weight and as PixelShuffle reads its channels).

    Returns:
        [] float32 (float64 for float64 ``pred``). Differentiable in ``pred``, twice through the reference.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit; it is named.

    SimMIM: with ``z`` [B, C·p², H/p, W/p] what its PixelShuffle takes and the mask of its p × p units,
    ``masked_patch_loss(images, z.flatten(2).transpose(1, 2), mask, patch_size=p, loss="l1", order="channels_first")``.
    SimMIM divides by the number of masked pixels plus 1e-5, which float32 cannot tell from this from 170 pixels on.

    Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", section 3, and ``forward_loss`` of
    facebookresearch/mae; Tong et al. 2022, "VideoMAE", and MCG-NJU/VideoMAE; Xie et al. 2022, "SimMIM".

    Example:
        >>> images, pred = torch.ones(2, 3, 32, 32), torch.zeros(2, 4, 768)
        >>> masks = torch.tensor([[True, False, False, True], [False, True, True, False]])
        >>> sslfast.masked_patch_loss(images, pred, masks, patch_size=16).item()
        1.0
    """
    for name, value, allowed in (("loss", loss, LOSSES), ("target", target, TARGETS), ("order", order, ORDERS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    source = _checked_images(images, patch_size, mean, std)
    if not isinstance(pred, Tensor):
        raise TypeError(f"pred must be a torch.Tensor, got {type(pred).__name__}")
    if pred.dtype not in FLOATS:
        raise TypeError(f"pred must be float32, float64, bfloat16 or float16, got {pred.dtype}")
    if pred.dim() != 3 or pred.shape[0] != images.shape[0] or pred.shape[2] != source.width:
        raise ValueError(
            f"pred must be [{images.shape[0]}, patches, {source.width}] for these images and patches, "
            f"got shape {tuple(pred.shape)}"
        )
    if pred.device != images.device:
        raise ValueError(f"images and pred must be on the same device, got {images.device} and {pred.device}")
    index = _checked_index(masks, pred, source.cells)
    backend = _backends.serve("masked_patch_loss", pred, "cuda", why_not)
    options = (
        source.patch,
        LOSSES.index(loss),
        TARGETS.index(target),
        source.mean,
        source.std,
        order == "channels_last",
    )
    if backend == "reference":
        return by_reference(source.x, pred, index, *options)
    result: Tensor = _library.run("masked_patch_loss", source.x, pred, index, *options)[0]
    return result
