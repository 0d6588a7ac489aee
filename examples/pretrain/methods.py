"""The methods of ``--method``: what sets them apart stands here, all that they share is in the other files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import sslfast
from examples.common.measure import Loss

from .losses import OverRanks, barlow_twins, vicreg

TEMPERATURE = 0.3
LAMBDA = 0.002  # about 1/D: at 0.005 and above the features of these small images are worse


@dataclass(frozen=True)
class Method:
    """A loss, with the projector and the schedule by which it learns from small images.

    Attributes:
        name: on the command line and in file names.
        title: for a reader.
        loss: the same of the loss, with its parameters.
        fused, fused_over_ranks: sslfast's loss of this process's views, and of those of all ranks.
        plain: the same function as ``fused`` in plain PyTorch.
        operators, operators_over_ranks: the operators that the fused loss reaches, by who serves it then; none of them
            when the reference does.
        hidden: widths of the projector's hidden layers.
        width: D, of the embeddings that the loss compares.
        batch_size: N, images a step.
        learning_rate: the largest of the schedule.
        steps: of a training.
        large: the (N, D) at which the loss alone is measured beside the training's, smallest first.
    """

    name: str
    title: str
    loss: str
    fused: Loss
    fused_over_ranks: Loss
    plain: Loss
    operators: Mapping[str, str]
    operators_over_ranks: Mapping[str, str]
    hidden: tuple[int, ...]
    width: int
    batch_size: int
    learning_rate: float
    steps: int
    large: tuple[tuple[int, int], ...]

    def losses(self, world: int = 1) -> dict[str, Loss]:
        """``fused`` and ``plain`` for so many ranks."""
        if world == 1:
            return {"fused": self.fused, "plain": self.plain}
        return {"fused": self.fused_over_ranks, "plain": OverRanks(self.plain)}


SIMCLR = Method(
    name="simclr",
    title="SimCLR",
    loss=f"NT-Xent, temperature {TEMPERATURE}",
    fused=sslfast.NTXentLoss(TEMPERATURE),
    fused_over_ranks=sslfast.NTXentLoss(TEMPERATURE, gather_distributed=True),
    plain=partial(sslfast.reference.nt_xent, temperature=TEMPERATURE),
    operators={"sslfast::nt_xent": "cpu", "sslfast::nt_xent_triton": "triton"},
    operators_over_ranks={"sslfast::similarity_lse": "cpu", "sslfast::similarity_lse_triton": "triton"},
    hidden=(256,),
    width=128,
    batch_size=512,
    learning_rate=2e-3,
    steps=300,
    large=((4096, 128), (8192, 128)),
)

_SECOND_MOMENT = {"sslfast::second_moment": "cpu", "sslfast::second_moment_triton": "triton"}
# Over ranks the moments are products by PyTorch's own kernels, whatever the backend.
_PRODUCTS = {"aten::mm": "torch", "aten::bmm": "torch"}

BARLOW = Method(
    name="barlow",
    title="Barlow Twins",
    loss=f"Barlow Twins, λ = {LAMBDA}",
    fused=sslfast.BarlowTwinsLoss(LAMBDA),
    fused_over_ranks=sslfast.BarlowTwinsLoss(LAMBDA, gather_distributed=True),
    plain=partial(barlow_twins, lambda_param=LAMBDA),
    operators=_SECOND_MOMENT,
    operators_over_ranks=_PRODUCTS,
    hidden=(512,),
    width=512,
    batch_size=256,
    learning_rate=5e-3,
    steps=400,
    large=((256, 2048), (256, 8192)),
)

VICREG = Method(
    name="vicreg",
    title="VICReg",
    loss="VICReg, weights 25, 25, 1",
    fused=sslfast.VICRegLoss(),
    fused_over_ranks=sslfast.VICRegLoss(gather_distributed=True),
    plain=vicreg,
    operators=_SECOND_MOMENT,
    operators_over_ranks=_PRODUCTS,
    hidden=(512, 512),
    width=512,
    batch_size=256,
    learning_rate=2e-3,
    steps=300,
    large=((256, 2048), (256, 8192)),
)

METHODS = {method.name: method for method in (SIMCLR, BARLOW, VICREG)}
