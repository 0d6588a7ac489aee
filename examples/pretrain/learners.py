"""What is trained, beside the loss: predictors, prototypes, a teacher that follows the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Model

EmaUpdate = Callable[[nn.Module, nn.Module, float], object]
MOMENTUM = 0.99  # of the teacher at first; it rises to 1 as a straight line


class Learner(nn.Module):
    """Two views of an image whose embeddings the loss compares.

    Args:
        model: trained in place.
        loss: takes the embeddings of both views, [n, D] each.
        ema_update: moves a teacher's parameters and buffers towards a student's.
    """

    global_views = 2
    local_views = 0  # crops of smaller parts, which a teacher does not see

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__()
        self.encoder, self.projector, self.loss = model.encoder, model.projector, loss

    @property
    def model(self) -> Model:
        """Encoder and projector."""
        return Model(self.encoder, self.projector)

    def forward(self, views: Tensor) -> Tensor:
        """[] loss of views [V, n, C, s, s]."""
        loss: Tensor = self.loss(*self.embed(views))
        return loss

    def embed(self, views: Tensor) -> tuple[Tensor, ...]:
        """[n, D] embeddings of each view; batch norms see all views at once."""
        return self.projector(self.encoder(views.flatten(0, 1))).chunk(len(views))

    def after_step(self, progress: float) -> None:
        """What follows the optimiser's step; ``progress`` is the part of the training that is done."""

    def findings(self) -> dict[str, float]:
        """What tells collapse, of the last batch."""
        return {}


def _predictor(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, width))


def _width(model: Model) -> int:
    last = list(model.projector.children())[-1]
    assert isinstance(last, nn.Linear)
    return last.out_features


def _spread(z: Tensor) -> float:
    """The mean standard deviation of a column of the normalised rows times √D: 1 where they fill the sphere, 0 after
    a collapse to one point."""
    z = F.normalize(z.detach())
    return float(z.std(dim=0).mean() * z.shape[1] ** 0.5)


class SimSiam(Learner):
    """Predictions of one view against the embeddings of the other, without a gradient (Chen & He 2021).

    The loss takes predictions and targets: (p0, p1, z0, z1), [n, D] each.
    """

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__(model, loss, ema_update)
        self.predictor = _predictor(_width(model))
        self.last: Tensor | None = None

    def forward(self, views: Tensor) -> Tensor:
        z = self.embed(views)
        p0, p1 = self.predictor(torch.cat(z)).chunk(2)
        z0, z1 = self.targets(views, z)
        self.last = z0.detach()
        loss: Tensor = self.loss(p0, p1, z0, z1)
        return loss

    def targets(self, views: Tensor, z: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the predictions are compared with."""
        return tuple(each.detach() for each in z)

    def findings(self) -> dict[str, float]:
        return {} if self.last is None else {"spread of the targets": _spread(self.last)}


class Teacher(nn.Module):
    """A moving average of a student's encoder and projector, in training mode: batch statistics are its own."""

    def __init__(self, model: Model, ema_update: EmaUpdate) -> None:
        super().__init__()
        copy = model.copy()
        self.encoder, self.projector = copy.encoder, copy.projector
        self.requires_grad_(False)
        self.ema_update = ema_update

    @torch.no_grad()
    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        """[n, D] of each view."""
        return self.projector(self.encoder(views.flatten(0, 1))).chunk(len(views))

    def follow(self, student: Learner, progress: float) -> None:
        """One step of the average."""
        momentum = 1 - (1 - MOMENTUM) * (1 - progress)
        for mine, theirs in ((self.encoder, student.encoder), (self.projector, student.projector)):
            self.ema_update(mine, theirs, momentum)


class BYOL(SimSiam):
    """Targets are a teacher's (Grill et al. 2020)."""

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__(model, loss, ema_update)
        self.teacher = Teacher(model, ema_update)

    def targets(self, views: Tensor, z: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.teacher(views)

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self, progress)


class _Prototypes(Learner):
    """Scores of normalised embeddings and normalised prototypes [K, D]."""

    prototypes = 256
    local_views = 2

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__(model, loss, ema_update)
        width = _width(model)
        self.prototypes_of_student = nn.Parameter(F.normalize(torch.randn(self.prototypes, width)))
        self.found: Any = None

    @staticmethod
    def scores(z: Sequence[Tensor], prototypes: Tensor) -> list[Tensor]:
        """[n, K] of each view."""
        weight = F.normalize(prototypes)
        return [F.normalize(each) @ weight.T for each in z]

    def findings(self) -> dict[str, float]:
        if self.found is None:
            return {}
        return {
            "loss − ln K": float(self.found.loss_above_uniform),
            f"prototypes used of {self.prototypes}": float(self.found.usage_perplexity),
        }


class SwAV(_Prototypes):
    """Views predict one another's assignments to prototypes (Caron et al. 2020).

    The loss takes lists of scores: (of the global views, of the local ones).
    """

    def forward(self, views: Tensor) -> Tensor:
        scores = self.scores(self.embed(views), self.prototypes_of_student)
        loss, self.found = diagnosed(self.loss(scores[:2], scores[2:]))
        return loss


class DINO(_Prototypes):
    """The student predicts the teacher's softmax over prototypes (Caron et al. 2021).

    The loss takes lists of scores: (the teacher's of the global views, the student's of all views).
    """

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__(model, loss, ema_update)
        self.teacher = Teacher(model, ema_update)
        self.register_buffer("prototypes_of_teacher", self.prototypes_of_student.detach().clone())

    def forward(self, views: Tensor) -> Tensor:
        student = self.scores(self.embed(views), self.prototypes_of_student)
        teacher = self.scores(self.teacher(views[:2]), self.prototypes_of_teacher)
        loss, self.found = diagnosed(self.loss(teacher, student))
        return loss

    def after_step(self, progress: float) -> None:
        self.teacher.follow(self, progress)
        with torch.no_grad():
            momentum = 1 - (1 - MOMENTUM) * (1 - progress)
            self.prototypes_of_teacher.lerp_(self.prototypes_of_student, 1 - momentum)


def diagnosed(result: Any) -> tuple[Tensor, Any]:
    """A loss, and the diagnostics that came with it, or ``None``."""
    return result if isinstance(result, tuple) and not isinstance(result, Tensor) else (result, None)


class LeJEPA(Learner):
    """Embeddings of all views near their mean, their distribution a standard normal one (Balestriero & LeCun 2025).

    The loss takes the embeddings of all views [V, n, D] and slices [D, S], new ones in every step.
    """

    def __init__(self, model: Model, loss: Any, ema_update: EmaUpdate) -> None:
        super().__init__(model, loss, ema_update)
        self.steps, self.deviation = 0, float("nan")

    def forward(self, views: Tensor) -> Tensor:
        z = torch.stack(self.embed(views))
        self.deviation = float(z[0].detach().std(dim=0).mean())
        loss: Tensor = self.loss(z, slices_of(z.shape[2], self.steps))
        return loss

    def after_step(self, progress: float) -> None:
        self.steps += 1

    def findings(self) -> dict[str, float]:
        return {"standard deviation of the embeddings": self.deviation}


def slices_of(width: int, step: int, count: int = 256) -> Tensor:
    """[D, S] random directions of one step."""
    return F.normalize(torch.randn(width, count, generator=torch.Generator().manual_seed(step)), dim=0)
