"""Gradient caching: the loss and the gradients of one big batch, by the chunk."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast
from helpers import within_budget

SIZES = [1, 7, 12, 100]  # chunks of 24 rows: even, an uneven last one, all in one


def tower(width: int, dropout: float = 0.0) -> nn.Module:
    layers = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
    return layers.double()


def found_by(step: Callable[[], Tensor], *modules: nn.Module | nn.Parameter) -> list[Tensor]:
    """The loss and every gradient that a step leaves."""
    parameters = [p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])]
    for p in parameters:
        p.grad = None
    loss = step()
    assert loss.grad_fn is None and all(p.grad is not None for p in parameters)
    return [loss, *(p.grad for p in parameters if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (mine, true) in enumerate(zip(found, expected, strict=True)):
        within_budget(f"gradient {i}" if i else "loss", mine, true, true, torch.float64)


def one_batch(loss: Callable[..., Tensor], *embeddings: Tensor) -> Tensor:
    value = loss(*embeddings)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("chunk", SIZES)
def test_two_towers_and_a_learnt_scale(chunk: int) -> None:
    image_tower, text_tower = tower(12), tower(5)
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    images, texts = torch.randn(24, 12).double(), torch.randn(24, 5).double()

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return sslfast.clip(F.normalize(image), F.normalize(text), scale.exp())

    expected = found_by(lambda: one_batch(loss, image_tower(images), text_tower(texts)), image_tower, text_tower, scale)
    found = found_by(
        lambda: sslfast.grad_cache_step([image_tower, text_tower], [images, texts], loss, chunk),
        image_tower,
        text_tower,
        scale,
    )
    same(found, expected)


class Text(nn.Module):
    """Takes what a tokenizer gives: ids and a mask, and words about them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8, dtype=torch.float64)

    def forward(self, ids: Tensor, mask: Tensor, pool: str, scale: Tensor | None = None) -> Tensor:
        assert pool == "mean" and (scale is None or scale.dim() == 0)
        return (self.words(ids) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [dict, collections.UserDict, "tuple"])
def test_batches_of_several_tensors(kind: Any) -> None:
    text = Text()
    views = []
    for _ in range(2):
        ids, mask = torch.randint(30, (10, 6)), torch.ones(10, 6).double()
        batch: Any = {"ids": ids, "mask": mask, "pool": "mean", "scale": torch.ones(())}
        views.append(tuple(batch.values()) if kind == "tuple" else kind(batch))
    loss = sslfast.NTXentLoss(0.2)
    whole = [text(*v) if kind == "tuple" else text(**v) for v in views]
    expected = found_by(lambda: one_batch(loss, *whole), text)
    same(found_by(lambda: sslfast.grad_cache_step(text, views, loss, 4), text), expected)


def test_batches_of_different_lengths() -> None:
    """Twice as many keys as queries."""
    model = tower(12)
    queries, keys = torch.randn(9, 12).double(), torch.randn(18, 12).double()

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return sslfast.similarity_lse(q, k, 1.0).sum() - (q * k[: len(q)]).sum()

    expected = found_by(lambda: one_batch(loss, model(queries), model(keys)), model)
    same(found_by(lambda: sslfast.grad_cache_step(model, [queries, keys], loss, 4), model), expected)


