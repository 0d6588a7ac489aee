"""Cross entropy of masked words against F.cross_entropy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import DTYPES, GRAD_LOSS, roundings, value_and_gradients, within_budget
from sslfast import masked_token_cross_entropy as public

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(
    batch: int = 3, length: int = 11, width: int = 24, words: int = 301, share: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [B, S, D], weight [V, D], bias [V], labels [B, S] with −100 where a token is not to be predicted."""
    labels = torch.randint(words, (batch, length))
    labels[torch.rand(batch, length) >= share] = -100
    labels[-1, -1], labels[0, 0] = words - 1, -100
    double = torch.float64
    return (
        torch.randn(batch, length, width, dtype=double),
        torch.randn(words, width, dtype=double),
        torch.randn(words, dtype=double),
        labels,
    )


def formula(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients(dtype: torch.dtype, with_bias: bool, device: str) -> None:
    *given, labels = (t.to(device) for t in inputs())
    given = [t.to(dtype) for t in given[: 3 if with_bias else 2]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def kernel(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return public(h, w, labels, bias=b)

    def plain(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return formula(h, w, labels, b)

    found = value_and_gradients(kernel, *given)
    single = roundings(value_and_gradients, plain, *(t.to(wide) for t in given))
    truth = value_and_gradients(plain, *(t.double() for t in given))
    assert found[0].dtype == wide and all(f.dtype == dtype for f in found[1:])
    for name, f, s, t in zip(("loss", "dhidden", "dweight", "dbias"), found, single, truth, strict=False):
        within_budget(name, f, s.to(f.dtype), t, wide if name == "loss" else dtype, GRAD_LOSS / labels.numel())


@pytest.mark.parametrize("device", DEVICES)
def test_capacity_leaves_the_result(device: str) -> None:
    hidden, weight, bias, labels = (t.to(device) for t in inputs())
    count = int((labels != -100).sum())
    expected = value_and_gradients(lambda h, w, b: formula(h, w, labels, b), hidden, weight, bias)
    for capacity in (count, count + 5, labels.numel(), 1000, None):

        def function(h: Tensor, w: Tensor, b: Tensor, capacity: int | None = capacity) -> Tensor:
            return public(h, w, labels, bias=b, capacity=capacity)

        found = value_and_gradients(function, hidden, weight, bias)
        for mine, true in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, true)
    if device == "cpu":
        with pytest.raises(
            ValueError, match=f"capacity must hold all {count} tokens that have a label, got {count - 1}"
        ):
            public(hidden, weight, labels, capacity=count - 1)
    else:
        found = value_and_gradients(lambda h, w: public(h, w, labels, capacity=count - 1), hidden, weight)
        assert found[0].isnan() and found[1].isnan().any() and found[2].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_label_it_is_nan_with_zero_gradients(device: str) -> None:
    hidden, weight, _, labels = (t.to(device) for t in inputs())
    labels = torch.full_like(labels, -100)
    for f in (lambda h, w: formula(h, w, labels), lambda h, w: public(h, w, labels)):
        loss, dhidden, dweight = value_and_gradients(f, hidden, weight)
        assert loss.isnan() and (dhidden == 0).all() and (dweight == 0).all()


def test_every_subset_of_gradients_and_another_index() -> None:
    hidden, weight, bias, labels = inputs()
    other = labels.masked_fill(labels == -100, 300)
    truth = value_and_gradients(
        lambda h, w, b: F.cross_entropy((h @ w.T + b).flatten(0, 1), other.flatten(), ignore_index=300),
        hidden,
        weight,
        bias,
    )
    for needed in range(1, 8):
        leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate((hidden, weight, bias))]
        loss = public(leaves[0], leaves[1], other, bias=leaves[2], ignore_index=300)
        wanted = [t for t in leaves if t.requires_grad]
        expected = [g for g, t in zip(truth[1:], leaves, strict=True) if t.requires_grad]
        for mine, true in zip(
            torch.autograd.grad(loss, wanted, torch.full_like(loss, GRAD_LOSS)), expected, strict=True
        ):
            torch.testing.assert_close(mine, true)


def test_one_sequence_strides_and_no_logits_of_other_tokens() -> None:
    hidden, weight, bias, labels = inputs()
    hidden[labels == -100] = float("nan")
    expected = F.cross_entropy(hidden[labels != -100] @ weight.T + bias, labels[labels != -100])
    torch.testing.assert_close(public(hidden, weight, labels, bias=bias), expected)
    mixed = hidden.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(public(mixed, weight.T.contiguous().T, labels.T.contiguous().T, bias=bias), expected)
    torch.testing.assert_close(
        public(hidden[2], weight, labels[2]),
        formula(hidden[2][labels[2] != -100], weight, labels[2][labels[2] != -100]),
    )


def test_double_backward_and_compile() -> None:
    hidden, weight, bias, labels = inputs(1, 4, 3, 5, share=0.9)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradgradcheck(lambda h, w, b: public(h, w, labels, bias=b), leaves)
    compiled = torch.compile(lambda h, w: public(h, w, labels, capacity=7), backend="aot_eager", fullgraph=True)
    found = value_and_gradients(compiled, hidden, weight)
    for mine, true in zip(found, value_and_gradients(lambda h, w: formula(h, w, labels), hidden, weight), strict=True):
        torch.testing.assert_close(mine, true)


def test_autocast_takes_its_dtype() -> None:
    hidden, weight, bias, labels = (t.float() if t.is_floating_point() else t for t in inputs())
    hidden, weight = hidden.bfloat16(), weight.bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = public(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(loss, formula(hidden.float(), weight, labels, bias), rtol=1e-4, atol=0)


def test_same_bits_on_any_number_of_threads() -> None:
    hidden, weight, _, labels = (t.float() if t.is_floating_point() else t for t in inputs(8, 50, 40, 500))
    runs = []
    threads = torch.get_num_threads()
    try:
        for number in (threads, 1, threads):
            torch.set_num_threads(number)
            runs.append(value_and_gradients(lambda h, w: public(h, w, labels), hidden, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_module() -> None:
    hidden, weight, bias, labels = inputs()
    module = sslfast.MaskedTokenLoss(capacity=20)
    torch.testing.assert_close(module(hidden, weight, labels, bias), formula(hidden, weight, labels, bias))
    assert repr(module) == "MaskedTokenLoss(ignore_index=-100, capacity=20)"


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ({"hidden": torch.zeros(2, 0, 8)}, ValueError, r"hidden must be .* not empty, got shape \(2, 0, 8\)"),
    ({"weight": torch.zeros(9, 7)}, ValueError, "weight and hidden must have the same width, got 7 and 8 features"),
    ({"weight": torch.zeros(9, 8).double()}, TypeError, "weight and hidden must have the same dtype"),
    ({"labels": torch.zeros(2, 5)}, TypeError, "labels must be int64 or int32, got torch.float32"),
    ({"labels": torch.zeros(2, 4).long()}, ValueError, r"labels must have shape \(2, 5\)"),
    ({"labels": torch.full((2, 5), 9)}, ValueError, "labels must be 0 to 8 or -100, got 9 to 9"),
    ({"labels": torch.full((2, 5), -1)}, ValueError, "labels must be 0 to 8 or -100, got -1 to -1"),
    ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(9,\), got \(8,\)"),
    ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input_names_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(2, 5, 8),
        "weight": torch.zeros(9, 8),
        "labels": torch.zeros(2, 5).long(),
        **change,
    }
    with pytest.raises(error, match=message):
        public(**given)


def test_32_bit_labels_as_mask_tokens_gives_them() -> None:
    hidden, weight, bias, labels = inputs()
    assert torch.equal(public(hidden, weight, labels.int(), bias=bias), public(hidden, weight, labels, bias=bias))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_labels_that_are_not_read_on_the_host_never_give_a_number_silently(wrong: int) -> None:
    hidden, weight, bias, labels = inputs()
    compiled = torch.compile(lambda *given: public(*given[:3], bias=given[3]), backend="eager", fullgraph=True)
    assert compiled(hidden, weight, labels, bias).isfinite()
    labels[labels == -100] = torch.tensor(wrong)
    assert compiled(hidden, weight, labels, bias).isnan()
