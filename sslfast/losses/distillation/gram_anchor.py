"""Gram anchoring (DINOv3): a student's patch similarities are held to those of an earlier teacher."""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import check_same, check_tokens
from ...ops.gram_anchor import NEGATIVES, gram_anchor as by_images
from .._inputs import in_one_dtype


def gram_anchor(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    per_image: bool = True,
    negatives: str = "clamp",
) -> Tensor:
    """The mean square of the differences of two Gram matrices, without either in memory.

        loss = mean_{b,i,j} (f(x̂_bi·x̂_bj) − h(ŷ_bi·ŷ_bj))²

    Args:
        student: x [B, P, D], patch features; float32, float64, bfloat16 or float16.
        teacher: y [B, P, D], those of the Gram teacher, on the student's grid (features of larger images are resized
            before); **detached here**.
        normalize: divide each row by max(‖row‖₂, 1e-12) first (default).
        per_image: similarities within each image (default); ``False``: of all B·P rows with each other.
        negatives: of similarities: ``"clamp"`` both at 0 (f = h = max(·, 0), default), ``"clamp_teacher"`` h alone, or
            ``"keep"``. DINOv3's trainer keeps them; its class clamps.

    Returns:
        [] float32 (float64 for float64 inputs). The gradient is made in the forward where the student requires one, and
        kept, [B, P, D] in the dtype of sums.

    The mean is over this rank's images, as in the authors' code.

    Raises:
        TypeError, ValueError: student and teacher are not [B, P, D] of one shape, dtype and device, or empty;
            ``negatives`` is none of the three.

    Source: Siméoni et al. 2025, "DINOv3", section 4.2, as a mean.

    Example:
        >>> x = torch.eye(4).unsqueeze(0)
        >>> sslfast.gram_anchor(x, x).item()
        0.0
        >>> sslfast.gram_anchor(x, torch.ones(1, 4, 4)).item()  # 12 of 16 similarities are off by 1
        0.75
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(NEGATIVES)}, got {negatives!r}")
    for name, x in (("student", student), ("teacher", teacher)):
        check_tokens(name, x)
        if x.numel() == 0:
            raise ValueError(f"{name} must have at least one image and one row, got shape {tuple(x.shape)}")
    first, second = in_one_dtype(student, teacher)
    assert first is not None and second is not None
    check_same("student", first, "teacher", second)
    if not per_image:
        first, second = (t.flatten(0, 1).unsqueeze(0) for t in (first, second))
    return by_images(first, second, normalize, negatives)


class GramLoss(nn.Module):
    """The module form of :func:`gram_anchor`, with the constructor and ``forward`` of DINOv3's class.

    Args:
        apply_norm: ``normalize`` of :func:`gram_anchor`.
        img_level: its ``per_image``. DINOv3's class takes it and ignores it: there only ``forward``'s counts.
        remove_neg: clamp negative similarities of both sides (default).
        remove_only_teacher_neg: clamp the teacher's alone; needs ``remove_neg=False``. DINOv3's line that is meant for
            the student, where both are negative, has no effect there, for the teacher's are 0 by then: nor here.

    Shapes:
        ``output_feats``, ``target_feats``: [B, P, D], or without ``img_level`` [B·P, D] too; output: [].

    Raises:
        As :func:`gram_anchor`; ValueError where both are removed.

    Example:
        >>> criterion = sslfast.GramLoss(remove_neg=False)
        >>> criterion(torch.eye(4)[None], torch.ones(1, 4, 4)).item()
        0.75
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError(
                "remove_neg=True removes the teacher's too: remove_only_teacher_neg=True needs False there"
            )
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool | None = None) -> Tensor:
        """The loss of the student's and the Gram teacher's features; ``img_level``: for this call."""
        per_image = self.img_level if img_level is None else img_level
        negatives = "clamp" if self.remove_neg else "clamp_teacher" if self.remove_only_teacher_neg else "keep"
        if not per_image and all(isinstance(t, Tensor) and t.dim() == 2 for t in (output_feats, target_feats)):
            output_feats, target_feats = output_feats.unsqueeze(0), target_feats.unsqueeze(0)
        return gram_anchor(
            output_feats, target_feats, normalize=self.apply_norm, per_image=per_image, negatives=negatives
        )

    def extra_repr(self) -> str:
        return (
            f"apply_norm={self.apply_norm}, img_level={self.img_level}, remove_neg={self.remove_neg}, "
            f"remove_only_teacher_neg={self.remove_only_teacher_neg}"
        )
