"""What the parts of a step cost on either side, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from examples.common.measure import AGREEMENT, peak_memory_of

from .model import MaskedAutoencoder, Shape, build
from .sides import SIDES, Side
from .train import Schedule

MASKED = ("masking and embedding", "decoder's input", "loss")  # the parts in which the sides differ
PARTS = ("masking and embedding", "encoder", "decoder's input", "decoder", "loss")
ROUNDS_LEAST, ROUNDS_MOST = 5, 50
# ViT-B/16's patches and widths with MAE's decoder, without the blocks of either transformer.
LARGE = Shape(3, 224, 16, width=768, depth=0, decoder_width=512, decoder_depth=0)
LARGE_BATCH, LARGE_RATIO = 32, 0.75


@dataclass(frozen=True)
class Cost:
    """Cost of the parts of a step, forward and backward.

    Attributes:
        batch: B, images; ``length`` their patches, ``ratio`` the part of them that is masked.
        width, decoder_width: of the tokens.
        seconds: medians, by side and part.
        quartiles: first and third, of a step's parts together, by side.
        peak_bytes: extra peak memory of the parts together, by side; ``None`` where it was not measured.
        gradient_difference: ‖difference of the sides' gradients‖ / ‖gradient‖, of all weights together.
    """

    batch: int
    length: int
    ratio: float
    width: int
    decoder_width: int
    seconds: dict[str, dict[str, float]]
    quartiles: dict[str, tuple[float, float]]
    peak_bytes: dict[str, int | None]
    gradient_difference: float


def step_by_parts(
    model: MaskedAutoencoder, side: Side, images: Tensor, noise: Tensor, schedule: Schedule
) -> dict[str, float]:
    """One step, cut between its parts: the seconds of each, forward and backward. It sets the weights' gradients."""
    model.zero_grad()
    masks: Any = None

    def embed(images: Tensor) -> Tensor:
        nonlocal masks
        tokens, masks = side.embed(model, images, noise, schedule.ratio)
        return tokens

    parts: tuple[Callable[[Tensor], Tensor], ...] = (
        embed,
        lambda tokens: model.narrow(model.encoder(tokens)),
        lambda encoded: side.fill(model, encoded, masks),
        model.decode,
        lambda pred: side.loss(images, pred, masks, model.shape.patch, schedule.normalise),
    )
    seconds: dict[str, float] = {}
    tape: list[tuple[str, Tensor, Tensor]] = []
    x = images
    for name, part in zip(PARTS, parts, strict=True):
        x = x.detach().requires_grad_(len(tape) > 0)  # the images need no gradient
        start = time.perf_counter()
        out = part(x)
        seconds[name] = time.perf_counter() - start
        tape.append((name, x, out))
        x = out
    gradient = None
    for name, entering, leaving in reversed(tape):
        start = time.perf_counter()
        leaving.backward(gradient)
        seconds[name] += time.perf_counter() - start
        gradient = entering.grad
    return seconds


def cost(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, schedule: Schedule, most_seconds: float, memory: bool
) -> Cost:
    """Measure both sides in turn, after checking that they compute the same gradients.

    Args:
        images: [B, C, H, H], standardised.
        noise: [B, L].
        most_seconds: rounds go on for so long, but there are at least 5 and at most 50.
        memory: measure the peak as well, each side in a fresh process.

    Raises:
        RuntimeError: the sides' gradients differ, so that comparing their cost would mean nothing.
    """
    difference = gradient_difference(model, images, noise, schedule)
    if not difference <= AGREEMENT:
        raise RuntimeError(f"the sides {', '.join(SIDES)} disagree: their gradients differ by {difference:.1e}")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    start = time.perf_counter()
    for done in range(ROUNDS_MOST):
        if done >= ROUNDS_LEAST and time.perf_counter() - start > most_seconds:
            break
        for name, side in SIDES.items():
            rounds[name].append(step_by_parts(model, side, images, noise, schedule))
    quartiles: dict[str, tuple[float, float]] = {}
    peaks: dict[str, int | None] = dict.fromkeys(SIDES)
    for name, side in SIDES.items():
        q = statistics.quantiles([sum(each.values()) for each in rounds[name]], n=4, method="inclusive")
        quartiles[name] = (q[0], q[2])
        if memory:
            model.zero_grad()
            small = (model, side, images[:1].clone(), noise[:1].clone(), schedule)
            peaks[name] = peak_memory_of(
                partial(step_by_parts, model, side, images, noise, schedule), partial(step_by_parts, *small)
            )
    return Cost(
        batch=len(images),
        length=model.shape.length,
        ratio=schedule.ratio,
        width=model.shape.width,
        decoder_width=model.shape.decoder_width,
        seconds={
            name: {part: statistics.median(each[part] for each in times) for part in PARTS}
            for name, times in rounds.items()
        },
        quartiles=quartiles,
        peak_bytes=peaks,
        gradient_difference=difference,
    )


def large_cost(images: Tensor, schedule: Schedule, most_seconds: float) -> Cost:
    """The masked parts at the sizes of ViT-B/16: 32 images resampled to 224 × 224, 75 % masked, no transformer blocks.

    Args:
        images: [n, C, H, H] in [0, 1]; one channel becomes three.
    """
    chosen = images[torch.arange(LARGE_BATCH) % len(images)].expand(-1, LARGE.channels, -1, -1)
    chosen = F.interpolate(chosen, size=(LARGE.size, LARGE.size), mode="bilinear", align_corners=False)
    model = build(LARGE, chosen, schedule.seed)
    noise = torch.rand(LARGE_BATCH, LARGE.length, generator=Generator().manual_seed(schedule.seed))
    schedule = replace(schedule, ratio=LARGE_RATIO)
    return cost(model, model.standardise(chosen), noise, schedule, most_seconds, memory=True)


def gradient_difference(model: MaskedAutoencoder, images: Tensor, noise: Tensor, schedule: Schedule) -> float:
    """‖fused − plain‖ / ‖plain‖ of the gradients of all weights; also either side's first, untimed step."""
    gradients = {}
    for name, side in SIDES.items():
        step_by_parts(model, side, images, noise, schedule)
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    model.zero_grad()
    return float((gradients["fused"] - gradients["plain"]).norm() / gradients["plain"].norm())
