"""Patch kernel alignment: the student's token kernel of each image is held to the teacher's, up to scale and rotation.

With S = X Xᵀ and T = Y Yᵀ of the centred tokens X, Y [N, D] of an image

    ⟨S, T⟩ = ‖XᵀY‖²_F,   ‖S‖²_F = ‖XᵀX‖²_F,   S X = X (XᵀX),   T X = Y (YᵀX)

so that value and gradient come from matrices of N × N or of D × D, whichever are smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _library
from ..._checks import accumulator, check_same, check_tokens, whole_number, without_autocast
from .._inputs import in_one_dtype

EPS = 1e-6  # lower bound of the squared norm of a kernel


class _Products(NamedTuple):
    """Of centred x, y [B, N, D] those matrices whose squares are the three sums; all of N × N, or all of D × D."""

    own: Tensor  # S, or XᵀX
    teacher: Tensor  # T, or YᵀY
    cross: tuple[Tensor, Tensor]  # S and T, or XᵀY twice: their product is summed

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """⟨S, T⟩, ‖S‖², ‖T‖² [B]; the latter two are at least EPS."""
        cross, own, teacher = (
            (a * b).sum((1, 2)) for a, b in (self.cross, (self.own, self.own), (self.teacher, self.teacher))
        )
        return cross, own.clamp_min(EPS), teacher.clamp_min(EPS)


def _products(x: Tensor, y: Tensor) -> _Products:
    if x.shape[1] <= x.shape[2]:
        s, t = x @ x.mT, y @ y.mT
        return _Products(s, t, (s, t))
    c = x.mT @ y
    return _Products(x.mT @ x, y.mT @ y, (c, c))


def _centred(x: Tensor, valid: Tensor | None) -> Tensor:
    """The tokens [B, N, D] less their image's mean; those that are not ``valid`` [B, N, 1] are zero."""
    if valid is None:
        return x - x.mean(1, keepdim=True)
    x = torch.where(valid, x, 0)
    mean = x.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    return torch.where(valid, x - mean, 0)


