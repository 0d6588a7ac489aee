"""The masked autoencoder of the demos: both sides compute the same, mask what they say, and a small run ends well."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from PIL import Image
from rich.console import Console

from example_common import numbers
from examples.common import measure
from examples.common.data import load
from examples.mae import costs, run as mae
from examples.mae.model import MaskedAutoencoder, Shape, build
from examples.mae.sides import SIDES, patchify, unpatchify
from examples.mae.train import Schedule, epoch_of_noise, train
from examples.pretrain import __main__ as demo

SCHEDULE = Schedule(epochs=1, batch_size=64, learning_rate=1e-3, ratio=0.6, normalise=True, seed=0)
every_side = pytest.mark.parametrize("side", SIDES.values(), ids=SIDES.keys())


def _case(batch: int = 5) -> tuple[MaskedAutoencoder, torch.Tensor, torch.Tensor]:
    """A model with images of 3 channels and 5 × 5 patches, and noise for them."""
    generator = Generator().manual_seed(0)
    shape = Shape(channels=3, size=15, patch=3, width=24, depth=1, decoder_width=12, decoder_depth=1, heads=2)
    images = torch.rand(batch, 3, 15, 15, generator=generator)
    model = build(shape, images, seed=0)
    return model, model.standardise(images), torch.rand(batch, shape.length, generator=generator)


@pytest.mark.parametrize("normalise", [True, False])
def test_sides_have_the_same_gradients(normalise: bool) -> None:
    model, images, noise = _case()
    assert costs.gradient_difference(model, images, noise, replace(SCHEDULE, normalise=normalise)) < 1e-5
    # No gradient is left out of the comparison, and none is zero but those of keys' biases, which softmax cancels.
    costs.step_by_parts(model, SIDES["fused"], images, noise, SCHEDULE)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_loss_curves_agree() -> None:
    images = load("digits").train[:512]
    shape = Shape(1, 8, 2, width=32, depth=2, decoder_width=16, decoder_depth=1)
    initial = build(shape, images, seed=0)
    curves = {}
    for name, side in SIDES.items():
        model = initial.copy()
        curves[name] = train(model, images, side, replace(SCHEDULE, epochs=5, learning_rate=3e-3), name)[0]
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), initial.parameters(), strict=True))
    fused, plain = curves["fused"], curves["plain"]
    assert len(fused) == len(plain) == 5 * 8
    assert fused[:10] == pytest.approx(plain[:10], rel=1e-5)  # rounding; training then magnifies it
    assert fused == pytest.approx(plain, rel=5e-3)
    assert np.mean(fused[-8:]) < 0.8 * np.mean(fused[:8])


@every_side
def test_encoder_sees_visible_patches_and_loss_masked_ones(side: Any) -> None:
    model, images, noise = _case()
    patch, ratio = model.shape.patch, 0.6
    hidden = noise.argsort(dim=1).argsort(dim=1) >= 10  # K = int(25 · 0.4)
    patches = patchify(images, patch)
    pred = torch.randn(patches.shape, generator=Generator().manual_seed(1))
    blank = torch.zeros_like(patches)
    only_visible = unpatchify(torch.where(hidden[..., None], blank, patches), patch, 3)
    only_masked = unpatchify(torch.where(hidden[..., None], patches, blank), patch, 3)
    with torch.no_grad():
        tokens, masks = side.embed(model, images, noise, ratio)
        assert tokens.shape == (5, 11, 24)
        assert torch.equal(side.embed(model, only_visible, noise, ratio)[0], tokens)
        assert not torch.equal(side.embed(model, only_masked, noise, ratio)[0][:, 1:], tokens[:, 1:])
        for normalise in (True, False):
            loss = side.loss(images, pred, masks, patch, normalise)
            assert torch.equal(side.loss(only_masked, pred, masks, patch, normalise), loss)
            wanted = patches[hidden]
            if normalise:
                wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.var(1, keepdim=True) + 1e-6).sqrt()
            torch.testing.assert_close(loss, (pred[hidden] - wanted).square().mean(), rtol=1e-5, atol=0)
        filled = side.fill(model, model.narrow(tokens), masks) - model.decoder_position
        mask_token = model.mask_token.expand_as(filled[:, 1:][hidden])
        torch.testing.assert_close(filled[:, 1:][hidden], mask_token, rtol=1e-5, atol=1e-6)


def test_patches_are_cut_and_joined() -> None:
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 9, 12)
    assert torch.equal(patches[1, 5].reshape(2, 2, 3), images[1, :, 2:4, 4:6].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 2, 3), images)


def test_noise_belongs_to_image_and_epoch() -> None:
    noise = epoch_of_noise(50, 16, seed=3, epoch=1)
    assert torch.equal(noise, epoch_of_noise(50, 16, seed=3, epoch=1))
    for other in (epoch_of_noise(50, 16, seed=3, epoch=2), epoch_of_noise(50, 16, seed=4, epoch=1)):
        assert (noise != other).double().mean() > 0.99


def test_reconstruction_keeps_what_is_visible() -> None:
    model, standard, _ = _case()
    images = standard * model.std + model.mean
    shown, masked, restored = mae.reconstructions(model, images, SCHEDULE)
    assert shown is images
    hidden = patchify((masked == 0.5).float(), 3).amin(dim=-1) == 1
    assert hidden.sum(dim=1).tolist() == [15] * 5
    visible = ~hidden
    for changed in (masked, restored):
        assert torch.equal(patchify(changed, 3)[visible], patchify(images, 3)[visible])
    assert (patchify(restored, 3)[hidden] - patchify(images, 3)[hidden]).abs().max() > 1e-3


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mae, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(costs, "LARGE_BATCH", 2)
    console = Console(record=True, width=120, file=open(tmp_path / "terminal.txt", "w"))  # noqa: SIM115
    monkeypatch.setattr(demo, "Console", lambda: console)
    torch_state = torch.get_rng_state()
    demo.main(["--method", "mae", "--epochs", "1", "--output", str(tmp_path)])
    assert torch.equal(torch.get_rng_state(), torch_state)

    content = json.loads((tmp_path / "mae_digits.json").read_text())
    fused, plain = content["curves"]["fused"], content["curves"]["plain"]
    assert len(fused) == content["settings"]["steps"] and fused == pytest.approx(plain, rel=5e-3)
    assert all(math.isfinite(number) for number in numbers(content))
    for kind in content["accuracies"].values():
        assert set(kind) == {"fused", "plain", "untrained", "raw pixels"}
        assert all(0.2 < accuracy <= 1 for accuracy in kind.values())
    for cost in (content["cost"], content["large_cost"]):
        assert cost["gradient_difference"] <= measure.AGREEMENT
        assert all(second > 0 for parts in cost["seconds"].values() for second in parts.values())
    assert content["large_cost"]["length"] == 196

    with Image.open(tmp_path / "mae_digits.png") as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image.convert("L")))) > 50
    shown = console.export_text()
    assert "raw pixels" in shown and "masking and embedding" in shown and "sizes of ViT-B/16" in shown


def test_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--method", "mae"])
    assert "runs on one process" in capsys.readouterr().err
