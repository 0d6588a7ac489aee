"""One name for three ways of scoring several positives: against the formulas with every matrix."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import sslfast
from helpers import check_loss

LABELS = torch.tensor([4, 4, 0, 0, 0, 7, 7, 7, 7, 4])


def formula(z, positives, labels=LABELS, temperature=0.3):
    z = F.normalize(z)
    s = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool)
    same = (labels[:, None] == labels) & ~itself
    every = s.masked_fill(itself, -torch.inf).logsumexp(1)
    if positives == "sum":
        return (every - s.masked_fill(~same, -torch.inf).logsumexp(1)).mean()
    if positives == "mean":
        return (every - (s * same).sum(1) / same.sum(1)).mean()
    others = s.masked_fill(same | itself, -torch.inf).logsumexp(1)
    return (torch.logaddexp(others[:, None], s) - s)[same].mean()


@pytest.mark.parametrize("positives", ["mean", "each", "sum"])
@pytest.mark.parametrize("labels", [LABELS, LABELS.double(), LABELS > 3], ids=["integers", "floats", "truth values"])
def test_value_and_gradient(positives, labels):
    check_loss(
        lambda z: sslfast.labelled_nt_xent(z, labels, positives=positives, temperature=0.3),
        lambda z: formula(z, positives, labels),
        (torch.randn(10, 6),),
        floor=20.0,
    )


@pytest.mark.parametrize("positives", ["mean", "each", "sum"])
def test_classes_of_two_are_nt_xent(positives):
    a, b = torch.randn(2, 30, 8)
    found = sslfast.labelled_nt_xent(torch.cat([a, b]), torch.arange(30).repeat(2), positives=positives)
    torch.testing.assert_close(found, sslfast.nt_xent(a, b, 0.1))


@pytest.mark.parametrize("positives", ["mean", "each"])
def test_keys_are_those_of_its_function(positives):
    z, keys, labels, key_labels = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6) % 3, torch.arange(9) % 3
    given = {"own": torch.arange(6), "temperature": 0.2, "normalize": False}
    found = sslfast.labelled_nt_xent(z, labels, keys, key_labels, positives=positives, **given)
    if positives == "mean":
        expected = sslfast.sup_con_keys(z, labels, keys, key_labels, reduction="mean", **given)
    else:
        expected = sslfast.pair_nt_xent(z, labels, keys, key_labels, **given)
    assert found == expected


def test_arguments():
    z, labels = torch.randn(4, 3), torch.arange(4) % 2
    with pytest.raises(ValueError, match="positives must be 'mean', 'each' or 'sum', got 'all'"):
        sslfast.labelled_nt_xent(z, labels, positives="all")
    with pytest.raises(ValueError, match="positives='sum'"):
        sslfast.labelled_nt_xent(z, labels, z, labels, positives="sum")
    for positives in ("mean", "each", "sum"):
        with pytest.raises(ValueError, match="labels must have shape"):
            sslfast.labelled_nt_xent(z, labels[:3], positives=positives)