def test_both_passes_draw_the_same_numbers() -> None:
    """The whole batch, encoded with a graph in the same chunks, draws the same masks; so does what comes after."""
    model = tower(12, dropout=0.5)
    views = [torch.randn(20, 12).double() for _ in range(2)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return sslfast.nt_xent(a, b, 0.2) * torch.rand((), dtype=torch.float64)

    def whole() -> Tensor:
        return one_batch(loss, *(torch.cat([model(rows) for rows in view.split(6)]) for view in views))

    after, results = [], []
    for run in (whole, lambda: sslfast.grad_cache_step(model, views, loss, 6)):
        torch.manual_seed(1)
        results.append(found_by(run, model))
        after.append(torch.rand(3))
    same(*reversed(results))
    assert torch.equal(*after)


def test_the_generator_is_as_it_was_after_an_error() -> None:
    calls = []

    def encoder(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyError
        return x * torch.rand(())

    x = torch.randn(6, 3, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.rand(5)[2:]  # two chunks of the one pass that counts have drawn
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        sslfast.grad_cache_step(encoder, [x], lambda z: z.sum(), 3)
    assert torch.equal(torch.rand(3), expected)


def test_autocast() -> None:
    """The weights' casts of the pass without a graph are not taken for those of the other."""
    model = tower(12).float()
    views = [torch.randn(24, 12) for _ in range(2)]
    seen = []

    def loss(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.dtype)
        return sslfast.nt_xent(a, b, 0.5)

    def whole() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*map(model, views))
        value.backward()
        return value.detach()

    def cached() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sslfast.grad_cache_step(model, views, loss, 7)

    for mine, plain in zip(found_by(cached, model), found_by(whole, model), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0.02, atol=2e-3)
    assert seen == [torch.bfloat16] * 2


def test_a_scaler_scales_the_gradients_once_and_not_the_loss() -> None:
    model, scaler = tower(12), torch.amp.GradScaler("cpu", init_scale=64.0)
    views = [torch.randn(24, 12).double() for _ in range(2)]
    loss = sslfast.NTXentLoss()
    plain, *expected = found_by(lambda: sslfast.grad_cache_step(model, views, loss, 7), model)
    value, *scaled = found_by(lambda: sslfast.grad_cache_step(model, views, loss, 7, scaler=scaler), model)
    same([value, *(g / 64 for g in scaled)], [plain, *expected])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    same(list(model.parameters()), [b - 0.1 * g for b, g in zip(before, expected, strict=True)])


def test_gradients_are_added_and_frozen_encoders_run_once() -> None:
    image_tower, text_tower = tower(12), tower(5).requires_grad_(False)
    runs = []
    text_tower.register_forward_hook(lambda *_: runs.append(1))
    batches = [torch.randn(8, 12).double(), torch.randn(8, 5).double()]
    for _ in range(2):
        sslfast.grad_cache_step([image_tower, text_tower], batches, sslfast.info_nce, 4)
    twice = [p.grad for p in image_tower.parameters()]
    assert len(runs) == 4 and all(p.grad is None for p in text_tower.parameters())
    once = found_by(lambda: one_batch(sslfast.info_nce, image_tower(batches[0]), text_tower(batches[1])), image_tower)[
        1:
    ]
    same([t / 2 for t in twice if t is not None], once)


def test_no_more_than_a_chunk_of_activations_is_alive() -> None:
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal alive, most
            if x.requires_grad:
                alive += len(x)
                most = max(most, alive)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal alive
            alive -= len(grad)
            return grad

    model = nn.Linear(6, 4)
    views = [torch.randn(20, 6) for _ in range(2)]
    sslfast.grad_cache_step(lambda x: Counted.apply(model(x)), views, sslfast.nt_xent, 3)
    assert (alive, most) == (0, 3)


X = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((nn.Identity(), [X], torch.sum, 0), ValueError, "chunk must be a positive whole number, got 0"),
        ((nn.Identity(), [X], torch.sum, 2.0), ValueError, "chunk must be a positive whole number, got 2.0"),
        ((nn.Identity(), X, torch.sum, 2), TypeError, "batches must be a list of batches, .* got Tensor"),
        (([nn.Identity()], [X, X], torch.sum, 2), ValueError, "one for each batch, got 1 for 2"),
        ((nn.Identity(), [X, "x"], torch.sum, 2), TypeError, r"batches\[1\] must hold a tensor of rows .* got str"),
        ((nn.Identity(), [(X, X[:4])], torch.sum, 2), ValueError, r"batches\[0\] .* same number of rows.* got 4, 6"),
        ((nn.Identity(), [X[:0]], torch.sum, 2), ValueError, "at least one, got 0"),
        ((lambda x: (x, x), [X], torch.sum, 2), TypeError, "an encoder must return a tensor.* got tuple: wrap it"),
        ((lambda x: x.mean(0), [X], torch.sum, 2), ValueError, r"a row for each of 2, got shape \(4,\)"),
        ((lambda x: x, [X], lambda z: z, 2), ValueError, r"without dimensions, got shape \(6, 4\)"),
        ((lambda x: x, [X], lambda z: 1.0, 2), ValueError, "without dimensions, got float"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        sslfast.grad_cache_step(*arguments)
