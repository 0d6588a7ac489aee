"""The methods of ``--method``: what sets them apart stands here, all that they share is in the other files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sslfast
from examples.common.measure import Loss

from . import distillation
from .learners import BYOL, DINO, EmaUpdate, Learner, LeJEPA, SimSiam, SwAV, diagnosed, slices_of
from .losses import OverRanks, barlow_twins, vicreg
from .model import Model

TEMPERATURE = 0.3
PROTOTYPES = DINO.prototypes
LE_JEPA_LAMBDA = 0.05
LAMBDA = 0.002  # about 1/D: at 0.005 and above the features of these small images are worse


def _embeddings(loss: Any, z0: Tensor, z1: Tensor) -> Tensor:
    return loss(z0, z1)


def _predictions(loss: Any, z0: Tensor, z1: Tensor) -> Tensor:
    return loss(z0, z1, z0.detach(), z1.detach())


def _scores(loss: Any, z0: Tensor, z1: Tensor) -> Tensor:
    return diagnosed(loss([z0, z1]))[0]


def _scores_of_both(loss: Any, z0: Tensor, z1: Tensor) -> Tensor:
    criterion = type(loss)(z0.shape[1])  # with a centre for so many prototypes
    return criterion([z0.detach(), z1.detach()], [z0, z1])


def _on_slices(loss: Any, z0: Tensor, z1: Tensor) -> Tensor:
    return loss(torch.stack([z0, z1]), slices_of(z0.shape[1], 0))


@dataclass(frozen=True)
class Method:
    """A loss, with the projector and the schedule by which it learns from small images.

    Attributes:
        name: on the command line and in file names.
        title: for a reader.
        loss: the same of the loss, with its parameters.
        fused, fused_over_ranks: sslfast's loss of this process's views, and of those of all ranks; ``None``: the
            method runs on one process.
        plain: the same function as ``fused`` in plain PyTorch.
        operators, operators_over_ranks: the operators that the fused loss reaches, by who serves it then; none of them
            when the reference does.
        hidden: widths of the projector's hidden layers.
        width: D, of the embeddings that the loss compares.
        batch_size: N, images a step.
        learning_rate: the largest of the schedule.
        steps: of a training.
        large: the (N, D) at which the loss alone is measured beside the training's, smallest first.
        learner: what is trained, beside the loss.
        of_two_views: calls the loss, as the learner does, with the embeddings or scores [N, D] of two views: what is
            measured alone.
        measured_width: D there, where that is not the embeddings'.
    """

    name: str
    title: str
    loss: str
    fused: Any
    fused_over_ranks: Any
    plain: Any
    operators: Mapping[str, str]
    operators_over_ranks: Mapping[str, str]
    hidden: tuple[int, ...]
    width: int
    batch_size: int
    learning_rate: float
    steps: int
    large: tuple[tuple[int, int], ...]
    learner: type[Learner] = Learner
    of_two_views: Callable[[Any, Tensor, Tensor], Tensor] = _embeddings
    measured_width: int | None = None

    def losses(self, world: int = 1) -> dict[str, Any]:
        """``fused`` and ``plain`` for so many ranks, as the learner calls them."""
        if world == 1:
            return {"fused": self.fused, "plain": self.plain}
        return {"fused": self.fused_over_ranks, "plain": OverRanks(self.plain)}

    def alone(self) -> dict[str, Loss]:
        """The same as functions of two views' embeddings, on one process; nothing is told beside the loss."""
        losses = copy.deepcopy(self.losses())
        for loss in losses.values():
            if hasattr(loss, "diagnostics"):
                loss.diagnostics = False
        return {name: partial(self.of_two_views, loss) for name, loss in losses.items()}

    def learners(self, model: Model, world: int = 1) -> dict[str, Learner]:
        """Of the same weights, each in memory of its own."""
        averages: dict[str, EmaUpdate] = {"fused": sslfast.nn.ema_update_, "plain": distillation.ema_update}
        made = {}
        for name, loss in self.losses(world).items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # predictors and prototypes start alike
                made[name] = self.learner(model.copy(), copy.deepcopy(loss), averages[name])
        return made


def _fused_le_jepa(z: Tensor, slices: Tensor) -> Tensor:
    return sslfast.le_jepa(z, None, LE_JEPA_LAMBDA, slices=slices)


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

BYOL_ = Method(
    name="byol",
    title="BYOL",
    loss="squared distance of predictions and targets",
    fused=sslfast.byol,
    fused_over_ranks=None,
    plain=distillation.byol,
    operators={"sslfast::negative_cosine": "cpu"},
    operators_over_ranks={},
    hidden=(256,),
    width=128,
    batch_size=256,
    learning_rate=2e-3,
    steps=400,
    large=((4096, 256),),
    learner=BYOL,
    of_two_views=_predictions,
)

SIMSIAM = replace(
    BYOL_,
    name="simsiam",
    title="SimSiam",
    loss="negative cosine",
    fused=sslfast.sim_siam,
    plain=distillation.sim_siam,
    learner=SimSiam,
)

SWAV = Method(
    name="swav",
    title="SwAV",
    loss=f"swapped prediction, K = {PROTOTYPES}",
    fused=sslfast.SwAVLoss(diagnostics=True),
    fused_over_ranks=None,
    plain=distillation.SwAV(),
    operators={"sslfast::distillation_cross_entropy": "cpu"},
    operators_over_ranks={},
    hidden=(256,),
    width=64,
    batch_size=256,
    learning_rate=2e-3,
    steps=300,
    large=((512, 3000), (1024, 16384)),
    learner=SwAV,
    of_two_views=_scores,
    measured_width=PROTOTYPES,
)

DINO_ = replace(
    SWAV,
    name="dino",
    title="DINO",
    loss=f"cross entropy with the teacher, K = {PROTOTYPES}",
    fused=sslfast.DINOLoss(PROTOTYPES, diagnostics=True),
    plain=distillation.DINO(PROTOTYPES),
    large=((128, 16384), (256, 65536)),
    learner=DINO,
    of_two_views=_scores_of_both,
)

LEJEPA = Method(
    name="lejepa",
    title="LeJEPA",
    loss=f"SIGReg and invariance, λ = {LE_JEPA_LAMBDA}",
    fused=_fused_le_jepa,
    fused_over_ranks=None,
    plain=partial(distillation.le_jepa, lambda_param=LE_JEPA_LAMBDA),
    operators={"sslfast::characteristic_sums": "cpu", "sslfast::characteristic_sums_triton": "triton"},
    operators_over_ranks={},
    hidden=(256,),
    width=32,
    batch_size=256,
    learning_rate=2e-3,
    steps=300,
    large=((1024, 64), (4096, 64)),
    learner=LeJEPA,
    of_two_views=_on_slices,
)

METHODS = {each.name: each for each in (SIMCLR, BARLOW, VICREG, BYOL_, SIMSIAM, SWAV, DINO_, LEJEPA)}
