"""CLIP's loss against open_clip's formula: value, gradients, locked towers, and what a training step does around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.clip import ClipLoss, clip

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The mean of two cross entropies whose targets are the diagonal."""
    logits = scale * image @ text.T + bias
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def towers(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Unit rows, a pair similar but not equal, exactly representable in ``dtype``."""
    image = torch.randn(n, d, dtype=torch.float64)
    text = image + 0.7 * torch.randn(n, d, dtype=torch.float64)
    return F.normalize(image).to(dtype), F.normalize(text).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1 / 0.07, 100.0])
@pytest.mark.parametrize("shape", [(64, 64), (127, 61), (3, 5), (1, 8), (33, 1), (301, 48)], ids=str)
def test_value_and_gradients(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    image, text = towers(*shape, dtype)
    s, b = torch.tensor(scale, dtype=wide), torch.tensor(-2.0, dtype=wide)
    kernel = value_and_gradients(clip, image, text, s, b)
    plain = roundings(value_and_gradients, by_formula, image.to(wide), text.to(wide), s, b)
    truth = value_and_gradients(by_formula, *(t.double() for t in (image, text, s, b)))
    assert kernel[0].dtype == kernel[3].dtype == wide and kernel[1].dtype == kernel[2].dtype == dtype
    each = GRAD_LOSS * scale / len(image)  # the size of a term of the features' gradients
    names, floors = ("loss", "d image", "d text", "d scale"), (1.0, each, each, GRAD_LOSS)
    for name, k, p, t, floor in zip(names, kernel[:4], plain[:4], truth[:4], floors, strict=True):
        within_budget(name, k, p.to(k.dtype), t, dtype, floor)
    assert kernel[4].item() == 0


@pytest.mark.parametrize("frozen", [0, 1])
def test_locked_tower(frozen: int) -> None:
    """The frozen side has no gradient, the other and the scale have the same as if both learned."""
    features, scale = towers(90, 24), torch.tensor(20.0, requires_grad=True)
    both = value_and_gradients(clip, *features, scale)
    inputs = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(features)]
    loss = clip(*inputs, scale)
    loss.backward(torch.tensor(GRAD_LOSS))
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, both[2 - frozen])
    torch.testing.assert_close(scale.grad, both[3])


def test_bias_changes_nothing() -> None:
    image, text = towers(20, 8)
    assert torch.equal(clip(image, text, 10.0), clip(image, text, 10.0, -7.5))
    bias = torch.nn.Parameter(torch.full((1,), 5.0))
    loss = clip(image, text, 10.0, bias)
    loss.backward()
    assert loss.shape == () and torch.equal(bias.grad, torch.zeros(1))


def test_module_has_open_clips_forward() -> None:
    image, text = towers(20, 8)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    loss = ClipLoss()(image, text, scale.exp(), output_dict=True)
    assert list(loss) == ["contrastive_loss"] and torch.equal(
        loss["contrastive_loss"], clip(image, text, scale.exp().item())
    )
    loss["contrastive_loss"].backward()
    assert scale.grad != 0 and not ClipLoss().state_dict()


def test_compile_without_graph_breaks() -> None:
    image, text = towers(40, 16)
    step = torch.compile(ClipLoss(), fullgraph=True, backend="aot_eager")
    got = value_and_gradients(step, image, text, torch.tensor(14.0), torch.tensor(0.0))
    expected = value_and_gradients(clip, image, text, torch.tensor(14.0), torch.tensor(0.0))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("image", "text", "scale", "bias", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), 1.0, None, ValueError, "image_features and text_features .*same shape"),
        (torch.ones(4), torch.ones(4), 1.0, None, ValueError, "image_features .*two-dimensional"),
        (torch.ones(4, 3), torch.ones(4, 3).double(), 1.0, None, TypeError, "same dtype"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.ones(4), None, ValueError, "logit_scale .*one-element"),
        (torch.ones(4, 3), torch.ones(4, 3), 1.0, torch.ones(4), ValueError, "logit_bias .*one-element"),
        (torch.ones(4, 3), torch.ones(4, 3), "1", None, TypeError, "logit_scale .*float or a tensor"),
    ],
)
def test_wrong_input(image, text, scale, bias, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        clip(image, text, scale, bias)
