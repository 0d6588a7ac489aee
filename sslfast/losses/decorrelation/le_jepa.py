"""LeJEPA and LeWM: SIGReg beside a loss of prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import accumulator, check_same, is_real, without_autocast
from ...distributed.agreement import over_ranks
from ...distributed.choose import scope_of
from .._inputs import in_one_dtype
from .sigreg import SIGReg, check_views, sketch_of, statistic

WEIGHTINGS = ("convex", "sum")


def check_weight(name: str, value: float, most: float | None = 1.0) -> None:
    """A weight from 0 to ``most``."""
    if not is_real(value) or not value >= 0 or (most is not None and value > most):
        raise ValueError(f"{name} must be a number from 0{'' if most is None else f' to {most:g}'}, got {value!r}")


def check_weighting(weighting: str) -> None:
    """``weighting`` is one of ``WEIGHTINGS``."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(map(repr, WEIGHTINGS))}, got {weighting!r}")


def all_views(global_proj: Tensor, local_proj: Tensor | None) -> tuple[Tensor, int]:
    """Global and local views in one tensor [V, N, D], and how many are global.

    Raises:
        TypeError, ValueError: they are not [V, N, D] of one shape but for V, one dtype and device.
    """
    for name, proj in (("global_proj", global_proj), ("local_proj", local_proj)):
        if proj is not None and (not isinstance(proj, Tensor) or proj.dim() != 3):
            got = tuple(proj.shape) if isinstance(proj, Tensor) else type(proj).__name__
            raise ValueError(f"{name} must have shape [views, rows, features], got {got}")
    check_views("global_proj", global_proj)
    if local_proj is None:
        return global_proj, global_proj.shape[0]
    check_views("local_proj", local_proj)
    first, second = in_one_dtype(global_proj, local_proj)
    assert first is not None and second is not None
    check_same("a view of global_proj", first[0], "one of local_proj", second[0])
    return torch.cat([first, second]), global_proj.shape[0]


def view_invariance(proj: Tensor, global_views: int) -> Tensor:
    """Sum of ``(z_v − mean of the global views)²`` over views, rows and features of ``proj`` [V, N, D]."""
    with without_autocast(proj):
        wide = proj.to(accumulator(proj))
        return (wide - wide[:global_views].mean(0)).square().sum()


@over_ranks()
def le_jepa(
    global_proj: Tensor,
    local_proj: Tensor | None = None,
    lambda_param: float = 0.05,
    *,
    weighting: str = "convex",
    slices: Tensor | None = None,
    step: int | Tensor = 0,
    seed: int = 0,
    knots: int = 17,
    t_max: float = 3.0,
    num_vectors: int = 1024,
    gather_distributed: bool = False,
) -> Tensor:
    """SIGReg of all views, and their distance from the mean of the global ones.

        invariance = mean over views, rows and features of (z_v − mean of the global views)²
        loss       = λ·SIGReg + (1 − λ)·invariance          ("convex")
                     λ·SIGReg + invariance                  ("sum")

    Args:
        global_proj: [V, N, D], the views that the mean is taken over; float32, float64, bfloat16 or float16.
        local_proj: [V′, N, D], further views, or ``None``. All views as global ones, λ = 0.02 and ``num_vectors=256``
            are the loss of LeJEPA's minimal script.
        lambda_param: λ (default 0.05), from 0 to 1.
        weighting: ``"convex"`` (default), as lejepa and lightly, or ``"sum"``, as stable-pretraining.
        slices, step, seed, knots, t_max, num_vectors: as :func:`sslfast.sigreg`.
        gather_distributed: statistics of the rows of all ranks; ``False``: of this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of the losses is that of the global batch.

    Raises:
        TypeError: the views are not floating point, or differ in dtype.
        ValueError: shapes or devices do not fit; a number is out of its range; see also :func:`sslfast.sigreg`.

    Source: Balestriero and LeCun 2025, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics",
    section 5; value as lightly 1.6.0's ``LeJEPALoss``.

    Example:
        >>> z = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(0))
        >>> sslfast.le_jepa(z, step=3).item() < sslfast.le_jepa(0.1 * z, step=3).item()
        True
    """
    check_weight("lambda_param", lambda_param)
    check_weighting(weighting)
    proj, global_views = all_views(global_proj, local_proj)
    sketch = sketch_of(proj, slices, step, seed, knots, t_max, num_vectors, "lejepa")
    scope = scope_of(gather_distributed)
    shard = scope.shard(proj.transpose(0, 1), sketch.traits(proj))
    regularizer = statistic(scope, shard, proj, sketch)
    invariance = shard.weight / (proj.shape[0] * proj.shape[2]) * view_invariance(proj, global_views)
    return lambda_param * regularizer + (1 - lambda_param if weighting == "convex" else 1) * invariance


