"""DeepCluster-v2's loss against the formula and solo-learn, and its bank: clustering, labels, state."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import solo_common
import sslfast
from helpers import roundings, within_budget

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def formula(z: Tensor, heads: list[Tensor], labels: Tensor, temperature: float = 0.1) -> Tensor:
    losses = []
    for w, y in zip(heads, labels, strict=True):
        scores = (z @ w.T).reshape(-1, len(w)) / temperature
        losses.append(F.cross_entropy(scores, y.clamp(min=-1).repeat(len(scores) // len(y)), ignore_index=-1))
    return torch.stack(losses).mean()


def inputs(crops: tuple[int, ...], n: int, d: int, counts: list[int]) -> tuple[Tensor, list[Tensor], Tensor]:
    z = F.normalize(torch.randn(*crops, n, d), dim=-1)
    heads = [F.normalize(torch.randn(k, d), dim=1) for k in counts]
    labels = torch.stack([torch.randint(0, k, (n,)) for k in counts])
    if n > 2:
        labels[:, 1], labels[-1, 2] = -100, -1
    return z, heads, labels


def gradients(function, z: Tensor, heads: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (z, *heads)]
    loss = function(leaves[0], leaves[1:])
    return [loss, *torch.autograd.grad(2 * loss, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [((8,), 16, 32, [50, 70]), ((2, 3), 5, 13, [7]), ((), 9, 4, [3, 3, 3]), ((2,), 1, 5, [1])], ids=str
)
def test_value_and_gradients_from_features_and_from_logits(case, dtype: torch.dtype) -> None:
    z, heads, labels = inputs(*case)
    z, heads = z.to(dtype), [w.to(dtype) for w in heads]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = roundings(lambda: gradients(lambda z, w: formula(z, w, labels), z.to(wide), [w.to(wide) for w in heads]))
    truth = gradients(lambda z, w: formula(z, w, labels), z.double(), [w.double() for w in heads])
    features = gradients(lambda z, w: sslfast.deep_cluster_v2(z, labels, prototypes=w), z, heads)
    logits = gradients(lambda z, w: sslfast.deep_cluster_v2([z.to(wide) @ p.to(wide).T for p in w], labels), z, heads)
    for found in (features, logits):
        assert found[0].dtype == wide and found[0].shape == ()
        for i, (mine, true) in enumerate(zip(found, truth, strict=True)):
            ones = [run[i].to(mine.dtype) for run in plain] if isinstance(plain[0], list) else plain[i].to(mine.dtype)
            within_budget(f"{i}", mine, ones, true, wide if i == 0 else dtype, 1.0)


def test_value_is_solo_learns() -> None:
    losses = solo_common.losses()
    z, heads, labels = inputs((2,), 12, 8, [9, 9])
    labels = labels.clamp(min=-1)
    outputs = torch.stack([z @ w.T for w in heads])  # [P, V, N, C]
    expected = losses.deepclusterv2.deepclusterv2_loss_func(outputs, labels, 0.2)
    torch.testing.assert_close(sslfast.deep_cluster_v2(outputs, labels, 0.2), expected)
    torch.testing.assert_close(sslfast.deep_cluster_v2(z, labels, 0.2, prototypes=heads), expected)


@pytest.mark.parametrize("from_features", [True, False])
def test_a_head_without_labels_is_nan_with_zero_gradient(from_features: bool) -> None:
    z = torch.eye(3, requires_grad=True)
    labels = torch.full((1, 3), -100)
    loss = (
        sslfast.deep_cluster_v2(z, labels, prototypes=torch.eye(3))
        if from_features
        else sslfast.deep_cluster_v2(z[None], labels)
    )
    loss.backward()
    assert loss.isnan() and (z.grad == 0).all()


def test_gradcheck_twice_compile_and_autocast() -> None:
    z, heads, labels = inputs((2,), 4, 5, [3])
    leaves = [t.double().requires_grad_() for t in (z, heads[0])]
    function = lambda z, w: sslfast.deep_cluster_v2(z, labels, 0.5, prototypes=w)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, heads[0]), function(z, heads[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(z.bfloat16(), heads[0]), function(z.bfloat16().float(), heads[0]))


def test_clustering_labels_samples_and_moves_the_prototypes() -> None:
    """Two heads from two banks; sample 3 is never seen."""
    criterion = sslfast.DeepClusterV2Loss(9, 6, [3, 4], bank_size=8)
    head = sslfast.SwAVPrototypes(6, [3, 4])
    index = torch.tensor([7, 1, 5, 0, 8, 2, 4, 6])
    z = F.normalize(torch.randn(2, 8, 6), dim=2)
    assert criterion(z, index, head).isnan() and (criterion.assignments == -100).all()
    criterion.update(z[:, :5], index[:5])
    criterion.update(z[:, 5:], index[5:])
    criterion.cluster(head, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for h, weight in enumerate(head.prototypes):
        found = sslfast.k_means(z[h], len(weight), metric="cosine", generator=generator)
        assert torch.equal(weight.detach(), found.centroids)
        assert torch.equal(criterion.assignments[h, index], found.assignments)
    assert (criterion.assignments[:, 3] == -100).all() and criterion.pointer == 0
    labels = criterion.assignments[:, index]
    torch.testing.assert_close(criterion(z, index, head), formula(z, head.prototypes, labels))
    with_unseen = torch.tensor([3, 7, 3, 1])
    rows = torch.randn(2, 4, 6)
    expected = formula(rows[:, 1::2], head.prototypes, criterion.assignments[:, [7, 1]])
    torch.testing.assert_close(criterion(rows, with_unseen, head), expected)


def test_the_bank_keeps_the_last_samples_and_a_checkpoint_changes_nothing() -> None:
    criterion = sslfast.DeepClusterV2Loss(20, 3, [2], bank_size=5, bank_views=1)
    z = torch.randn(1, 20, 3)
    for first, last in ((0, 3), (3, 7), (7, 19)):
        criterion.update(z[:, first:last], torch.arange(first, last))
    assert sorted(criterion.indices.tolist()) == [14, 15, 16, 17, 18]
    assert torch.equal(criterion.embeddings[0], z[0, criterion.indices])
    saved = io.BytesIO()
    torch.save(criterion.state_dict(), saved)
    saved.seek(0)
    again = sslfast.DeepClusterV2Loss(20, 3, [2], bank_size=5, bank_views=1)
    again.load_state_dict(torch.load(saved))
    weights = [torch.zeros(2, 3), torch.zeros(2, 3)]
    for module, weight in zip((criterion, again), weights, strict=True):
        module.cluster([weight], generator=torch.Generator().manual_seed(1))
    index = torch.arange(14, 19)
    assert torch.equal(*weights) and torch.equal(criterion.assignments, again.assignments)
    assert criterion(z[:, 14:19], index, weights[0]) == again(z[:, 14:19], index, weights[1])


def test_a_sample_that_is_twice_in_the_bank_has_the_larger_label() -> None:
    criterion = sslfast.DeepClusterV2Loss(2, 2, [2], bank_size=4, bank_views=1)
    criterion.update(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]), torch.tensor([0, 0, 1, 1]))
    criterion.cluster([torch.zeros(2, 2)])
    assert criterion.assignments.tolist() in ([[1, 1]], [[0, 0]])


Z, W, Y = torch.ones(2, 4, 3), torch.ones(5, 3), torch.zeros(1, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z, Y + 5), {"prototypes": W}, ValueError, r"assignments must be below the 5 prototypes, got 5"),
        ((Z[None], Y + 3), {}, ValueError, r"assignments must be below the 3 prototypes, got 3"),
        ((Z, Y.float()), {"prototypes": W}, TypeError, r"assignments must hold integers, got torch.float32"),
        ((Z, Y[:, :3]), {"prototypes": W}, ValueError, r"one for each sample: 8 rows of features, 3 assignments"),
        ((Z, Y.expand(2, 4)), {"prototypes": W}, ValueError, r"assignments must be \[1, N\]"),
        ((Z, Y, 0.0), {"prototypes": W}, ValueError, r"temperature must be finite and not zero"),
        ((Z, Y, "cold"), {"prototypes": W}, TypeError, r"temperature must be a number"),
        ((Z, Y), {"prototypes": W[:, :2]}, ValueError, r"width"),
        ((Z, Y), {"prototypes": W[0]}, ValueError, r"prototypes of a head must be \[K, D\]"),
        (([Z], Y), {"prototypes": W}, TypeError, r"outputs must be a tensor of features where prototypes are given"),
        ((Z.long(), Y), {}, TypeError, r"outputs must be float32"),
        ((3, Y), {}, TypeError, r"outputs must be a tensor or a sequence of tensors, got int"),
        (
            (Z, Y),
            {"prototypes": sslfast.SwAVPrototypes(3, 5, bias=True)},
            ValueError,
            r"prototypes must be a head without bias",
        ),
    ],
)
def test_wrong_input(arguments, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sslfast.deep_cluster_v2(*arguments, **options)


def test_wrong_input_of_the_module() -> None:
    criterion = sslfast.DeepClusterV2Loss(6, 3, [2])
    for index, error, message in (
        (torch.tensor([6]), ValueError, "index must be from 0 to 5, got 6 to 6"),
        (torch.tensor([1.0]), TypeError, "index must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            criterion.update(torch.zeros(2, 1, 3), index)
    with pytest.raises(ValueError, match=r"features must have shape \(2, 1, 3\), got \(1, 1, 3\)"):
        criterion.update(torch.zeros(1, 1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="the bank must hold samples to be clustered, got none"):
        criterion.cluster([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"prototypes must have shapes \[\(2, 3\)\], got \[\(3, 3\)\]"):
        criterion.cluster([torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="num_prototypes must be a whole number"):
        sslfast.DeepClusterV2Loss(6, 3, [0])
