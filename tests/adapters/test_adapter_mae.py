"""MAE-style models with sslfast inside: the same tokens, masks, losses and gradients for the same seed."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import sslfast
from adapter_common import left_to_package, peer, same_as_package
from mae_model import MaskedAutoencoderViT
from sslfast.adapters import mae

METHODS = ["forward_decoder", "forward_encoder", "forward_loss", "random_masking"]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def only_this_module(monkeypatch):
    """No class of another module of this process, which may have a masked autoencoder of its own."""
    monkeypatch.setattr(mae, "_classes", lambda real=mae._classes: [c for c in real() if c is MaskedAutoencoderViT])
    monkeypatch.delitem(sys.modules, mae.HUGGING_FACE, raising=False)


def seeded(call):
    """``call`` with the same random numbers each time."""

    def run(*inputs):
        torch.manual_seed(5)
        return call(*inputs)

    return run


def step(model, ratio=0.75):
    """A training step's numbers: the encoder's, all three results, and every parameter's gradient."""
    copies = {dtype: copy.deepcopy(model).to(dtype) for dtype in DTYPES}

    def run(images):
        here = copies[images.dtype]
        here.zero_grad()
        loss, pred, mask = here(images.detach(), ratio)  # pixels do not learn
        gradients = torch.autograd.grad(loss, [p for p in here.parameters() if p.requires_grad], retain_graph=True)
        return loss, pred, mask, [g.detach() for g in gradients]

    return seeded(run)


def images(batch, model, dtype=torch.float32):
    return torch.rand(batch, 3, *model.patch_embed.img_size, dtype=dtype)


def test_what_is_served():
    with sslfast.patch("mae") as patched:
        assert patched.replaced == ("MaskedAutoencoderViT",)
        assert patched.unchanged == {}
        served = [name for name in METHODS if hasattr(vars(MaskedAutoencoderViT)[name], "__sslfast__")]
        assert served == METHODS
    assert not any(hasattr(vars(MaskedAutoencoderViT)[name], "__sslfast__") for name in METHODS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "patch", "ratio"), [(4, 8, 0.75), (1, 4, 0.5), (3, 3, 0.9), (2, 6, 0.4)])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_training_step(batch, patch, ratio, normalise, dtype):
    torch.manual_seed(batch)
    model = MaskedAutoencoderViT(patch_size=patch, norm_pix_loss=normalise)
    same_as_package("mae", step(model, ratio), images(batch, model, dtype), floor=10.0)


