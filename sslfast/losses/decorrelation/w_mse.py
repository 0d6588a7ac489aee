"""W-MSE: positives compared after whitening; all sub-batches whitened by one batched Cholesky decomposition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..._checks import accumulator, check_matrix, without_autocast
from ..._library import towards
from ...ops.l2_normalize import l2_normalize
from .._inputs import two_views


def norm_mse_loss(x0: Tensor, x1: Tensor) -> Tensor:
    """Mean squared distance of normalised rows, ``2 − 2·mean_i cos(x0_i, x1_i)``.

    Args:
        x0, x1: [N, D], row ``i`` of each a view of sample ``i``; float32, float64, bfloat16 or float16.

    Returns:
        [] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: x0 and x1 are not matrices of the same shape, dtype and device.

    Source: Ermolov et al. 2021, "Whitening for Self-Supervised Representation Learning", equation 1.

    Example:
        >>> sslfast.norm_mse_loss(torch.eye(4), -torch.eye(4)).item()
        4.0
    """
    x0, x1 = two_views("x0", x0, "x1", x1, normalize=False)
    kind = accumulator(x0)
    return 2 - 2 * (l2_normalize(x0.to(kind)) * l2_normalize(x1.to(kind))).sum(1).mean()


def _cholesky(covariance: Tensor, eps: float) -> Tensor:
    try:
        return torch.linalg.cholesky(covariance)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"whitening: a covariance [{covariance.shape[-1]}, {covariance.shape[-1]}] is not positive definite with "
            f"eps={eps}: features are constant or depend on each other. A larger eps (1e-3, say), more rows in each "
            "sub-batch or fewer features prevent that."
        ) from error


def whiten(
    x: Tensor,
    running: tuple[Tensor, Tensor] | None = None,
    *,
    training: bool = True,
    momentum: float = 0.01,
    eps: float = 0.0,
) -> Tensor:
    """Sub-batches of rows, each whitened by the Cholesky factor of its own covariance: see :class:`Whitening2d`.

    Args:
        x: [S, w, D], S sub-batches; w ≥ 2 where their statistics are used; float32, float64, bfloat16 or float16.
        running: means and covariance, of D and [D, D] entries, in any shape and on ``x``'s device. In training every
            sub-batch moves them in place, in order; else they are used instead of the sub-batches' own. ``None``
            (default): there are none.
        training: see ``running`` (default).
        momentum: weight of a sub-batch in the running statistics (default 0.01).
        eps: how far a covariance is drawn to the identity (default 0).

    Returns:
        [S, w, D], float32 (float64 for float64).

    Raises:
        ValueError: the width is not that of ``running``, or there is one row where its covariance is needed.
            LinAlgError: a covariance is not positive definite; ``running`` is then as it was.

    Source: Ermolov et al. 2021, section 3.2.
    """
    rows, d = x.shape[1:]
    if running is not None and running[1].shape != (d, d):
        raise ValueError(f"x must have num_features={running[1].shape[0]} features, got {d}")
    x = x.to(accumulator(x))
    with without_autocast(x):
        mean: Tensor | None = None
        if running is not None and not training:
            centred = x - running[0].view(1, 1, -1).to(x.dtype)
            covariance = running[1].to(x.dtype)
        else:
            if rows < 2:
                raise ValueError(f"x must have at least two rows, got {rows}: one row has no covariance")
            mean = x.mean(1, keepdim=True)  # [S, 1, D]
            centred = x - mean
            covariance = centred.mT @ centred / (rows - 1)  # [S, D, D]
        drawn = covariance
        if eps:
            drawn = torch.lerp(covariance, torch.eye(d, dtype=x.dtype, device=x.device), eps)
        factor = _cholesky(drawn, eps)
        if running is not None and mean is not None:
            _track(running, (mean.detach(), covariance.detach()), momentum)
        return torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT


@torch.no_grad()
def _track(running: tuple[Tensor, Tensor], latest: tuple[Tensor, Tensor], momentum: float) -> None:
    """One step of the moving averages for each of the means [S, 1, D] and covariances [S, D, D]."""
    steps = len(latest[0])
    keep = 1 - momentum
    # After all steps the last one weighs momentum, and each before it (1 − momentum) times the next.
    powers = torch.arange(steps - 1, -1, -1, device=latest[0].device, dtype=torch.float64)
    weights = (momentum * keep**powers).to(latest[0].dtype)
    for average, batches in zip(running, latest, strict=True):
        moved = torch.tensordot(weights, batches, dims=1).view_as(average)
        average.mul_(keep**steps).add_(moved.to(average.dtype))


class Whitening2d(nn.Module):
    """Whitening by the Cholesky factor of the covariance: ``y_i = L⁻¹ (x_i − mean)``, ``L Lᵀ = (1 − eps)·Cov + eps·I``.

    In training, and without running statistics always, mean and covariance (unbiased) are those of the batch; else the
    running ones, which every batch in training moves: ``running ← (1 − momentum)·running + momentum·batch's``. The
    buffers are lightly's, ``running_mean`` [1, D, 1, 1] and ``running_variance`` [D, D].

    Args:
        num_features: D.
        momentum: of the running statistics (default 0.01).
        track_running_stats: keep them (default).
        eps: how far the covariance is drawn to the identity, 0 to 1 (default 0).

    Shapes:
        ``x``: [N, D], N ≥ 2; float32, float64, bfloat16 or float16. Output: [N, D], float32 (float64 for float64).

    Raises:
        TypeError, ValueError: ``x`` is not a floating-point matrix of D features, or has one row where its covariance
            is needed; eps is not between 0 and 1. LinAlgError: a covariance is not positive definite.

    Source: Ermolov et al. 2021, section 3.2; value as lightly 1.6.0's class of this name.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0], [2.0, 2.0]])
        >>> y = sslfast.Whitening2d(2)(x)
        >>> (y.T.cov() - torch.eye(2)).abs().max().item() < 1e-5
        True
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self, num_features: int, momentum: float = 0.01, track_running_stats: bool = True, eps: float = 0
    ) -> None:
        super().__init__()
        if not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
        if not 0 <= eps <= 1:
            raise ValueError(f"eps must be between 0 and 1, got {eps}")
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.eps = eps
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(1, num_features, 1, 1))
            self.register_buffer("running_variance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """The rows of ``x`` [N, D], decorrelated."""
        check_matrix("x", x)
        return self.whiten(x.unsqueeze(0)).squeeze(0)

    def whiten(self, x: Tensor) -> Tensor:
        """Sub-batches ``x`` [S, w, D], each by its own statistics, which enter the running ones in their order."""
        running = (self.running_mean, self.running_variance) if self.track_running_stats else None
        return whiten(x, running, training=self.training, momentum=self.momentum, eps=self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}, "
            f"eps={self.eps}"
        )


def whitened_pairs(
    x: Tensor, whitening: Callable[[Tensor], Tensor], *, w_size: int, w_iter: int, num_samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair of whitened views [B, D], rows in the order of ``x``, of every repetition of :class:`WMSELoss`.

    Args:
        x: [V·B, D], the B rows of the first of ``num_samples`` = V views, then those of the next; B a multiple of
            ``w_size``.
        whitening: of sub-batches [S, w_size, D], as :func:`whiten`.
        w_iter: repetitions, each with sub-batches of its own by one ``torch.randperm``.
    """
    views = x.unflatten(0, (num_samples, -1))  # [V, B, D]
    for _ in range(w_iter):
        order = towards(torch.randperm(views.shape[1]), x.device)
        dealt = views[:, order].unflatten(1, (-1, w_size))  # [V, S, w, D]
        # The running statistics take in sub-batch after sub-batch, all views of one before the next.
        white = whitening(dealt.transpose(0, 1).flatten(0, 1))  # [S·V, w, D]
        white = white.unflatten(0, (-1, num_samples)).transpose(0, 1).flatten(1, 2)  # [V, B, D]
        white = white[:, order.argsort()]
        for i in range(num_samples):
            for j in range(i + 1, num_samples):
                yield white[i], white[j]


class WMSELoss(nn.Module):
    """W-MSE: mean distance of positives after whitening in random sub-batches, over view pairs and repetitions.

    Every repetition deals the samples into sub-batches by one ``torch.randperm`` of the default generator, as lightly's
    does, so the same seed gives the same sub-batches. All are whitened at once.

    Args:
        embedding_dim: D (default 128).
        momentum: of the running statistics (default 0.01).
        eps: how far each covariance is drawn to the identity, 0 to 1 (default 0); helps where one is not positive
            definite.
        track_running_stats: keep them, and whiten by them in evaluation (default).
        w_iter: repetitions (default 1).
        w_size: rows in a sub-batch, at least 2·D (default 256).
        loss_fn: of the whitened views, [B, D] each, rows in the order of the input (default: :func:`norm_mse_loss`).
        num_samples: V ≥ 2 views of each image (default 2).

    Shapes:
        ``input``: [V·B, D], the B rows of the first view, then those of the next; B a multiple of w_size; float32,
        float64, bfloat16 or float16. Output: [], float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: ``input`` is not a floating-point matrix of D features, or its rows are not V times a
            multiple of w_size; w_size is less than 2·D; w_iter or num_samples is too small. LinAlgError: a covariance
            is not positive definite.

    Source: Ermolov et al. 2021, "Whitening for Self-Supervised Representation Learning", section 3; value as lightly
    1.6.0's class of this name.

    Example:
        >>> criterion = sslfast.WMSELoss(embedding_dim=2, w_size=4)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0], [2.0, 2.0]])
        >>> abs(criterion(torch.cat([x, x])).item()) < 1e-5  # two views that are the same
        True
    """

    def __init__(
        self,
        embedding_dim: int = 128,
        momentum: float = 0.01,
        eps: float = 0.0,
        track_running_stats: bool = True,
        w_iter: int = 1,
        w_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = norm_mse_loss,
        num_samples: int = 2,
    ) -> None:
        super().__init__()
        self.whitening = Whitening2d(embedding_dim, momentum, track_running_stats, eps)
        if w_size < 2 * embedding_dim:
            raise ValueError(f"w_size must be at least twice embedding_dim={embedding_dim}, got {w_size}")
        if w_iter < 1:
            raise ValueError(f"w_iter must be a positive integer, got {w_iter}")
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        self.w_iter = w_iter
        self.w_size = w_size
        self.loss_f = loss_fn
        self.num_samples = num_samples
        self.num_pairs = num_samples * (num_samples - 1) // 2

    def forward(self, input: Tensor) -> Tensor:
        """The loss of V views of B samples, [V·B, D]."""
        check_matrix("input", input)
        total = input.shape[0]
        if total % self.num_samples:
            raise ValueError(f"input must have a multiple of num_samples={self.num_samples} rows, got {total}")
        rows = total // self.num_samples
        if rows < self.w_size or rows % self.w_size:
            raise ValueError(
                f"input must have a positive multiple of w_size={self.w_size} rows a view, got {rows}: "
                "drop the rest of the last batch"
            )
        losses = [
            self.loss_f(white_i, white_j)
            for white_i, white_j in whitened_pairs(
                input, self.whitening.whiten, w_size=self.w_size, w_iter=self.w_iter, num_samples=self.num_samples
            )
        ]
        return torch.stack(losses).sum() / (self.w_iter * self.num_pairs)

    def extra_repr(self) -> str:
        return f"w_iter={self.w_iter}, w_size={self.w_size}, num_samples={self.num_samples}"
