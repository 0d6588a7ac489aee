"""open_clip with sslfast inside: the same losses, gradients and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from adapter_common import left_to_package, peer, same_as_package, values_and_gradients
from helpers import GRAD_LOSS, roundings, within_budget

DTYPES = [torch.float32, torch.float64]
SHAPES = [(64, 32), (101, 30), (2, 5), (1, 8), (33, 1)]


@pytest.fixture(scope="module")
def loss():
    return peer("open_clip.loss")


def features(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Normalised images and texts that are related, as in training; repeated rows among them."""
    image = torch.randn(rows, width, dtype=dtype)
    text = image + 0.7 * torch.randn(rows, width, dtype=dtype)
    text[-1] = text[0]
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip(loss, shape, dtype, scale):
    image, text = features(*shape, dtype)
    scale, bias = number(scale, dtype), number(-2.0, dtype)
    floor = scale.item()
    same_as_package("open_clip", lambda *x: loss.ClipLoss()(*x), image, text, scale, floor=floor)
    same_as_package("open_clip", lambda *x: loss.ClipLoss()(*x), image, text, scale, bias, floor=floor + 2)
    same_as_package("open_clip", lambda *x: loss.ClipLoss()(*x, floor, output_dict=True), image, text, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dist_impl", [None, "gather"])
def test_sig_lip(loss, shape, dtype, dist_impl):
    image, text = features(*shape, dtype)
    scale, bias = number(10.0, dtype), number(-10.0, dtype)

    def call(*x: Tensor) -> Tensor:
        return loss.SigLipLoss(dist_impl=dist_impl)(*x)

    same_as_package("open_clip", call, image, text, scale, bias, floor=20.0)
    same_as_package("open_clip", lambda *x: call(*x, None), image, text, scale, floor=10.0 * shape[0])
    same_as_package("open_clip", lambda *x: loss.SigLipLoss()(*x, 10.0, -10, output_dict=True), image, text, floor=20.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [0.7, 0.0])
def test_coca(loss, dtype, weight):
    """The contrastive half; the caption half is the package's, bit for bit."""
    image, text = features(21, 12, dtype)
    logits, labels = torch.randn(21, 6, 11, dtype=dtype), torch.randint(0, 11, (21, 6))
    scale = number(14.3, dtype)

    def call(image: Tensor, text: Tensor, logits: Tensor, scale: Tensor, labels: Tensor) -> object:
        return loss.CoCaLoss(2.0, weight)(image, text, logits, labels, scale, output_dict=True)

    same_as_package("open_clip", call, image, text, logits, scale, labels, floor=14.3)
    with torch.no_grad():
        own = call(image, text, logits, scale, labels)["caption_loss"]
        with sslfast.patch("open_clip"):
            assert torch.equal(call(image, text, logits, scale, labels)["caption_loss"], own)


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_a_frozen_tower(loss, kind, frozen):
    """Locked-image training: the other tower, the scale and the bias learn."""
    image, text = features(37, 16, torch.float64)

    def call(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        image = image.detach() if frozen != "text" else image
        text = text.detach() if frozen != "image" else text
        return getattr(loss, kind)()(image, text, scale, bias)

    same_as_package("open_clip", call, image, text, number(9.0, torch.float64), number(-3.0, torch.float64), floor=12.0)


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bits(loss, kind, autocast):
    """Sums are float32 and so is the loss; nearer to the truth than the package's own."""
    image, text = (x.bfloat16() for x in features(96, 24))
    inputs = [image, text, number(20.0), number(-5.0)]
    if autocast:
        inputs[1] = text.float()  # a tower whose last layer ran in float32

    def call(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return getattr(loss, kind)()(*x)

    truth = values_and_gradients(lambda *x: getattr(loss, kind)()(*x), [x.double() for x in inputs])
    own = roundings(values_and_gradients, call, inputs)
    with sslfast.patch("open_clip"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        mine = values_and_gradients(call, inputs)
    assert mine[0].dtype == torch.float32
    for i, (fast, plain, true) in enumerate(zip(mine, own, truth, strict=True)):
        assert i == 0 or fast.dtype == inputs[i - 1].dtype
        floor = 25.0 if i == 0 else GRAD_LOSS * 25.0 / image.numel()
        within_budget(f"{kind}, {i}", fast, plain, true, torch.bfloat16, floor)


def test_left_to_the_package(loss):
    image, text = features(9, 4)
    scale = number(3.0)

    class Mine(loss.ClipLoss):
        def get_logits(self, *x: Tensor, logit_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return tuple(2 * y for y in super().get_logits(*x, logit_bias=logit_bias))

    class Smoothed(loss.SigLipLoss):
        def get_ground_truth(self, *x: object, **how: object) -> Tensor:
            return 0.9 * super().get_ground_truth(*x, **how)

    def left(call: object, *inputs: Tensor, reason: str) -> None:
        left_to_package("open_clip", call, *inputs, reason=reason)

    left(lambda *x: Mine()(*x), image, text, scale, reason="Mine has a get_logits of its own")
    left(lambda *x: Smoothed()(*x, None), image, text, scale, reason="Smoothed has a get_ground_truth of its own")
    left(lambda *x: loss.ClipLoss()(*x, 1.0, torch.eye(9)), image, text, reason=r"logit_bias of shape \(9, 9\)")
    left(lambda *x: loss.ClipLoss()(*x), image, text, torch.rand(9, 1), reason=r"logit_scale of shape \(9, 1\)")
    left(lambda *x: loss.SigLipLoss()(*x, 1.0, torch.eye(9)), image, text, reason=r"logit_bias of shape \(9, 9\)")
    left(lambda *x: loss.ClipLoss()(*x, torch.tensor(3)), image, text, reason="logit_scale of shape .*int64")
    # Bit for bit also where sslfast's path could be taken by mistake.
    left(lambda *x: loss.ClipLoss()(*x, True), image, text, reason="logit_scale is no number but bool")
    left(
        lambda *x: loss.SigLipLoss()(*x, 2.0, torch.ones(1, dtype=torch.float64)),
        image,
        text,
        reason="which is wider than",
    )


def test_errors_are_the_package_s_own(loss):
    image, text = features(9, 4)
    for arguments in (
        (loss.ClipLoss(), image, text[:5], 1.0),
        (loss.ClipLoss(), image, text[:, :3], 1.0),
        (loss.ClipLoss(), image, text, None),
        (loss.ClipLoss(), image.tolist(), text, 1.0),
        (loss.ClipLoss(), image, text, torch.ones(1, dtype=torch.float64)),
        (loss.ClipLoss(world_size=2), image, text, 1.0),
        (loss.ClipLoss(world_size=2, use_horovod=True), image, text, 1.0),
        (loss.SigLipLoss(), image, text[:5], 1.0, 0.0),
        (loss.SigLipLoss(), image, text),
        (loss.SigLipLoss(world_size=2), image, text, 1.0, 0.0),
    ):
        call, *rest = arguments
        with pytest.raises(Exception) as own:  # noqa: PT011  (whatever it is)
            call(*rest)
        with sslfast.patch("open_clip"), pytest.raises(type(own.value)) as mine:
            call(*rest)
        if "required positional" not in str(own.value):  # that one names the function
            assert str(mine.value) == str(own.value)


def test_output_dict(loss):
    image, text = features(9, 4)
    with sslfast.patch("open_clip"):
        for call, more in ((loss.ClipLoss(), (None,)), (loss.SigLipLoss(), (-1.0,))):
            found = call(image, text, 2.0, *more, output_dict=True)
            assert list(found) == ["contrastive_loss"]
            assert torch.equal(found["contrastive_loss"], call(image, text, 2.0, *more))


def test_other_methods_are_the_package_s_own(loss):
    image, text = features(9, 4)
    clip, sig_lip = loss.ClipLoss(cache_labels=True), loss.SigLipLoss()
    own = [*clip.get_logits(image, text, 2.0), clip.get_ground_truth("cpu", 9)]
    own += [sig_lip.get_logits(image, text, 2.0, 1.0), sig_lip.get_ground_truth("cpu", torch.float32, 9)]
    distill = loss.DistillClipLoss()(image, text, 2.0, text, image, 3.0)
    with sslfast.patch("open_clip"), warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = [*clip.get_logits(image, text, 2.0), clip.get_ground_truth("cpu", 9)]
        mine += [sig_lip.get_logits(image, text, 2.0, 1.0), sig_lip.get_ground_truth("cpu", torch.float32, 9)]
        assert all(map(torch.equal, mine, own))
        assert all(map(torch.equal, loss.DistillClipLoss()(image, text, 2.0, text, image, 3.0), distill))


def test_the_form_without_horovod_and_with_chunks(loss):
    """open_clip's later SigLipLoss has a chunk_size, and no class a use_horovod."""
    image, text = features(9, 4)
    clip, sig_lip = loss.ClipLoss(), loss.SigLipLoss()
    del clip.use_horovod
    sig_lip.chunk_size = 2
    same_as_package("open_clip", lambda *x: loss.ClipLoss()(*x, 2.0), image, text, patched=lambda *x: clip(*x, 2.0))
    same_as_package(
        "open_clip",
        lambda *x: loss.SigLipLoss()(*x, 2.0, -1.0),
        image,
        text,
        floor=2.0,
        patched=lambda *x: sig_lip(*x, 2.0, -1.0),
    )


def test_objects_stay_what_they_were(loss):
    image, text = features(9, 4)
    before = loss.ClipLoss(cache_labels=True)
    with sslfast.patch("open_clip") as patch:
        assert patch.replaced == ("ClipLoss", "CoCaLoss", "SigLipLoss")
        for made in (loss.ClipLoss(), loss.SigLipLoss(), loss.CoCaLoss(1.0, 1.0)):
            assert type(made) in (loss.ClipLoss, loss.SigLipLoss, loss.CoCaLoss) and not made.state_dict()
            arguments = (torch.randn(9, 3, 5), torch.randint(0, 5, (9, 3))) if isinstance(made, loss.CoCaLoss) else ()
            arguments = (image, text, *arguments, 2.0, *((-1.0,) if isinstance(made, loss.SigLipLoss) else ()))
            for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                assert type(again) is type(made)
                torch.testing.assert_close(again(*arguments), made(*arguments), rtol=0, atol=0)
        pickled, fast = pickle.dumps(before), before(image, text, 2.0)
    torch.testing.assert_close(pickle.loads(pickled)(image, text, 2.0), fast)
    assert isinstance(before, loss.ClipLoss) and before.forward.__func__.__module__ == "open_clip.loss"


def test_adapter_classes(loss):
    """Without a patch: an adapter's object is the package's too, and only the adapter's is sslfast's."""
    from sslfast.adapters import open_clip as adapters

    image, text = features(33, 8)
    logits, labels = torch.randn(33, 4, 7), torch.randint(0, 7, (33, 4))
    for name, made, arguments in (
        ("ClipLoss", (), (5.0,)),
        ("SigLipLoss", (), (5.0, -2.0)),
        ("CoCaLoss", (1.0, 0.5), (logits, labels, 5.0)),
    ):
        mine, own = (getattr(module, name)(*made) for module in (adapters, loss))
        assert isinstance(mine, getattr(loss, name)) and not isinstance(own, type(mine))
        assert isinstance(mine, adapters.ClipLoss) == isinstance(own, loss.ClipLoss)
        ordered = (image, text, *arguments)
        torch.testing.assert_close(mine(*ordered), own(*ordered))
        assert _operators(mine, ordered) and not _operators(own, ordered)


def _operators(call: object, inputs: tuple[object, ...]) -> set[str]:
    """sslfast's operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*inputs)
    return {event.key for event in profile.key_averages() if event.key.startswith("sslfast::")}


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_compiled_whole(loss, kind):
    image, text = features(17, 6)
    inputs = (image, text, number(7.0), number(-1.0))
    own = values_and_gradients(getattr(loss, kind)(), inputs)
    torch._dynamo.reset()
    with sslfast.patch("open_clip"):
        fast = values_and_gradients(torch.compile(getattr(loss, kind)(), fullgraph=True, backend="eager"), inputs)
    for mine, plain in zip(fast, own, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_a_model_trains_as_before(loss):
    """A small CLIP and a small SigLIP from open_clip's own factory of losses, five steps."""
    model_module, factory = peer("open_clip.model"), peer("open_clip.factory")
    images, texts = torch.randn(24, 3, 16, 16), torch.randint(1, 50, (24, 8))

    def losses(siglip: bool) -> list[float]:
        torch.manual_seed(5)
        model = model_module.CLIP(
            16,
            model_module.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
            model_module.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1),
            init_logit_bias=-10.0 if siglip else None,
            output_dict=True,
        )
        how = {"distill": False, "model": "ViT", "siglip": siglip, "horovod": False, "loss_dist_impl": None}
        how |= {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1}
        criterion = factory.create_loss(SimpleNamespace(**how))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
        found = []
        for _ in range(5):
            loss = criterion(**model(images, texts), output_dict=True)["contrastive_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    for siglip in (False, True):
        own = losses(siglip)
        with sslfast.patch("open_clip"):
            assert losses(siglip) == pytest.approx(own, rel=1e-4)
        assert own[-1] != own[0]
