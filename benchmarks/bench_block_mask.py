"""Masks of blocks beside the Python generators of BEiT and DINOv2: ``images`` of ``side`` × ``side`` patches.

Every image has ``masked`` patches (BEiT: blocks of at least ``least`` = 16), or with ``spread`` = 1 as many as DINOv2
gives it, from a fifth of that to all of it. Every run draws anew: what is compared with the truth is how often each row
and each column of the grid is masked, and how many patches are.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import Tensor

import sslfast
from sslfast.masking import block_masks

from .harness import CALL, Case, Work, require_backend
from .masks_peers import beit_masks, dinov2_masks

BASELINES = ("beit", "dinov2")
PROVIDERS = (*BASELINES, "sslfast")
TINY = {"images": 250, "side": 14, "masked": 75, "least": 16, "spread": 0}

# The mean of 1,000 images is within 7 % of another 1,000's, of 250 within 13 %.
CHANCE, CHANCE_OF_FEW = 0.1, 0.2


def cases(device: str, quick: bool) -> list[Case]:
    """A thousand images of 14 × 14 patches: BEiT's recipe and DINOv2's."""
    usual = {"images": 1000, "side": 14}
    shapes = [{**usual, "masked": 75, "least": 16, "spread": 0}, {**usual, "masked": 98, "least": 4, "spread": 1}]
    return [Case("block_mask", shape, "bool", CALL, device) for shape in shapes]


def _counts(case: Case) -> Tensor:
    """[images] float64 of whole numbers."""
    most = float(case.shape["masked"])
    return torch.linspace(0.2 * most if case.shape["spread"] else most, most, case.shape["images"]).double().floor()


def _masks(case: Case, samples: Tensor, counts: Tensor, epoch: int) -> tuple[Tensor, ...]:
    """[images, side²] bool. BEiT's largest block is what is missing, DINOv2's half of the grid."""
    side, shape = case.shape["side"], case.shape
    most = side * side // 2 if shape["spread"] else None
    return (block_masks(samples, (side, side), counts, least=shape["least"], most=most, epoch=epoch),)


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider: a tensor of masks on the case's device, new ones each time."""
    counts, epochs = _counts(case), itertools.count()
    samples, on_device = torch.arange(len(counts)).to(case.device), counts.to(case.device)
    whole, side = counts.int().tolist(), case.shape["side"]

    def run(epoch: int) -> tuple[Tensor, ...]:
        if provider == "sslfast":
            return _masks(case, samples, on_device, epoch)
        if provider == "beit":
            made = beit_masks(len(whole), (side, side), case.shape["masked"], case.shape["least"])
        else:
            made = dinov2_masks(whole, (side, side))
        return (torch.from_numpy(made).flatten(1).to(case.device),)

    def proof() -> tuple[Tensor, ...]:
        states = random.getstate(), np.random.get_state()
        random.seed(0)
        np.random.seed(0)
        try:
            return statistics(case, *run(0))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    if provider == "sslfast":
        require_backend(lambda: run(0), "cuda" if case.device == "cuda" else "cpu")
        return Work(lambda: next(epochs), run, proof, tolerance=1e-12)  # the same bits as the reference's
    return Work(lambda: next(epochs), run, proof, CHANCE if case.shape["images"] >= 1000 else CHANCE_OF_FEW)


def statistics(case: Case, masks: Tensor) -> tuple[Tensor, ...]:
    """How often each row [side] and column [side] is masked, and the masked patches of an image."""
    shares = masks.cpu().double().view(-1, case.shape["side"], case.shape["side"]).mean(0)
    return shares.mean(1), shares.mean(0), shares.sum()


def truth(case: Case) -> tuple[Tensor, ...]:
    """The reference's masks in epoch 0."""
    counts = _counts(case)
    with sslfast.use_backend("reference"):
        return statistics(case, *_masks(case, torch.arange(len(counts)), counts, 0))


def cost(case: Case) -> tuple[float, float]:
    """Bytes written: what a block takes of arithmetic and of random numbers is not counted."""
    return 0.0, float(case.shape["images"] * case.shape["side"] ** 2)


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Each generator in its own recipe."""
    if provider in BASELINES and provider != BASELINES[case.shape["spread"]]:
        return f"measured with spread = {BASELINES.index(provider)}"
    return None
