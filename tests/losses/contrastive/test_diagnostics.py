"""Diagnostics of a pass against brute force over the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
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
    loss, got = sslfast.ClipLoss(diagnostics=True)(image, text, scale, -3.0)
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
        "uniformity_at_temperature": torch.cdist(image.detach(), text).square().mul(-12.5).exp().mean().log(),
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
    loss, got = sslfast.SupConLoss(0.2, mode, diagnostics=True)(x, labels)
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
        "uniformity_at_temperature": (torch.cdist(z[anchors], z).square() * -2.5)[~itself].exp().mean().log(),
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
    torch.testing.assert_close(
        got.uniformity_at_temperature, torch.tensor([1.0, 2.0]).logsumexp(0) - torch.tensor(4.0).log() - 2
    )


def test_needs_positives_and_hardest() -> None:
    q = torch.randn(5, 3)
    with pytest.raises(ValueError, match="positives and hardest=True"):
        diagnostics_of(similarity_terms(q, q, 1.0, positives=torch.arange(5)), 1.0, 25)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_a_loss_they_are_those_of_the_loss(backend: str) -> None:
    """NT-Xent's, InfoNCE's with ids, and CLIP's, by a pass of their own."""
    z0 = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    z1 = rows_near(z0.detach(), 0.6)
    rows, columns = torch.arange(30) % 7, torch.arange(30) % 11 + 3
    z, ids = torch.cat([z0, z1]), torch.arange(60)
    with sslfast.use_backend(backend):
        mine = [
            sslfast.contrastive_diagnostics(z, None, 0.2, positives=ids.roll(30), row_ids=ids),
            sslfast.contrastive_diagnostics(z0, z1, 0.2, row_ids=rows, col_ids=columns),
            sslfast.contrastive_diagnostics(F.normalize(z0), F.normalize(z1), 0.2, normalize=False),
        ]
        theirs = [
            sslfast.NTXentLoss(0.2, diagnostics=True)(z0, z1)[1],
            sslfast.InfoNCELoss(0.2, diagnostics=True)(z0, z1, ids=(rows, columns))[1],
            sslfast.ClipLoss(diagnostics=True)(F.normalize(z0), F.normalize(z1), 5.0)[1],
        ]
    for got, expected in zip(mine, theirs, strict=True):
        close(got, expected._asdict())
    at_two = sslfast.contrastive_diagnostics(z, positives=ids.roll(30), row_ids=ids).uniformity_at_temperature
    torch.testing.assert_close(at_two, sslfast.uniformity(z.detach(), normalize=True))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4, 3),), {}, "positives must say which row belongs to which"),
        ((torch.ones(4, 3), torch.ones(5, 3)), {}, "q has 4 rows and k 5: say with positives"),
        ((torch.ones(4, 3), torch.ones(4, 3), 0.0), {}, "temperature must be finite and not zero"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"row_ids": torch.arange(4)}, "given together"),
        ((torch.ones(4, 3), torch.ones(4, 3)), {"positives": torch.arange(4) + 1}, "columns of k, 0 to 3"),
    ],
)
def test_wrong_input_without_a_loss(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sslfast.contrastive_diagnostics(*arguments, **options)
