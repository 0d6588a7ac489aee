"""SigLIP's loss against open_clip's formula: value, gradients of features, scale and bias, locked towers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.sig_lip import SigLipLoss, sig_lip

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def towers(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Unit rows, a pair similar but not equal, exactly representable in ``dtype``."""
    image = torch.randn(n, d, dtype=torch.float64)
    text = image + 0.7 * torch.randn(n, d, dtype=torch.float64)
    return F.normalize(image).to(dtype), F.normalize(text).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, -20.0), (5.0, 3.0)])
@pytest.mark.parametrize("shape", [(64, 64), (127, 61), (3, 5), (1, 8), (301, 48)], ids=str)
def test_value_and_gradients(shape: tuple[int, int], scale: float, bias: float, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    image, text = towers(*shape, dtype)
    s, b = torch.tensor(scale, dtype=wide), torch.tensor(bias, dtype=wide)
    kernel = value_and_gradients(sig_lip, image, text, s, b)
    plain = roundings(value_and_gradients, by_formula, image.to(wide), text.to(wide), s, b)
    truth = value_and_gradients(by_formula, *(t.double() for t in (image, text, s, b)))
    assert kernel[0].dtype == kernel[3].dtype == wide and kernel[1].dtype == kernel[2].dtype == dtype
    each = GRAD_LOSS * scale / len(image)  # the size of a term of the features' gradients
    names = ("loss", "d image", "d text", "d scale", "d bias")
    floors = (1.0, each, each, GRAD_LOSS, GRAD_LOSS)
    for name, k, p, t, floor in zip(names, kernel, plain, truth, floors, strict=True):
        within_budget(name, k, p.to(k.dtype), t, dtype, floor)


@pytest.mark.parametrize("frozen", [0, 1])
def test_locked_tower(frozen: int) -> None:
    features, scale, bias = towers(90, 24), torch.tensor(10.0), torch.tensor(-10.0)
    both = value_and_gradients(sig_lip, *features, scale, bias)
    inputs = [x.clone().requires_grad_(i != frozen) for i, x in enumerate(features)]
    learns = [t.clone().requires_grad_() for t in (scale, bias)]
    sig_lip(*inputs, *learns).backward(torch.tensor(GRAD_LOSS))
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, both[2 - frozen])
    torch.testing.assert_close([t.grad for t in learns], both[3:])


def test_module_has_open_clips_forward() -> None:
    image, text = towers(20, 8)
    scale, bias = torch.nn.Parameter(torch.tensor(10.0)), torch.nn.Parameter(torch.full((1,), -10.0))
    loss = SigLipLoss()(image, text, scale, bias, output_dict=True)
    assert list(loss) == ["contrastive_loss"] and loss["contrastive_loss"].shape == ()
    assert torch.equal(loss["contrastive_loss"], sig_lip(image, text, 10.0, -10.0))
    loss["contrastive_loss"].backward()
    assert scale.grad != 0 and bias.grad != 0
    assert torch.equal(SigLipLoss()(image, text, 10.0), sig_lip(image, text, 10.0, 0.0))


def test_compile_without_graph_breaks() -> None:
    inputs = (*towers(40, 16), torch.tensor(10.0), torch.tensor(-10.0))
    step = torch.compile(SigLipLoss(), fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(step, *inputs), value_and_gradients(sig_lip, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("image", "text", "scale", "bias", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), 1.0, 0.0, ValueError, "image_features and text_features .*same shape"),
        (torch.ones(4, 3).int(), torch.ones(4, 3), 1.0, 0.0, TypeError, "image_features .*float32.*int32"),
        (torch.ones(4, 3), torch.ones(4, 3), torch.ones(4), 0.0, ValueError, "logit_scale .*one-element"),
        (torch.ones(4, 3), torch.ones(4, 3), 1.0, torch.ones(4), ValueError, "logit_bias .*one-element"),
    ],
)
def test_wrong_input(image, text, scale, bias, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sig_lip(image, text, scale, bias)
