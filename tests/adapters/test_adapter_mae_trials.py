"""What ``sslfast.patch("mae")`` tries out before it serves a class, and that the trials leave no trace."""

from __future__ import annotations

import copy
import functools
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import sslfast
from adapter_common import peer
from mae_model import MaskedAutoencoderViT
from sslfast.adapters import mae

METHODS = ["forward_decoder", "forward_encoder", "forward_loss", "random_masking"]


@pytest.fixture(autouse=True)
def only_this_module(monkeypatch):
    """No class of another module of this process, which may have a masked autoencoder of its own."""
    monkeypatch.setattr(mae, "_classes", lambda real=CLASSES: [c for c in real() if c is MaskedAutoencoderViT])
    monkeypatch.delitem(sys.modules, mae.HUGGING_FACE, raising=False)


def variant(monkeypatch, **methods):
    """A loaded module with a class of the name that differs in ``methods``."""
    module = types.ModuleType("another_models_mae")
    body = {k: v for k, v in vars(MaskedAutoencoderViT).items() if k not in ("__dict__", "__weakref__")}
    module.Model = type("MaskedAutoencoderViT", (nn.Module,), body | {"__module__": module.__name__} | methods)
    for method in [m for m, function in methods.items() if function is None]:
        delattr(module.Model, method)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mae, "_classes", lambda real=CLASSES: [c for c in real() if c.__module__ == module.__name__])
    return module.Model


CLASSES = mae._classes


def detached(self, x, mask_ratio):
    self.patch_embed.proj.weight.requires_grad_(False)
    try:
        return MaskedAutoencoderViT.forward_encoder(self, x, mask_ratio)
    finally:
        self.patch_embed.proj.weight.requires_grad_()


def large_patches(self, imgs, pred, mask):
    return ((pred - self.patchify(imgs)).square().mean(-1) * mask).sum() / mask.numel()


def keeping(count):
    """``random_masking`` that keeps another number of tokens."""

    def random_masking(self, x, mask_ratio):
        length = x.shape[1]
        return MaskedAutoencoderViT.random_masking(self, x, 1 - (count(length, mask_ratio) + 0.5) / length)

    return random_masking


def other_noise_for_evaluation(self, x, mask_ratio):
    if not self.training:
        torch.rand(1)
    return MaskedAutoencoderViT.random_masking(self, x, mask_ratio)


def mean_per_image(self, imgs, pred, mask):
    each = zip(imgs.split(1), pred.split(1), mask.split(1), strict=True)
    return torch.stack([MaskedAutoencoderViT.forward_loss(self, *one) for one in each]).mean()


@pytest.mark.parametrize(
    ("method", "body", "reason"),
    [
        ("forward_encoder", detached, "does not compute"),
        ("forward_loss", large_patches, "does not compute"),
        ("forward_loss", mean_per_image, "does not compute"),
        ("random_masking", keeping(lambda length, ratio: round(length * (1 - ratio))), "does not compute"),
        ("random_masking", keeping(lambda length, ratio: int(length - length * ratio)), "does not compute"),
        ("random_masking", other_noise_for_evaluation, "does not compute"),
        ("forward_encoder", lambda self, x, mask_ratio, ids=None: None, "its arguments"),
    ],
)
def test_a_changed_method_is_left_alone(monkeypatch, method, body, reason):
    model = variant(monkeypatch, **{method: body})
    with sslfast.patch("mae") as patched:
        assert all(reason in why for why in patched.unchanged.values())
        left = [name for name in METHODS if not hasattr(vars(model)[name], "__sslfast__")]
        # The fast encoder draws its masks without the class's masking.
        assert left == (["forward_encoder", method] if method == "random_masking" else [method])
        assert list(patched.unchanged) == [f"another_models_mae.MaskedAutoencoderViT.{name}" for name in left]


def test_a_constructor_with_more_arguments_is_left_alone(monkeypatch):
    def init(self, img_size=24, mask_mode="random"):
        MaskedAutoencoderViT.__init__(self, img_size)

    variant(monkeypatch, __init__=init)
    with sslfast.patch("mae") as patched:
        assert patched.replaced == () and len(patched.unchanged) == 4
        assert all("takes mask_mode" in reason for reason in patched.unchanged.values())


def test_no_such_class(monkeypatch):
    variant(monkeypatch, random_masking=lambda self, x, mask_sequence: None)
    with pytest.raises(ImportError, match="no loaded module has a class MaskedAutoencoderViT"):
        sslfast.patch("mae")


def test_patching_leaves_the_random_numbers_alone(monkeypatch):
    real = MaskedAutoencoderViT.__init__

    @functools.wraps(real)
    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        np.random.rand()
        random.random()

    monkeypatch.setattr(MaskedAutoencoderViT, "__init__", init)

    def drawn():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    def start():
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    start()
    expected = drawn()
    start()
    with sslfast.patch("mae"):
        assert drawn() == expected


def test_patching_leaves_the_seeds_of_gpus_alone(monkeypatch):
    """torch.manual_seed seeds every GPU too, or notes the seed for when CUDA starts."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(3)
    assert seeds == [3]
    with sslfast.patch("mae"):
        assert seeds == [3]


def test_the_trials_run_on_the_cpu():
    """With a default device the small models would be built there, from its random numbers."""
    with torch.device("meta"), sslfast.patch("mae") as patched:
        assert patched.unchanged == {}


def test_vit_mae_that_rounds_is_left_alone(monkeypatch):
    vit_mae = peer(mae.HUGGING_FACE)
    monkeypatch.setitem(sys.modules, mae.HUGGING_FACE, vit_mae)
    real = vit_mae.ViTMAEEmbeddings.random_masking

    def random_masking(self, sequence, noise=None):
        length = sequence.shape[1]
        config = copy.copy(self.config)
        config.mask_ratio = 1 - (round(length * (1 - self.config.mask_ratio)) + 0.5) / length
        return real(types.SimpleNamespace(config=config), sequence, noise)

    monkeypatch.setattr(vit_mae.ViTMAEEmbeddings, "random_masking", random_masking)
    with sslfast.patch("mae") as patched:
        assert {"ViTMAEEmbeddings.random_masking", "ViTMAEEmbeddings.forward"} < set(patched.unchanged)