def test_same_masks_for_the_same_seed():
    model = MaskedAutoencoderViT(patch_size=3)
    x = torch.randn(5, 64, 7)
    mask_of = seeded(lambda: model.random_masking(x, 0.7))
    own = mask_of()
    after = torch.rand(1)
    with sslfast.patch("mae"):
        fast = mask_of()
        assert torch.equal(torch.rand(1), after)  # no more and no fewer random numbers
    for mine, theirs in zip(fast, own, strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_gradient_of_the_images():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT()
    wide = copy.deepcopy(model).double()
    same_as_package(
        "mae",
        seeded(lambda x: (wide if x.dtype == torch.float64 else model).forward_encoder(x, 0.6)[0]),
        images(3, model),
        floor=10.0,
    )


def test_under_autocast():
    """The positions are added to the 16-bit projection in float32, and the residual stream stays float32."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT()
    x = images(3, model)

    @seeded
    def run():
        kinds = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: kinds.append((args[0].dtype, args[0])))
        with torch.autocast("cpu", torch.bfloat16):
            loss, pred, _ = model(x)
        handle.remove()
        return loss, pred, kinds

    own, own_pred, own_kinds = run()
    with sslfast.patch("mae"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        fast, pred, kinds = run()
    assert (fast.dtype, pred.dtype, kinds[0][0]) == (own.dtype, own_pred.dtype, own_kinds[0][0])
    torch.testing.assert_close(kinds[0][1], own_kinds[0][1], rtol=0.01, atol=0.01)
    torch.testing.assert_close(fast, own, rtol=0.01, atol=0)


def test_compiles_in_one_graph():
    model = MaskedAutoencoderViT()
    x = images(2, model)
    with sslfast.patch("mae"):
        plain = seeded(model)(x)
        compiled = seeded(torch.compile(model, fullgraph=True, backend="eager"))(x)
    torch.testing.assert_close(compiled, plain)


def test_pickles_and_state():
    model = MaskedAutoencoderViT()
    keys = list(model.state_dict())
    with sslfast.patch("mae"):
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is MaskedAutoencoderViT and list(again.state_dict()) == keys


class Own(MaskedAutoencoderViT):
    def random_masking(self, x, mask_ratio):
        return super().random_masking(x.flip(1), mask_ratio)

    def patchify(self, imgs):
        return super().patchify(imgs) + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "__class__", Own), "random_masking of its own"),
        (lambda m: setattr(m.patch_embed, "norm", nn.LayerNorm(32)), "more than a projection"),
        (lambda m: m.patch_embed.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: m.patch_embed.proj.register_forward_hook(lambda *_: None), "hooks"),
        (lambda m: vars(m.patch_embed.proj).update(dilation=(2, 2), padding=(4, 4)), "overlap"),
        (lambda m: setattr(m, "pos_embed", nn.Parameter(torch.randn(1, 10, 1))), "position table"),
    ],
)
def test_other_encoders_are_the_model_s_own(change, reason):
    model = MaskedAutoencoderViT()
    change(model)
    left_to_package("mae", seeded(lambda x: model.forward_encoder(x, 0.5)), images(2, model), reason=reason)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, x, p, k: m.forward_loss(x, p, 0.5 * k), "other numbers than 0 and 1"),
        (lambda m, x, p, k: m.forward_loss(x.requires_grad_(), p, k), "gradient for the images"),
        (lambda m, x, p, k: m.forward_loss(x, p, k.int()), "a mask of torch.int32"),
        (lambda m, x, p, k: m.forward_loss(x, p[:1], k), "predictions of shape"),
        (lambda m, x, p, k: m.random_masking(p, -0.5), "mask ratio of -0.5"),
        (lambda m, x, p, k: m.random_masking(p, 1.0), "keeps nothing"),
        (lambda m, x, p, k: m.forward_decoder(p[:, :4, :32], torch.zeros(2, 9, dtype=torch.int64)), "every place"),
    ],
)
def test_other_arguments_are_the_model_s_own(call, reason):
    model = MaskedAutoencoderViT()
    x, mask = images(2, model), (torch.arange(18) % 3 > 0).float().view(2, 9)
    left_to_package("mae", seeded(lambda p: call(model, x, p, mask)), torch.randn(2, 9, 192), reason=reason)


@pytest.mark.parametrize("places", [torch.zeros(2, 9, dtype=torch.int64), torch.arange(18).view(2, 9) % 9 * 1.0])
def test_a_decoder_that_is_left_embeds_once(places):
    model, calls = MaskedAutoencoderViT(), []
    model.decoder_embed.register_forward_hook(lambda *_: calls.append(1))
    with sslfast.patch("mae"), warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # an index of floats
        warnings.simplefilter("ignore")
        model.forward_decoder(torch.randn(2, 4, 32), places)
    assert calls == [1]


def test_in_a_graph_values_are_not_looked_at():
    """As docs/mae.md says: a mask of other numbers gives NaN; ids_restore that are no permutation, an error."""
    model, pred = MaskedAutoencoderViT(), torch.randn(2, 9, 192)
    x, mask = images(2, model), torch.full((2, 9), 0.5)
    own = model.forward_loss(x, pred, mask)
    with sslfast.patch("mae"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.compile(model.forward_loss, fullgraph=True, backend="eager")(x, pred, mask).isnan()
        torch.testing.assert_close(model.forward_loss(x, pred, mask), own)
        with pytest.raises(RuntimeError, match="must be a permutation"):
            places = torch.zeros(2, 9, dtype=torch.int64)
            torch.compile(model.forward_decoder, fullgraph=True, backend="eager")(torch.randn(2, 4, 32), places)


def test_its_errors_are_its_own():
    model = MaskedAutoencoderViT()
    with sslfast.patch("mae"):
        with pytest.raises(ValueError, match="images of the wrong size"):
            model(torch.rand(2, 3, 32, 32))
        with pytest.raises(AssertionError):
            model.forward_loss(torch.rand(2, 3, 24, 32), torch.rand(2, 12, 192), torch.ones(2, 12))


# --------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def vit_mae(monkeypatch):
    module = peer(mae.HUGGING_FACE)
    monkeypatch.setitem(sys.modules, mae.HUGGING_FACE, module)
    return module


def hugging_face(module, **options):
    torch.manual_seed(0)
    config = module.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=24,
        patch_size=6,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        **options,
    )
    return module.ViTMAEForPreTraining(config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vit_mae(vit_mae, dtype):
    model = hugging_face(vit_mae)
    wide = copy.deepcopy(model).double()
    noise = torch.rand(3, 16)

    def run(x, y):
        here = wide if x.dtype == torch.float64 else model
        drawn, given = here(x), here(y, noise=noise)
        states = here(y, noise=noise, output_hidden_states=True).hidden_states
        return drawn.loss, drawn.logits, given.loss, given.mask, given.ids_restore, states

    same_as_package("mae", seeded(run), *torch.rand(2, 3, 3, 24, 24, dtype=dtype).unbind(), floor=10.0)


def test_vit_mae_is_served_in_parts(vit_mae):
    with sslfast.patch("mae") as patched:
        assert patched.replaced == ("MaskedAutoencoderViT", "ViTMAEDecoder", "ViTMAEEmbeddings")
        assert list(patched.unchanged) == ["ViTMAEForPreTraining"]


def test_vit_mae_with_other_arguments(vit_mae, monkeypatch):
    real = vit_mae.ViTMAEDecoder.forward

    def forward(self, hidden_states, ids_restore, output_attentions=False, interpolate_pos_encoding=False):
        return real(self, hidden_states, ids_restore, interpolate_pos_encoding)

    monkeypatch.setattr(vit_mae.ViTMAEDecoder, "forward", forward)
    with sslfast.patch("mae") as patched:
        assert "ViTMAEDecoder.forward" in patched.unchanged and "ViTMAEDecoder" not in patched.replaced


def test_vit_mae_decoder_that_is_left_embeds_once(vit_mae):
    decoder, calls = hugging_face(vit_mae).decoder, []
    decoder.decoder_embed.register_forward_hook(lambda *_: calls.append(1))
    with sslfast.patch("mae"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder(torch.randn(2, 5, 32), torch.zeros(2, 16, dtype=torch.int64))
    assert calls == [1]


def test_vit_mae_with_interpolated_positions(vit_mae):
    model = hugging_face(vit_mae)
    left_to_package(
        "mae",
        seeded(lambda x: model.vit.embeddings(x, interpolate_pos_encoding=True)),
        torch.rand(2, 3, 30, 30),
        reason="interpolated positions",
    )
