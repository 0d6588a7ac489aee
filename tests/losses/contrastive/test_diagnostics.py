"""Diagnostics of a pass against brute force over the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.losses.contrastive.clip import clip
from sslfast.losses.contrastive.diagnostics import Diagnostics, diagnostics_of
from sslfast.losses.contrastive.sup_con import sup_con
from sslfast.ops.similarity_lse import similarity_terms
from sslfast.ops.types import SimilarityTerms


def rows_near(x: Tensor, noise: float) -> Tensor:
    return F.normalize(x + noise * torch.randn_like(x), dim=-1)


def close(got: Diagnostics, expected: dict[str, Tensor]) -> None:
    assert set(expected) == set(got._fields)
    for name, value in got._asdict().items():
        assert value.shape == () and not value.requires_grad, name
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("n", [1, 50])
def test_clip(n: int) -> None:
    """Image → text: the rows are images. One pair has no negative."""
    image = F.normalize(torch.randn(n, 12, dtype=torch.float64)).requires_grad_()
    text = rows_near(image.detach(), 0.6)
    scale = torch.full((1,), 25.0, requires_grad=True)  # neither the inputs' dtype nor their result's shape
    loss, got = clip(image, text, scale, -3.0, diagnostics=True)
    torch.testing.assert_close(loss, clip(image, text, scale))
    s = image.detach() @ text.T
    negative = s.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf).max(1).values
    accuracy = (s.argmax(1) == torch.arange(n)).double().mean()
    assert n == 1 or 0.2 < accuracy < 0.98
    expected = {
        "accuracy": accuracy,
        "positive_similarity": s.diagonal().mean(),
        "hardest_negative_similarity": negative.mean(),
        "alignment": (image.detach() - text).square().sum(1).mean(),
        "uniformity": torch.cdist(image.detach(), text).square().mul(-12.5).exp().mean().log(),
    }
    close(got, expected)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize(("views", "labelled"), [(1, True), (3, True), (3, False)])
def test_sup_con(mode: str, views: int, labelled: bool) -> None:
    """Several positives, anchors without any, and negatives that are the other classes alone."""
    b = 40
    x = rows_near(torch.randn(b, 1, 10, dtype=torch.float64).expand(b, views, 10), 1.5)
    labels = torch.randint(0, 15, (b,)) if labelled else None
    classes = (torch.arange(b) if labels is None else labels)[:, None].expand(b, views).flatten()
    loss, got = sup_con(x, labels, contrast_mode=mode, temperature=0.2, diagnostics=True)
    torch.testing.assert_close(loss, sup_con(x, labels, contrast_mode=mode, temperature=0.2), rtol=0, atol=0)

    z = x.flatten(0, 1)
    anchors = torch.arange(0, len(z), 1 if mode == "all" else views)
    itself = anchors[:, None] == torch.arange(len(z))
    s = z[anchors] @ z.T
    positive = (classes[anchors, None] == classes) & ~itself
    rows = positive.any(1)
    assert not (labelled and views == 1) or not rows.all()
    mean_positive = torch.where(positive, s, 0.0).sum(1)[rows] / positive.sum(1)[rows]
    nearest = s.masked_fill(itself, -torch.inf).argmax(1)
    negative = s.masked_fill(positive | itself, -torch.inf).max(1).values
    expected = {
        "accuracy": (classes[nearest] == classes[anchors])[rows].double().mean(),
        "positive_similarity": mean_positive.mean(),
        "hardest_negative_similarity": negative[rows].mean(),
        "alignment": 2 - 2 * mean_positive.mean(),
        "uniformity": (torch.cdist(z[anchors], z).square() * -2.5)[~itself].exp().mean().log(),
    }
    close(got, expected)


def test_ties_and_rows_left_out() -> None:
    """Equal logits are not right; a row that is left out may hold anything."""
    inf = float("inf")
    terms = SimilarityTerms(
        row_lse=torch.tensor([1.0, 2.0, -inf]),
        col_lse=None,
        positive=torch.tensor([4.0, 6.0, 0.0]),
        hardest=torch.tensor([4.0, 2.0, -inf]),
    )
    got = diagnostics_of(terms, 2.0, 4, rows=torch.tensor([True, True, False]))
    assert got.accuracy == 0.5 and got.positive_similarity == 2.5 and got.hardest_negative_similarity == 1.5
    torch.testing.assert_close(got.uniformity, torch.tensor([1.0, 2.0]).logsumexp(0) - torch.tensor(4.0).log() - 2)


def test_needs_positives_and_hardest() -> None:
    q = torch.randn(5, 3)
    with pytest.raises(ValueError, match="positives and hardest=True"):
        diagnostics_of(similarity_terms(q, q, 1.0, positives=torch.arange(5)), 1.0, 25)