def _plain(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """1 − CKA of each image [B], differentiable as often as one likes."""
    kind = accumulator(x)
    cross, own, teacher = _products(*(_centred(t.to(kind), valid) for t in (x, y))).sums()
    return 1 - cross / (own.sqrt() * teacher.sqrt())


class _Alignment(torch.autograd.Function):
    """1 − CKA of each image [B] of the tokens x, y [B, N, D], and its gradient in x.

    With r = 1/(‖S‖ ‖T‖) the gradient is ``W X``, ``W = 2 r (⟨S, T⟩/‖S‖² S − T)`` [N, N], twice the derivative in
    S. Its rows sum to zero, so that it is also the gradient in tokens that are not centred.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
        kind = accumulator(x)
        own, other = (_centred(t.to(kind), valid) for t in (x, y))
        products = _products(own, other)
        cross, s, t = products.sums()
        r = (s.sqrt() * t.sqrt()).reciprocal()
        alignment = cross * r
        if x.requires_grad:
            of_s = torch.where(s > EPS, 2 * alignment / s, 0)[:, None, None]  # a norm below its bound is a constant
            of_t = (-2 * r)[:, None, None]
            weights = products.own.mul_(of_s)
            if x.shape[1] <= x.shape[2]:
                ctx.save_for_backward(x, y, valid, own, weights.addcmul_(products.teacher, of_t))
            else:
                ctx.save_for_backward(x, y, valid, own, weights, other, products.cross[0].mT * of_t)
        return 1 - alignment

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, y, valid, own, w, *others = ctx.saved_tensors
        with without_autocast(x):
            if torch.is_grad_enabled():
                (found,) = _library.second_order(lambda x: _plain(x, y, valid), (x,), (True,), grad)
                return found, None, None
            dx = torch.baddbmm(own @ w, *others) if others else w @ own
            return dx.mul_(grad[:, None, None]).to(x.dtype), None, None


def _checked(
    student: Tensor, teacher: Tensor, mask: Tensor | None, max_tokens: int | None
) -> tuple[Tensor, Tensor, int | None]:
    for name, x in (("student", student), ("teacher", teacher)):
        check_tokens(name, x)
        if x.numel() == 0:
            raise ValueError(f"{name} must have at least one image and one token, got shape {tuple(x.shape)}")
    first, second = in_one_dtype(student, teacher)
    assert first is not None and second is not None
    check_same("student", first, "teacher", second)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else mask!r}")
        if mask.shape != first.shape[:2] or mask.device != first.device:
            raise ValueError(
                f"mask must have shape {tuple(first.shape[:2])} on {first.device}, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
    return first, second.detach(), _checked_most(max_tokens)


def _checked_most(max_tokens: int | None) -> int | None:
    return None if max_tokens is None else whole_number("max_tokens", max_tokens, 2)


def _sampled(most: int, mask: Tensor | None, *tokens: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """``most`` tokens of each image, at random, those that the mask leaves before others; and their part of it."""
    images, count, _ = tokens[0].shape
    scores = torch.rand(images, count, device=tokens[0].device)
    if mask is not None:
        scores = scores.masked_fill(mask, torch.inf)
    index = scores.topk(most, dim=1, largest=False).indices  # [B, most]
    rows = index.unsqueeze(2)
    return (
        None if mask is None else mask.gather(1, index),
        [x.gather(1, rows.expand(-1, -1, x.shape[2])) for x in tokens],
    )


def patch_kernel_alignment(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, max_tokens: int | None = None
) -> Tensor:
    """One minus the centred kernel alignment (CKA) of the student's and the teacher's tokens, mean over images.

        S = X Xᵀ,   T = Y Yᵀ   of the tokens of an image less their mean
        loss = mean_b 1 − ⟨S, T⟩ / (‖S‖_F ‖T‖_F)

    It is 0 where one image's features are a rotation of the other's, times a number. Every norm is at least 1e-3.

    Args:
        student: x [B, N, D]; float32, float64, bfloat16 or float16.
        teacher: y [B, N, D], token ``n`` of the same place as the student's; **detached here**.
        mask: [B, N] bool, true for tokens that are ignored, whatever they hold (default: none).
        max_tokens: at least 2; of more tokens so many are drawn in each image, from the default generator, and ignored
            ones only where the others do not suffice (default: all take part).

    Returns:
        [] float32 (float64 for float64 inputs): the mean over this rank's images with at least two tokens that are not
        ignored; 0 without any. The gradient is the student's alone.

    Raises:
        TypeError, ValueError: student and teacher are not [B, N, D] of one shape, dtype and device, or are empty; the
            mask is no bool tensor [B, N] on their device; max_tokens is no whole number of at least 2.

    Source: Yeo et al. 2025, "Patch-Level Kernel Alignment for Dense Self-Supervised Learning" (arXiv 2509.05606); CKA
    of Kornblith et al. 2019, equation 4; value as lightly 1.6.0's ``PatchKernelAlignmentLoss``.

    Example:
        >>> x = torch.eye(4)[:, :3].unsqueeze(0)
        >>> abs(sslfast.patch_kernel_alignment(x, 2 * x.flip(2)).item()) < 1e-6
        True
        >>> round(sslfast.patch_kernel_alignment(x, x.flip(1)).item(), 4)  # 1 − 25/33
        0.2424
    """
    student, teacher, most = _checked(student, teacher, mask, max_tokens)
    if most is not None and student.shape[1] > most:
        mask, (student, teacher) = _sampled(most, mask, student, teacher)
    with without_autocast(student):
        valid = None if mask is None else ~mask.unsqueeze(2)
        if _library.in_forward_mode():
            losses = _plain(student, teacher, valid)
        else:
            losses = _Alignment.apply(student, teacher, valid)  # type: ignore[no-untyped-call]
        if valid is None:
            return losses.mean() if student.shape[1] > 1 else losses.sum() * 0
        counted = valid.sum((1, 2)) > 1
        return torch.where(counted, losses, 0).sum() / counted.sum().clamp_min(1)


class PatchKernelAlignmentLoss(nn.Module):
    """The module form of :func:`patch_kernel_alignment`, with the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        max_tokens: as :func:`patch_kernel_alignment` (default: all tokens).

    Shapes:
        ``student_features``, ``teacher_features``: [B, N, D]; ``mask``: [B, N] bool, or ``None``; output: [].

    Raises:
        As :func:`patch_kernel_alignment`.

    Example:
        >>> criterion = sslfast.PatchKernelAlignmentLoss()
        >>> x = torch.eye(4)[:, :3].unsqueeze(0)
        >>> round(criterion(x, x.flip(1)).item(), 4)
        0.2424
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        super().__init__()
        self.max_tokens = _checked_most(max_tokens)

    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of the student's and the teacher's tokens."""
        return patch_kernel_alignment(student_features, teacher_features, mask, max_tokens=self.max_tokens)

    def extra_repr(self) -> str:
        return f"max_tokens={self.max_tokens}"
