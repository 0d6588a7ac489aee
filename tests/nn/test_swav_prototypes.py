"""SwAV's prototypes: lightly's values and keys, published checkpoints, frozen steps, losses from features."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sslfast
from adapter_common import peer


@pytest.mark.parametrize("counts", [11, [5, 7]], ids=str)
def test_lightlys_checkpoints_fit_both_ways(counts: int | list[int]) -> None:
    heads = peer("lightly.models.modules.heads")
    theirs, mine = heads.SwaVPrototypes(6, counts), sslfast.SwAVPrototypes(6, counts, bias=True)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(4, 6)
    for head in (theirs, mine):
        head.normalize()
    for a, b in zip(mine(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="heads.0.bias"):
        sslfast.SwAVPrototypes(6, counts).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("form", ["swav", "solo", "own"])
def test_published_checkpoints_are_loaded(form: str) -> None:
    """Of a model whose last layer is called prototypes."""
    counts = [5, 7]
    rows = [torch.randn(k, 6) for k in counts]
    keys = {
        "swav": "prototypes.prototypes{}.weight",
        "solo": "prototypes.{}.weight",
        "own": "prototypes.heads.{}.weight",
    }
    model = nn.ModuleDict({"prototypes": sslfast.SwAVPrototypes(6, counts)})
    model.load_state_dict({keys[form].format(h): w for h, w in enumerate(rows)})
    assert all(torch.equal(a, b) for a, b in zip(model["prototypes"].prototypes, rows, strict=True))
    single = nn.ModuleDict({"prototypes": sslfast.SwAVPrototypes(6, 5)})
    single.load_state_dict({"prototypes.weight": rows[0]})
    assert torch.equal(single["prototypes"].prototypes, rows[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"prototypes.weight": rows[0]})


def test_scores_and_norms() -> None:
    head = copy.deepcopy(sslfast.SwAVPrototypes(6, [5, 7]))
    head.normalize()
    for weight, scores in zip(head.prototypes, head(torch.eye(6)), strict=True):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))
        torch.testing.assert_close(scores, weight.T)
    assert head.heads[0].weight.requires_grad and head(torch.randn(2, 3, 6))[1].shape == (2, 3, 7)


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_prototypes_get_no_gradient(bias: bool) -> None:
    head = sslfast.SwAVPrototypes(6, [5, 7], n_steps_frozen_prototypes=2, bias=bias)
    x = torch.randn(4, 6, requires_grad=True)
    for step, learns in ((0, False), (1, False), (2, True)):
        x.grad = None
        sum(s.square().sum() for s in head(x, step)).backward()
        assert x.grad.abs().sum() > 0 and all((p.grad is not None) == learns for p in head.parameters())
        assert all(w.requires_grad == learns for w in head.prototypes_at(step))
    with pytest.raises(ValueError, match="step must be given where n_steps_frozen_prototypes is not 0"):
        head(x)


def swav_from_features(z: Tensor, prototypes: Tensor) -> Tensor:
    losses = []
    for i, x in enumerate(z):
        bias = sslfast.prototype_sinkhorn(x, prototypes, 0.05)
        pairs = [(i, v) for v in range(len(z)) if v != i]
        losses.append(
            sslfast.prototype_cross_entropy(
                z, z.detach(), prototypes, teacher_temperature=0.05, teacher_bias=bias, pairs=pairs
            )
        )
    return torch.stack(losses).mean()


def test_losses_from_features_are_those_of_scores() -> None:
    """Value and gradient; K is not a multiple of anything."""
    head = sslfast.SwAVPrototypes(8, 37).double()
    head.normalize()
    values = []
    for from_features in (False, True):
        z = nn.functional.normalize(torch.linspace(-1, 2, 3 * 20 * 8).sin().view(3, 20, 8).double(), dim=2)
        z.requires_grad_()
        head.zero_grad()
        loss = swav_from_features(z, head.prototypes) if from_features else sslfast.swav(list(head(z).unbind(0)))
        loss.backward()
        values.append((loss.detach(), z.grad, head.heads[0].weight.grad.clone()))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("arguments", [(0,), (4, 0), (4, []), (4, 3, -1), (4, 2.5)], ids=str)
def test_wrong_sizes(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"input_dim|n_prototypes|n_steps"):
        sslfast.SwAVPrototypes(*arguments)
