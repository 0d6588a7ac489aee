"""CLIP: the symmetric cross entropy over image–text pairs, rows and columns from one pass over the tiles."""

from __future__ import annotations

from torch import Tensor, nn

from ..._checks import scalar_tensor
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from ...distributed.scope import Scope
from ...ops.types import Pairs, Want
from .._inputs import NORMALIZE, check_gather, expect_unit_rows, two_views
from .diagnostics import Diagnosed, Diagnostics, diagnostics_of


def clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """Symmetric cross entropy of image–text similarities, ``s_ij = logit_scale · I_i·T_j + logit_bias``.

        loss = ½ (1/N) Σ_i (log Σ_j exp s_ij − s_ii)  +  ½ (1/N) Σ_j (log Σ_i exp s_ij − s_jj)

    Either tower may be frozen (no gradient): nothing is spent on its gradient. Extra memory grows as N·D.

    Args:
        image_features, text_features: [N, D], row ``i`` of each the same pair; float32, float64, bfloat16 or float16,
            the same for both (inside an autocast region the wider one is used). Used as they are: normalise first
            (:func:`sslfast.l2_normalize`).
        logit_scale: multiplies the dot products (``1/τ``, already exponentiated); a float, or a one-element tensor,
            which receives its gradient.
        logit_bias: one number added to every logit, which changes neither value nor gradients; a tensor receives a
            gradient of zero.
        gather_distributed: contrast with the pairs of all ranks; ``False``: this rank's alone.
        strategy: how, ``"gather"`` or ``"ring"``.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of their values
        is the loss of the global batch.

    Raises:
        TypeError, ValueError: the features are not two matrices of the same shape, dtype and device with at least one
            row and one feature; logit_scale or logit_bias is not one number.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3;
    frozen image tower: Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image Text Tuning".

    Example:
        >>> logit_scale = torch.tensor(2.0, requires_grad=True)
        >>> loss = sslfast.clip(torch.eye(4), torch.eye(4), logit_scale)
        >>> round(loss.item(), 4)
        0.3408
    """
    scope = scope_of(gather_distributed, strategy)
    return diagnosed_clip(image_features, text_features, logit_scale, logit_bias, scope)[0]


@over_ranks("logit_scale")
def diagnosed_clip(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    scope: Scope,
    diagnostics: bool = False,
) -> Diagnosed:
    images, texts = two_views("image_features", image_features, "text_features", text_features, normalize=False)
    expect_unit_rows("clip", NORMALIZE, image_features=images, text_features=texts)
    scale = scalar_tensor("logit_scale", logit_scale, images)
    shard = scope.shard(images)
    pairs = Pairs(images, texts, scale, positives=shard.ids(images.device))
    terms = scope.terms(pairs, Want(columns=True, hardest=diagnostics))
    assert terms.positive is not None and terms.col_lse is not None
    # Row i and column i of this rank are the same pair, so one positive serves both.
    both = (terms.row_lse - terms.positive) + (terms.col_lse - terms.positive)
    loss = shard.weight / 2 * both.sum()
    if logit_bias is not None:
        loss = loss + 0.0 * scalar_tensor("logit_bias", logit_bias, images)
    return loss, diagnostics_of(terms, scale, shard.local * shard.total) if diagnostics else None


class ClipLoss(nn.Module):
    """The module form of :func:`clip`, with the ``forward`` of open_clip's class of this name.

    Args:
        gather_distributed: contrast with the pairs of all ranks (default: this rank's alone). Gradients are then those
            of the global batch under DDP: open_clip's ``local_loss=True, gather_with_grad=True``.
        strategy: ``"gather"`` (default) or ``"ring"``.
        diagnostics: return ``(output, Diagnostics)``.

    Shapes:
        ``image_features``, ``text_features``: [N, D], normalised; output: [], or ``{"contrastive_loss": []}`` with
        ``output_dict=True``.

    Raises:
        As :func:`clip`.

    Example:
        >>> criterion = sslfast.ClipLoss()
        >>> round(criterion(torch.eye(4), torch.eye(4), logit_scale=2.0).item(), 4)
        0.3408
    """

    def __init__(
        self, gather_distributed: bool = False, *, strategy: str = "gather", diagnostics: bool = False
    ) -> None:
        super().__init__()
        check_gather(gather_distributed, strategy)
        self.gather_distributed = gather_distributed
        self.strategy = strategy
        self.diagnostics = diagnostics

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor | dict[str, Tensor], Diagnostics]:
        """The loss of N pairs; ``logit_scale`` is already exponentiated and multiplies."""
        scope = scope_of(self.gather_distributed, self.strategy)
        loss, found = diagnosed_clip(image_features, text_features, logit_scale, logit_bias, scope, self.diagnostics)
        output = {"contrastive_loss": loss} if output_dict else loss
        return output if found is None else (output, found)

    def extra_repr(self) -> str:
        return f"gather_distributed={self.gather_distributed}, strategy={self.strategy!r}"
