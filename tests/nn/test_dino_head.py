"""DINOHead against the published head: values, keys of checkpoints, initialisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sslfast
from sslfast import DINOHead


class Published(nn.Module):
    """facebookresearch/dino's head, three layers."""

    def __init__(self, use_bn: bool = False) -> None:
        super().__init__()
        norm = [nn.BatchNorm1d(24)] if use_bn else []
        layers = [nn.Linear(12, 24), *norm, nn.GELU(), nn.Linear(24, 24), *copy.deepcopy(norm), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(24, 8))
        self.last_layer = nn.utils.weight_norm(nn.Linear(8, 40, bias=False))
        self.last_layer.weight_g.data.fill_(1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


SIZES: dict[str, Any] = {"hidden_dim": 24, "bottleneck_dim": 8}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("use_bn", [False, True])
def test_published_checkpoints_load_and_save(use_bn: bool) -> None:
    published, head = Published(use_bn), DINOHead(12, 40, use_bn, **SIZES)
    head.load_state_dict(published.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(head.logits(x), published(x))
    published.load_state_dict(head.state_dict())
    assert list(head.state_dict()) == list(published.state_dict())


def test_plain_last_layer() -> None:
    head = DINOHead(12, 40, nlayers=1, weight_norm=False, **SIZES)
    assert list(head.state_dict()) == ["mlp.weight", "mlp.bias", "last_layer.weight"]
    assert isinstance(head.prototypes, Tensor)
    x = torch.randn(2, 5, 12)
    features = head(x)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(head.logits(x), features @ head.prototypes.T)


class Published3(nn.Module):
    """facebookresearch/dinov3's head: two layers, and a last one whose weights are not normalised."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 24, bias), nn.GELU(), nn.Linear(24, 8, bias))
        self.last_layer = nn.Linear(8, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


@pytest.mark.parametrize("bias", [True, False])
def test_checkpoints_of_dinov3_load_and_save(bias: bool) -> None:
    published, head = Published3(bias), DINOHead(12, 40, nlayers=2, mlp_bias=bias, weight_norm=False, **SIZES)
    head.load_state_dict(published.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(head.logits(x), published(x))
    published.load_state_dict(head.state_dict())
    assert list(head.state_dict()) == list(published.state_dict())


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_a_step(norm_last_layer: bool) -> None:
    """The loss from the head is that of its logits; fixed norms get no gradient; a copy is made after a forward."""
    student = DINOHead(12, 40, norm_last_layer=norm_last_layer, **SIZES)
    teacher = copy.deepcopy(student).requires_grad_(False)
    crops = torch.randn(3, 5, 12)
    loss = sslfast.prototype_cross_entropy(student(crops), teacher(crops[:2]), student.prototypes, teacher.prototypes)
    p, log_q = torch.softmax(teacher.logits(crops[:2]) / 0.04, -1), torch.log_softmax(student.logits(crops) / 0.1, -1)
    terms = [-(p[t] * log_q[v]).sum(-1).mean() for t in range(2) for v in range(3) if t != v]
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    loss.backward()
    assert (student.last_layer.weight_g.grad is None) == norm_last_layer
    assert all(p.grad is not None for name, p in student.named_parameters() if "weight_g" not in name)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="nlayers must be a whole number of at least 1"):
        DINOHead(12, 40, nlayers=0)
