"""DirectCLR: NT-Xent of the first features of the backbone's own output, without a projection head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._checks import check_matrix, whole_number
from ...distributed.agreement import over_ranks
from .diagnostics import Diagnostics
from .nt_xent import NTXentLoss, nt_xent


@over_ranks()
def direct_clr(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    loss_dim: int = 64,
    normalize: bool = True,
    gather_distributed: bool = False,
    strategy: str = "gather",
) -> Tensor:
    """NT-Xent of the first ``loss_dim`` features of two views, mean over the 2N rows. The others get no gradient.

    Args:
        z0, z1: [N, D] or [N, ...], which is flattened: row ``i`` of both a view of image ``i``; float32, float64,
            bfloat16 or float16; any strides.
        loss_dim: how many features count (default 64); where there are fewer, all of them.
        normalize: divide what counts of a row by its norm first (default).
        The others, the result and the errors are those of :func:`nt_xent`.

    Raises:
        ValueError: loss_dim is no positive whole number; see also :func:`nt_xent`.

    Source: Jing et al. 2022, "Understanding Dimensional Collapse in Contrastive Self-supervised Learning", section 6;
    value as lightly 1.6.0's ``DirectCLRLoss``.

    Example:
        >>> loss = sslfast.direct_clr(torch.eye(4), torch.eye(4), temperature=0.5, loss_dim=4)
        >>> round(loss.item(), 4)
        0.5944
    """
    z0, z1 = leading("z0", z0, loss_dim), leading("z1", z1, loss_dim)
    return nt_xent(z0, z1, temperature, normalize=normalize, gather_distributed=gather_distributed, strategy=strategy)


def leading(name: str, z: Tensor, loss_dim: int) -> Tensor:
    """The first ``loss_dim`` features of ``z`` [N, ...], [N, loss_dim]."""
    whole_number("loss_dim", loss_dim, 1)
    if isinstance(z, Tensor) and z.dim() > 2:
        z = z.flatten(1)
    check_matrix(name, z)
    return z[:, :loss_dim]


class DirectCLRLoss(NTXentLoss):
    """The module form of :func:`direct_clr`, with the constructor of lightly 1.6.0's class; with a memory bank too.

    Args:
        loss_dim: how many features count (default 64).
        temperature, gather_distributed, strategy, diagnostics: as :class:`NTXentLoss`.
        memory_bank_size: 0 (default): no bank; or ``(K, loss_dim)``: it holds the features that count.

    Shapes:
        ``out0``, ``out1``: [N, D] or [N, ...], which is flattened; output: [], or ``(loss, diagnostics)``.

    Raises:
        As :func:`direct_clr` and :class:`NTXentLoss`.

    Example:
        >>> criterion = sslfast.DirectCLRLoss(loss_dim=4)
        >>> round(criterion(torch.eye(4), torch.eye(4)).item(), 4)
        0.5944
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        strategy: str = "gather",
        diagnostics: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed, strategy=strategy, diagnostics=diagnostics)
        self.loss_dim = whole_number("loss_dim", loss_dim, 1)

    @over_ranks()
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor | tuple[Tensor, Diagnostics]:
        """The loss of two views, each [N, D]."""
        return super().forward(leading("out0", out0, self.loss_dim), leading("out1", out1, self.loss_dim))

    def extra_repr(self) -> str:
        return f"loss_dim={self.loss_dim}, {super().extra_repr()}"
