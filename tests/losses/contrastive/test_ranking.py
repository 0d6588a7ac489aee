"""Multiple-negatives ranking against the stacked softmax of sentence-transformers' formula, and wrong input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import roundings, value_and_gradients, within_budget
from sslfast.losses.contrastive.ranking import DIRECTIONS, MultipleNegativesRankingLoss, multiple_negatives_ranking

N, D = 13, 10


def plain(q: Tensor, d: Tensor, scale: Tensor, negatives: Tensor | None, directions, mode: str) -> Tensor:
    """Every block of similarities side by side, what does not count masked, and one softmax (or one a block)."""
    hard = [] if negatives is None else list(negatives.reshape(N, -1, D).unbind(1))  # each [N, D]
    q, d, *hard = (F.normalize(x) for x in (q, d, *hard))
    documents, same = torch.cat([d, *hard]), torch.eye(N, dtype=torch.bool)
    dots = {
        "query_to_doc": q @ documents.T,
        "query_to_query": q @ q.T,
        "doc_to_query": d @ q.T,
        "doc_to_doc": d @ documents.T,
    }
    masks = {"query_to_query": same, "doc_to_doc": same.repeat(1, 1 + len(hard))}
    chosen = [(scale * dots[name]).masked_fill(masks.get(name, torch.tensor(False)), -torch.inf) for name in directions]
    if mode == "joint":
        log_z = torch.cat(chosen, dim=1).logsumexp(1)
    else:
        log_z = torch.stack([s.logsumexp(1) for s in chosen]).mean(0)
    return (log_z - scale * (q * d).sum(1)).mean()


ALL = [("query_to_doc", *rest) for n in range(4) for rest in itertools.combinations(DIRECTIONS[1:], n)]
MODES = [(d, "joint") for d in ALL] + [(("query_to_doc",), "per_direction"), (ALL[2], "per_direction")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize(("directions", "mode"), MODES, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_value_and_gradients(directions: tuple[str, ...], mode: str, hard: int, dtype: torch.dtype) -> None:
    anchors = torch.randn(N, D)
    tensors = [anchors, anchors + torch.randn(N, D), torch.tensor(20.0)]
    if hard:
        tensors.append(torch.randn(N, hard, D) if hard > 1 else torch.randn(N, D))
    tensors = [t.to(dtype) for t in tensors]

    def ours(a: Tensor, p: Tensor, scale: Tensor, negatives: Tensor | None = None) -> Tensor:
        return multiple_negatives_ranking(a, p, negatives, scale, directions=directions, partition_mode=mode)

    def formula(a: Tensor, p: Tensor, scale: Tensor, negatives: Tensor | None = None) -> Tensor:
        return plain(a, p, scale, negatives, directions, mode)

    kernel, single = value_and_gradients(ours, *tensors), roundings(value_and_gradients, formula, *tensors)
    truth = value_and_gradients(formula, *(t.double() for t in tensors))
    for k, r, t in zip(kernel, single, truth, strict=True):
        within_budget(f"{directions} {mode} {tuple(t.shape)}", k, r, t, dtype, 1.0)


def test_is_the_symmetric_cross_entropy_of_pairs() -> None:
    a, p = (F.normalize(torch.randn(N, D, dtype=torch.float64)) for _ in range(2))
    logits, labels = 20 * a @ p.T, torch.arange(N)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss_fn = MultipleNegativesRankingLoss(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    torch.testing.assert_close(loss_fn(a, p), expected)
    torch.testing.assert_close(MultipleNegativesRankingLoss()(a, p), F.cross_entropy(logits, labels))
    torch.testing.assert_close(
        MultipleNegativesRankingLoss(5.0, normalize=False)(2 * a, 2 * p), F.cross_entropy(logits, labels)
    )


def test_one_pair() -> None:
    """With every direction: the query and its document alone, the masked ones add nothing."""
    a, p = (torch.randn(1, D).requires_grad_() for _ in range(2))
    loss = multiple_negatives_ranking(a, p, directions=DIRECTIONS)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(2.0).log())  # query_to_doc and doc_to_query hold the same logit
    assert a.grad.abs().max() <= 1e-5 and p.grad.isfinite().all()


def test_diagnostics() -> None:
    a, p = (F.normalize(torch.randn(N, D, dtype=torch.float64)) for _ in range(2))
    hard = F.normalize(torch.randn(N, 2, D, dtype=torch.float64), dim=2)
    loss, found = MultipleNegativesRankingLoss(directions=DIRECTIONS, diagnostics=True)(a, p, hard)
    torch.testing.assert_close(loss, multiple_negatives_ranking(a, p, hard, directions=DIRECTIONS))
    s = a @ torch.cat([p, hard.flatten(0, 1)]).T
    torch.testing.assert_close(found.uniformity_at_temperature, (-10 * (2 - 2 * s)).exp().mean().log())
    positive = s.diagonal().clone()
    s[torch.arange(N), torch.arange(N)] = -torch.inf
    torch.testing.assert_close(found.accuracy, (positive > s.amax(1)).double().mean())
    torch.testing.assert_close(found.hardest_negative_similarity, s.amax(1).mean())


def test_learnable_scale_and_compile() -> None:
    module = MultipleNegativesRankingLoss(torch.nn.Parameter(torch.tensor(20.0)), directions=DIRECTIONS)
    a, p, hard = torch.randn(N, D), torch.randn(N, D), torch.randn(N, 2, D)
    expected = value_and_gradients(module, a, p, hard)
    for x, y in zip(
        value_and_gradients(torch.compile(module, fullgraph=True, backend="aot_eager"), a, p, hard),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(x, y)
    module(a, p).backward()
    assert list(module.state_dict()) == ["scale"] and module.scale.grad != 0


A = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((A, torch.ones(5, 3)), {}, ValueError, r"anchors and positives .*same shape"),
        ((A, A, torch.ones(5, 3)), {}, ValueError, r"negatives must have shape \(4, D\) or \(4, H, D\), got \(5, 3\)"),
        ((A, A, torch.ones(4, 2, 2)), {}, ValueError, r"negatives and anchors .*same width.*2 and 3"),
        ((A, A, [A]), {}, TypeError, r"negatives must be a torch.Tensor, got list"),
        ((A, A), {"scale": 0.0}, ValueError, r"scale must be positive, got 0\.0"),
        ((A, A), {"directions": ()}, ValueError, r"must include 'query_to_doc'"),
        ((A, A), {"directions": ("doc_to_query",)}, ValueError, r"must include 'query_to_doc'"),
        ((A, A), {"directions": ("query_to_doc", "sideways")}, ValueError, r"directions must be some of .*sideways"),
        ((A, A), {"directions": "query_to_doc"}, ValueError, r"directions must be some of"),
        ((A, A), {"partition_mode": "apart"}, ValueError, r"partition_mode must be one of .*apart"),
        (
            (A, A),
            {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"},
            ValueError,
            r"per_direction.*hold the positive",
        ),
    ],
)
def test_wrong_input(arguments, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        multiple_negatives_ranking(*arguments, **options)
