"""The loss whose positives are summed inside the logarithm."""

from __future__ import annotations

import pytest
import torch

from helpers import roundings, within_budget
from sslfast.losses.contrastive.group_nt_xent import group_nt_xent
from sslfast.losses.contrastive.nt_xent import nt_xent

GROUPS = {"pairs": [0, 1, 2, 3] * 2, "uneven": [4, 4, 0, 0, 0, 7, 7, 7, 7, 4], "one": [2] * 5}


def plain(z, groups, scale, normalize):
    z = torch.nn.functional.normalize(z, dim=1) if normalize else z
    s = scale * z @ z.T
    same, itself = groups[:, None] == groups, torch.eye(len(z), dtype=torch.bool)
    every = s.masked_fill(itself, -torch.inf).logsumexp(1)
    return (every - s.masked_fill(itself | ~same, -torch.inf).logsumexp(1)).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("normalize", [True, False])
def test_value_and_gradients(groups, normalize, dtype):
    torch.manual_seed(1)
    ids = torch.tensor(groups, dtype=torch.int32)
    z, tau = torch.randn(len(groups), 6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def run(loss, kind):
        leaves = [t.to(kind).requires_grad_() for t in (z.clone(), tau.clone())]
        value = 1.7 * loss(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    def formula(x, t):
        return plain(x, ids, 1 / t, normalize)

    truth, own = run(formula, torch.float64), roundings(run, formula, dtype)
    found = run(lambda x, t: group_nt_xent(x, ids, t, normalize=normalize), dtype)
    for name, mine, theirs, true in zip(("value", "z", "temperature"), found, own, truth, strict=True):
        within_budget(name, mine, theirs, true, dtype, floor=10.0)


def test_pairs_are_nt_xent():
    a, b = torch.randn(2, 30, 8)
    torch.testing.assert_close(group_nt_xent(torch.cat([a, b]), torch.arange(30).repeat(2)), nt_xent(a, b, 0.1))


def test_a_group_of_one_is_infinite():
    assert group_nt_xent(torch.randn(3, 4), torch.tensor([1, 1, 2])) == torch.inf


@pytest.mark.parametrize(
    ("groups", "kind", "told"),
    [(torch.zeros(3), TypeError, "groups must hold integers"), (torch.zeros(2).long(), ValueError, "shape")],
)
def test_bad_groups(groups, kind, told):
    with pytest.raises(kind, match=told):
        group_nt_xent(torch.randn(3, 4), groups)
