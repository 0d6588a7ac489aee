"""The recipe of docs/grad_cache.md, run as it stands there: the same gradients as one big batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.losses.contrastive.clip import clip
from sslfast.ops.nt_xent import nt_xent

PAGE = Path(__file__).parents[3] / "docs" / "grad_cache.md"


@pytest.fixture
def step() -> Callable[..., Tensor]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Callable[..., Tensor]] = {}
    exec(code, names)
    return names["grad_cache_step"]


def tower(width: int, dropout: float = 0.0) -> nn.Module:
    layers = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
    return layers.double()


def gradients(parameters: list[nn.Parameter], run: Callable[[], Tensor]) -> list[Tensor]:
    for p in parameters:
        p.grad = None
    return [run().detach(), *(p.grad for p in parameters)]


@pytest.mark.parametrize("chunk", [1, 7, 12, 100])  # of 24: even, uneven last, all in one
def test_clip(step: Callable[..., Tensor], chunk: int) -> None:
    image_tower, text_tower = tower(12), tower(5)
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    images, texts = torch.randn(24, 12).double(), torch.randn(24, 5).double()

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        return clip(F.normalize(image), F.normalize(text), scale.exp())

    def whole() -> Tensor:
        loss = loss_of(image_tower(images), text_tower(texts))
        loss.backward()
        return loss

    parameters = [*image_tower.parameters(), *text_tower.parameters(), scale]
    expected = gradients(parameters, whole)
    got = gradients(parameters, lambda: step([image_tower, text_tower], [images, texts], loss_of, chunk))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_nt_xent_with_dropout(step: Callable[..., Tensor]) -> None:
    """The whole batch, encoded with a graph in the same chunks, draws the same masks; so does what comes after."""
    model = tower(12, dropout=0.5)
    views = [torch.randn(20, 12).double() for _ in range(2)]

    def whole() -> Tensor:
        loss = nt_xent(*(torch.cat([model(rows) for rows in view.split(6)]) for view in views), 0.2)
        loss.backward()
        return loss

    after = []
    results = []
    for run in (whole, lambda: step([model, model], views, lambda a, b: nt_xent(a, b, 0.2), 6)):
        torch.manual_seed(1)
        results.append(gradients(list(model.parameters()), run))
        after.append(torch.rand(3))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(*after)
