"""The loss of predicted features at masked positions, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from ...ops.masked_feature_loss import LOSSES, masked_feature_loss


class MaskedFeatureLoss(nn.Module):
    """The module form of :func:`sslfast.masked_feature_loss`, for I-JEPA (for V-JEPA with ``beta=0``).

    Args:
        loss, beta, layer_norm, eps: as the function takes them.

    Shapes:
        ``pred`` [S, B, K, D], [S·B, K, D] or [B, K, D]; ``teacher`` [B, L, D]; ``ids`` [S, B, K] or [B, K]; output: [].

    Raises:
        As :func:`sslfast.masked_feature_loss`.

    Example:
        >>> criterion = sslfast.MaskedFeatureLoss(layer_norm=False)
        >>> ids = torch.tensor([[0, 2], [1, 3]])  # of two images
        >>> criterion(torch.zeros(2, 2, 8), torch.ones(2, 4, 8), ids).item()
        0.5
    """

    def __init__(
        self, loss: str = "smooth_l1", *, beta: float = 1.0, layer_norm: bool = True, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
        self.loss = loss
        self.beta = beta
        self.layer_norm = layer_norm
        self.eps = eps

    def forward(self, pred: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """The loss of the predictions against the teacher's rows ``ids``."""
        return masked_feature_loss(
            pred, teacher, ids, loss=self.loss, beta=self.beta, layer_norm=self.layer_norm, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}, beta={self.beta}, layer_norm={self.layer_norm}"
