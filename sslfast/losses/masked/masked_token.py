"""Cross entropy of masked words over a vocabulary, without the logits: only masked rows, and those by tiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import FLOATS, autocasts, readable
from ...ops.gather_tokens import gather_tokens
from ...ops.masked_rows import masked_rows
from ...ops.similarity_lse import similarity_terms
from .._inputs import check_fits


def masked_token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    capacity: int | None = None,
) -> Tensor:
    """``F.cross_entropy(hidden @ weight.T + bias, labels, ignore_index=…)``, mean over the tokens that have a label.

    The masked tokens' rows are gathered first, and their logits exist a tile at a time
    (:func:`sslfast.similarity_lse`), so neither [B·S, V] nor [rows, V] is ever in memory. Gradients are sums in a fixed
    order.

    Args:
        hidden: [B, S, D] (or [S, D]); float32, float64, bfloat16 or float16; any strides.
        weight: [V, D], the output embedding, of the same dtype. Inside an autocast region both take its dtype, as
            ``F.linear`` would.
        labels: [B, S] (or [S]) int64 or int32, 0 to V − 1, or ``ignore_index`` where a token is not to be predicted.
        bias: [V], or ``None`` (default).
        ignore_index: default −100.
        capacity: rows for masked tokens, a number that does not depend on the data, as CUDA graphs and compiled steps
            need. ``None`` (default): on the CPU as many as there are; on a GPU, and where a graph is traced, B·S.
            Without effect on the result.

    Returns:
        [] float32 (float64 for float64 inputs); differentiable in ``hidden``, ``weight`` and ``bias``, twice through
        the reference. Without a label it is NaN with zero gradient, as ``F.cross_entropy``.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values do not fit, or more tokens have a label than
            ``capacity``; labels are only read on the CPU: on a GPU, and where a graph is traced, the loss and its
            gradients are then NaN. RuntimeError: too small a ``capacity`` in a traced graph on the CPU.

    Source: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3.1.

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 8), torch.ones(100, 8)
        >>> labels = torch.tensor([[-100, 7, -100]])  # one token to predict
        >>> round(sslfast.masked_token_cross_entropy(hidden, weight, labels).item(), 4)  # log 100
        4.6052
    """
    hidden, weight = _checked(hidden, weight, labels, bias)
    labels = labels.to(torch.int64)
    size, count = _capacity(labels, weight.shape[0], ignore_index, capacity)
    rows, targets = _masked_tokens(hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), ignore_index, size)
    terms = similarity_terms(rows, weight, 1.0, bias=bias, positives=targets)
    assert terms.positive is not None
    held = targets >= 0
    loss = (terms.row_lse - terms.positive).masked_fill(~held, 0.0).sum() / count.clamp(min=1)
    nan = torch.full_like(loss, float("nan"))
    wrong = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    # Too many for the rows, or no labels: NaN also in the gradients. None: NaN as the mean of nothing, gradients 0.
    loss = loss * torch.where((count > size) | wrong.any(), nan, torch.ones_like(loss))
    return torch.where(count > 0, loss, nan)


def _checked(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    for name, x in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if name != "labels" and x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if hidden.dim() not in (2, 3) or 0 in hidden.shape:
        raise ValueError(f"hidden must be [B, S, D] or [S, D], and not empty, got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, D], V at least 1, got shape {tuple(weight.shape)}")
    if autocasts(hidden) and torch.float64 not in (hidden.dtype, weight.dtype):
        narrow = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(narrow), weight.to(narrow)
    check_fits("weight", weight, "hidden", hidden)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1] or labels.device != hidden.device:
        raise ValueError(
            f"labels must have shape {tuple(hidden.shape[:-1])} on {hidden.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return hidden, weight


def _capacity(labels: Tensor, classes: int, ignore_index: int, capacity: int | None) -> tuple[int, Tensor]:
    """How many rows, and the number of tokens with a label as a tensor []."""
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    count = (labels != ignore_index).sum()
    if not readable(labels):
        return (labels.numel() if capacity is None else capacity), count
    known = int(count)
    if known:
        low, high = (int(i) for i in torch.aminmax(labels[labels != ignore_index]))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be 0 to {classes - 1} or {ignore_index}, got {low} to {high}")
    if capacity is not None and known > capacity:
        raise ValueError(f"capacity must hold all {known} tokens that have a label, got {capacity}")
    return (max(known, 1) if capacity is None else capacity), count


def _masked_tokens(hidden: Tensor, labels: Tensor, ignore_index: int, size: int) -> tuple[Tensor, Tensor]:
    """The rows of ``hidden`` [N, D] with a label, in order, as [size, D], zeros beyond; and their labels, −1 beyond."""
    rows, _, _ = masked_rows((labels != ignore_index)[None], size)
    taken = gather_tokens(hidden[None], rows[None])[0]
    return taken, torch.where(rows >= 0, labels[rows.clamp(min=0)], -1)


class MaskedTokenLoss(nn.Module):
    """The module form of :func:`masked_token_cross_entropy`.

    Args:
        ignore_index, capacity: as the function takes them.

    Shapes:
        ``hidden`` [B, S, D], ``weight`` [V, D], ``labels`` [B, S], ``bias`` [V]; output: [].

    Raises:
        As :func:`masked_token_cross_entropy`.

    Example:
        >>> criterion = sslfast.MaskedTokenLoss()
        >>> labels = torch.tensor([[-100, 7, -100]])
        >>> round(criterion(torch.zeros(1, 3, 8), torch.ones(100, 8), labels).item(), 4)
        4.6052
    """

    def __init__(self, ignore_index: int = -100, capacity: int | None = None) -> None:
        super().__init__()
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.ignore_index = ignore_index
        self.capacity = capacity

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """The mean cross entropy of the tokens that have a label."""
        return masked_token_cross_entropy(
            hidden, weight, labels, bias=bias, ignore_index=self.ignore_index, capacity=self.capacity
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, capacity={self.capacity}"