class LeJEPALoss(nn.Module):
    """:func:`le_jepa` with a counter of its steps, and the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        lambda_param: weight of SIGReg (default 0.05), from 0 to 1.
        gather_distributed: as :func:`le_jepa`.
        sigreg_knots, sigreg_t_max, sigreg_num_vectors, seed: of :class:`sslfast.SIGReg`, the attribute ``sigreg``.
        weighting: ``"convex"`` (default) or ``"sum"``.

    Shapes:
        ``local_proj``: [V′, N, D] or ``None``; ``global_proj``: [V, N, D]; output: [].

    Raises:
        As :func:`le_jepa`.

    Example:
        >>> criterion = sslfast.LeJEPALoss(sigreg_num_vectors=256)
        >>> local_proj, global_proj = torch.randn(6, 8, 16), torch.randn(2, 8, 16)
        >>> criterion(local_proj=local_proj, global_proj=global_proj).shape
        torch.Size([])
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
        *,
        seed: int = 0,
        weighting: str = "convex",
    ) -> None:
        super().__init__()
        check_weight("lambda_param", lambda_param)
        check_weighting(weighting)
        self.lambda_param = lambda_param
        self.weighting = weighting
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
            seed=seed,
        )

    def forward(self, *, local_proj: Tensor | None = None, global_proj: Tensor) -> Tensor:
        """The loss of local and global views, [V, N, D] each."""
        options: dict[str, Any] = self.sigreg.options()
        del options["convention"]
        loss = le_jepa(global_proj, local_proj, self.lambda_param, weighting=self.weighting, **options)
        self.sigreg.advance()
        return loss

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, weighting={self.weighting!r}"


@over_ranks()
def le_wm(
    predicted: Tensor,
    target: Tensor,
    embeddings: Tensor,
    lambda_param: float = 0.1,
    *,
    normalize: bool = False,
    slices: Tensor | None = None,
    step: int | Tensor = 0,
    seed: int = 0,
    knots: int = 17,
    t_max: float = 3.0,
    num_vectors: int = 1024,
    gather_distributed: bool = False,
) -> Tensor:
    """Error of predicted frames, and SIGReg of all frames: ``mean (predicted − sg(target))² + λ·SIGReg``.

    Args:
        predicted: [B, ..., D], frames that a predictor gave.
        target: of its shape, the frames that came; a constant.
        embeddings: [B, T, D]; SIGReg is of the B samples of every frame.
        lambda_param: λ (default 0.1), at least 0.
        normalize: layer normalisation, without parameters, of both sides of the error (default: no).
        slices, step, seed, knots, t_max, num_vectors: as :func:`sslfast.sigreg`.
        gather_distributed: statistics of the samples of all ranks; ``False``: of this rank's alone.

    Returns:
        [] float32 (float64 for float64 inputs). Over several ranks the mean of the losses is that of the global batch.

    Raises:
        TypeError: the tensors are not floating point, or differ in dtype.
        ValueError: shapes or devices do not fit; a number is out of its range; see also :func:`sslfast.sigreg`.

    Source: "LeWorldModel" 2026 (arXiv 2603.19312); value as lightly 1.6.0's ``LeWMLoss``.

    Example:
        >>> frames = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(0))
        >>> sslfast.le_wm(frames[:, 1:], frames[:, 1:], frames, 0.0).item()  # a perfect prediction
        0.0
    """
    check_weight("lambda_param", lambda_param, None)
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 3:
        got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"embeddings must have shape [batch, frames, features], got {got}")
    views = check_views("embeddings", embeddings.transpose(0, 1))
    first, second = in_one_dtype(predicted, target)
    assert first is not None and second is not None
    check_same("predicted", first, "target", second)
    if first.dim() < 2 or first.shape[0] != embeddings.shape[0] or first.shape[-1] != embeddings.shape[-1]:
        raise ValueError(
            "predicted must have embeddings' batch and features, got shapes "
            f"{tuple(first.shape)} and {tuple(embeddings.shape)}"
        )
    sketch = sketch_of(views, slices, step, seed, knots, t_max, num_vectors, "lejepa")
    scope = scope_of(gather_distributed)
    shard = scope.shard(embeddings, sketch.traits(views))
    kind = accumulator(first)
    with without_autocast(first):
        wide, constant = first.to(kind), second.detach().to(kind)
        if normalize:
            wide, constant = (F.layer_norm(x, wide.shape[-1:]) for x in (wide, constant))
        error = (wide - constant).square().sum() * (shard.weight * shard.local / wide.numel())
    return error + lambda_param * statistic(scope, shard, views, sketch)


class LeWMLoss(nn.Module):
    """:func:`le_wm` with a counter of its steps, and the constructor and ``forward`` of lightly 1.6.0's class.

    Args:
        lambda_param: weight of SIGReg (default 0.1), at least 0.
        normalize: layer normalisation of both sides of the error (default: no).
        gather_distributed: as :func:`le_wm`.
        sigreg_knots, sigreg_t_max, sigreg_num_vectors, seed: of :class:`sslfast.SIGReg`, the attribute ``sigreg``.

    Shapes:
        ``predicted``, ``target``: [B, ..., D]; ``embeddings``: [B, T, D]; output: [].

    Raises:
        As :func:`le_wm`.

    Example:
        >>> criterion, frames = sslfast.LeWMLoss(sigreg_num_vectors=64), torch.randn(32, 3, 8)
        >>> criterion(predicted=frames[:, :-1], target=frames[:, 1:], embeddings=frames).shape
        torch.Size([])
    """

    def __init__(
        self,
        lambda_param: float = 0.1,
        normalize: bool = False,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_weight("lambda_param", lambda_param, None)
        self.lambda_param = lambda_param
        self.normalize = normalize
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
            seed=seed,
        )

    def forward(self, *, predicted: Tensor, target: Tensor, embeddings: Tensor) -> Tensor:
        """The loss of predicted and observed frames, and of all frames of the clips."""
        options: dict[str, Any] = self.sigreg.options()
        del options["convention"]
        loss = le_wm(predicted, target, embeddings, self.lambda_param, normalize=self.normalize, **options)
        self.sigreg.advance()
        return loss

    def extra_repr(self) -> str:
        return f"lambda_param={self.lambda_param}, normalize={self.normalize}"
