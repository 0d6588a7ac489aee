"""Functions under other packages' names: their results, gradients and random numbers, for repeated ids too."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import Unavailable, peers
from sslfast import masking
from token_common import numbers, value_and_gradients


def lightly(name: str) -> Callable[..., Any]:
    try:
        peers.nt_xent("lightly", 0.5)  # declares torchvision's operators first, where its wheel needs that
        return getattr(importlib.import_module("lightly.models.utils"), name)
    except (Unavailable, ImportError) as reason:
        pytest.skip(f"lightly 1.6.0 cannot be imported: {reason}")


def mae_random_masking(x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """As published."""
    n, length, width = x.shape
    kept = int(length * (1 - mask_ratio))
    noise = torch.rand(n, length)
    shuffle = torch.argsort(noise, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    x_masked = torch.gather(x, dim=1, index=shuffle[:, :kept].unsqueeze(-1).repeat(1, 1, width))
    mask = torch.ones([n, length])
    mask[:, :kept] = 0
    return x_masked, torch.gather(mask, dim=1, index=restore), restore


@pytest.mark.parametrize("ratio", [0.75, 0.0, 1.0, 0.6])
def test_random_masking_is_mae(ratio: float) -> None:
    x = numbers(5, 49, 6).float()
    results = []
    for function in (masking.compat.random_masking, mae_random_masking):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        kept, mask, restore = function(leaf, ratio)
        (gradient,) = torch.autograd.grad(kept, leaf, torch.arange(float(kept.numel())).view(kept.shape))
        results.append((kept, mask, restore, gradient, torch.rand(3)))  # the generator stands where MAE's would
    for mine, its in zip(*results, strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)


def test_random_masking_takes_noise() -> None:
    x, noise = numbers(2, 4, 3), torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    kept, mask, restore = masking.compat.random_masking(x, 0.5, noise)
    assert torch.equal(kept, torch.stack([x[0, [1, 3]], x[1, [0, 1]]]))
    assert mask.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]] and restore.tolist() == [[3, 0, 2, 1], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 4\), got \(4,\)"):
        masking.compat.random_masking(x, 0.5, noise[0])


@pytest.mark.parametrize("options", [{}, {"mask_ratio": 0.75, "mask_class_token": True}, {"mask_ratio": 1.0}])
@pytest.mark.parametrize("size", [(4, 50), (3, 1), (2, 0)])
def test_random_token_mask_is_lightly(size: tuple[int, int], options: dict[str, Any]) -> None:
    results = []
    for function in (masking.compat.random_token_mask, lightly("random_token_mask")):
        torch.manual_seed(3)
        results.append((*function(size, **options), torch.rand(3)))
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)


def same(name: str, *inputs: Tensor, **fixed: Any) -> None:
    """Value and gradients of all of ``inputs`` are lightly's."""
    ours, theirs = getattr(masking.compat, name), lightly(name)
    found = value_and_gradients(lambda *given: ours(given[0], *fixed.values(), *given[1:]), inputs)
    expected = value_and_gradients(lambda *given: theirs(given[0], *fixed.values(), *given[1:]), inputs)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ids", ["distinct", "repeated", "fewer images"])
def test_token_functions_are_lightly(ids: str, dtype: torch.dtype) -> None:
    tokens = numbers(4, 9, 6).to(dtype)
    index = torch.rand(4, 9).argsort(1)[:, :5]
    if ids == "repeated":
        index[:, 1:3] = index[:, :1]
    same("get_at_index", tokens, index=index[:3] if ids == "fewer images" else index)
    same("mask_at_index", tokens, numbers(1, 1, 6).to(dtype), index=index)
    value = numbers(4, 5, 6).to(dtype)
    same("set_at_index", tokens, value, index=index)
    same("set_at_index", tokens, index=index, value=1)
    more = numbers(4, 7, 6).to(dtype)  # values than ids: scatter has no gradient for them
    assert torch.equal(masking.compat.set_at_index(tokens, index, more), lightly("set_at_index")(tokens, index, more))
    same("repeat_token", numbers(1, 1, 6).to(dtype), size=(4, 3))
    repeated = masking.compat.repeat_token(tokens[:1, :1], (2, 3))
    repeated[0, 0] = 7  # memory of its own
    assert (repeated[1] != 7).any()


def test_types_mix_as_in_lightly() -> None:
    index = torch.tensor([[0, 2], [1, 0]])
    same("mask_at_index", numbers(2, 3, 4).bfloat16(), numbers(1, 1, 4).float(), index=index)
    same("mask_at_index", numbers(2, 3, 4).float(), numbers(2, 3, 4).float(), index=index)  # a token for each row
    same("mask_at_index", numbers(2, 3, 4).float(), numbers(1, 1, 1).float(), index=index)
    whole = torch.arange(24).view(2, 3, 4)
    assert torch.equal(masking.compat.get_at_index(whole, index), lightly("get_at_index")(whole, index))


def test_a_masked_row_leaves_no_nan() -> None:
    tokens = numbers(2, 3, 4)
    tokens[:, 0] = float("inf")
    index = torch.zeros(2, 1, dtype=torch.int64)
    assert masking.compat.mask_at_index(tokens, index, numbers(1, 1, 4)).isfinite().all()


def test_ids_out_of_range_are_errors() -> None:
    """Never a row of another image."""
    tokens = numbers(3, 4, 2)
    for bad in (4, -1):
        index = torch.tensor([[0], [bad], [1]])
        with pytest.raises(RuntimeError, match="index .*out of bounds"):
            masking.compat.get_at_index(tokens, index)
        with pytest.raises(RuntimeError, match="index .*out of bounds"):
            masking.compat.set_at_index(tokens, index, tokens[:, :1])
        with pytest.raises(RuntimeError, match="index .*out of bounds"):
            masking.compat.mask_at_index(tokens, index, tokens[:1, :1])


def test_compile_without_graph_breaks() -> None:
    tokens, index, value = numbers(3, 5, 4), torch.rand(3, 5).argsort(1)[:, :2], numbers(3, 2, 4)

    def all_of_them(x: Tensor, value: Tensor) -> Tensor:
        placed = masking.compat.set_at_index(x, index, masking.compat.get_at_index(x, index) + value)
        return masking.compat.mask_at_index(placed, index, value[:1, :1])

    compiled = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)
    for mine, its in zip(
        value_and_gradients(compiled, (tokens, value)), value_and_gradients(all_of_them, (tokens, value)), strict=True
    ):
        torch.testing.assert_close(mine, its)
