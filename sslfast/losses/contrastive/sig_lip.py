"""SigLIP: the pairwise sigmoid loss over image–text pairs, value and gradient in one pass over the tiles."""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import scalar_tensor
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from .._inputs import NORMALIZE, check_gather, expect_unit_rows, two_views


@over_ranks("logit_scale", "logit_bias")
def sig_lip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Sigmoid loss of image–text similarities, ``s_ij = logit_scale · I_i·T_j + logit_bias``.

        loss = −(1/N) Σ_ij log σ(y_ij s_ij),   y_ij = +1 where i = j, else −1

    Args:
        image_features, text_features: [N, D], row ``i`` of each the same pair; float32, float64, bfloat16 or float16,
            the same for both (inside an autocast region the wider one is used). Used as they are: normalise first
            (:func:`sslfast.l2_normalize`).
        logit_scale: multiplies the dot products (``1/τ``, already exponentiated); a float, or a one-element tensor,
            which receives its gradient.
        logit_bias: added to every logit (default ``None``: 0; the paper starts at −10); a float, or a one-element
            tensor, which receives its gradient.
        gather_distributed: contrast with the pairs of all ranks; ``False``: this rank's alone.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values is the loss of the global
        batch, divided by the global number of pairs.

    Raises:
        TypeError, ValueError: the features are not two matrices of the same shape, dtype and device with at least one
            row and one feature; logit_scale or logit_bias is not one number.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.

    Example:
        >>> loss = sslfast.sig_lip(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-5.0)
        >>> round(loss.item(), 4)
        0.0269
    """
    image_features, text_features = two_views(
        "image_features", image_features, "text_features", text_features, normalize=False
    )
    expect_unit_rows("sig_lip", NORMALIZE, image_features=image_features, text_features=text_features)
    scale = scalar_tensor("logit_scale", logit_scale, image_features)
    bias = scalar_tensor("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
    scope = scope_of(gather_distributed, strategy)
    shard = scope.shard(image_features)
    ids = shard.ids(image_features.device)
    total = scope.similarity_logsigmoid(image_features, text_features, scale, bias, row_ids=ids, col_ids=ids)
    return shard.weight * total


class SigLipLoss(nn.Module):
    """The module form of :func:`sig_lip`, with the ``forward`` of open_clip's class of this name.

    Args:
        gather_distributed: contrast with the pairs of all ranks (default: this rank's alone). Uneven local batches are
            weighted by their size; with even ones this is open_clip's value and gradient.
        strategy: ``"gather"`` (default) or ``"ring"``.

    Shapes:
        ``image_features``, ``text_features``: [N, D], normalised; output: [], or ``{"contrastive_loss": []}`` with
        ``output_dict=True``.

    Raises:
        As :func:`sig_lip`.

    Example:
        >>> criterion = sslfast.SigLipLoss()
        >>> round(criterion(torch.eye(4), torch.eye(4), logit_scale=10.0, logit_bias=-5.0).item(), 4)
        0.0269
    """

    def __init__(self, gather_distributed: bool = False, *, strategy: str = "gather") -> None:
        super().__init__()
        check_gather(gather_distributed, strategy)
        self.gather_distributed = gather_distributed
        self.strategy = strategy

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of N pairs; ``logit_scale`` is already exponentiated and multiplies."""
        loss = sig_lip(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            gather_distributed=self.gather_distributed,
            strategy=self.strategy,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"gather_distributed={self.gather_distributed}, strategy={self.strategy!r}"
