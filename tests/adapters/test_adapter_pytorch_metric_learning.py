"""pytorch-metric-learning with sslfast inside: the same losses, gradients and errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from adapter_common import left_to_package, peer, same_as_package, values_and_gradients

PML = "pytorch_metric_learning"
DTYPES = [torch.float32, torch.float64]
# Classes of two, more than two (blocks of pairs), one class, no pair; one to three rows.
LABELS = {
    "pairs": torch.arange(32).repeat(2),
    "large classes": torch.randint(-2, 2, (41,), generator=torch.Generator().manual_seed(0)) * 10**15,
    "ragged": torch.tensor([4, 1, 1, 9, 4, 4, 0, 7, 1, 2, 4]),
    "one class": torch.zeros(7, dtype=torch.int32),
    "no positive": torch.arange(7),
    "three rows": torch.tensor([1, 1, 2]),
    "two rows": torch.tensor([1, 1]),
    "one row": torch.tensor([1]),
}


@pytest.fixture(scope="module")
def pml():
    return peer(PML)


@pytest.fixture(scope="module")
def losses(pml):
    return peer(f"{PML}.losses")


@pytest.fixture(autouse=True)
def one_smallest_number(pml, request, monkeypatch):
    """NTXentLoss adds its dtype's smallest number to a probability; here also the float64 truth of a float32 run does.

    With its own it would be another function: −log(0 + 1.2e-38) is 87, −log(0 + 2.2e-308) is 708.
    """
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype") == torch.float32:
        tiny = torch.finfo(torch.float32).tiny
        monkeypatch.setattr(pml.utils.common_functions, "small_val", lambda dtype: max(torch.finfo(dtype).tiny, tiny))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.01, 1, -0.3])
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
def test_a_batch(losses, kind, name, temperature, dtype):
    z = torch.randn(len(LABELS[name]), 9, dtype=dtype)
    same_as_package(PML, lambda z, y: getattr(losses, kind)(temperature)(z, y), z, LABELS[name], floor=10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(13, 20), (5, 1), (1, 2), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
def test_references(losses, kind, rows, dtype):
    labels, ref_labels = (torch.arange(n) % 3 for n in rows)
    z, ref = (torch.randn(n, 6, dtype=dtype) for n in rows)
    loss = getattr(losses, kind)()
    same_as_package(PML, lambda z, r, y, s: loss(z, y, ref_emb=r, ref_labels=s), z, ref, labels, ref_labels)
    same_as_package(PML, lambda z, y, s: loss(z, y, None, z, s), z, labels, labels.clone())


@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
def test_the_very_labels_again_leave_the_diagonal_out(losses, kind):
    """So the package tells a batch against itself: by ``ref_labels is labels``, whatever ref_emb is."""
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    z, ref = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
    loss = getattr(losses, kind)()
    same_as_package(PML, lambda z, r, y: loss(z, y, None, r, y), z, ref, labels)
    same_as_package(PML, lambda z, y: loss(z, y, None, z, y), z, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_reducers_and_a_temperature_that_learns(pml, losses, dtype):
    labels = LABELS["large classes"]
    z = torch.randn(len(labels), 9, dtype=dtype)
    dot, reducers = pml.distances.DotProductSimilarity, pml.reducers
    for options in (
        {"distance": dot()},
        {"distance": dot(normalize_embeddings=False)},
        {"distance": pml.distances.CosineSimilarity(), "reducer": reducers.MeanReducer()},
    ):
        for kind in (losses.NTXentLoss, losses.SupConLoss):
            same_as_package(PML, lambda z, y: kind(0.2, **options)(z, y), z, labels, floor=20.0)  # noqa: B023
    for kind in (losses.NTXentLoss, losses.SupConLoss):
        same_as_package(PML, lambda z, t, y: kind(t)(z, y), z, torch.tensor(0.2, dtype=dtype), labels)  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
def test_self_supervised(losses, kind, symmetric, dtype):
    loss = losses.SelfSupervisedLoss(getattr(losses, kind)(0.1), symmetric=symmetric)
    same_as_package(PML, loss, *torch.randn(2, 21, 8, dtype=dtype).unbind())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (17, 60), (2, 5), (33, 1)], ids=str)
def test_vicreg(losses, shape, dtype):
    views = torch.randn(2, *shape, dtype=dtype).unbind()
    same_as_package(PML, lambda a, b: losses.VICRegLoss()(a, ref_emb=b), *views)
    same_as_package(PML, losses.VICRegLoss(2, 0.5, 3.0, eps=0.1), torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["NTXentLoss", "SupConLoss"])
def test_cross_batch_memory(losses, kind, masked):
    """Steps that fill a memory of 30 and wrap around: values, gradients, and what the memory then holds."""

    places = []

    def steps(*batches: Tensor) -> list[Tensor]:
        memory = losses.CrossBatchMemory(getattr(losses, kind)(0.1), 6, memory_size=30)
        found = []
        places.append([])
        for i, z in enumerate(batches):
            labels = (torch.arange(len(z)) + i) % 5
            mask = torch.arange(len(z)) % 2 == 0 if masked else None
            found.append(memory(z, labels, enqueue_mask=mask))
            places[-1].append((memory.queue_idx, memory.has_been_filled, memory.curr_batch_idx.tolist()))
        return [*found, memory.embedding_memory.clone(), memory.label_memory.clone().to(z.dtype)]

    same_as_package(PML, steps, *torch.randn(6, 13, 6, dtype=torch.float64).unbind())
    truth, own, fast = places
    assert fast == own == truth and fast[-1][1]


def test_what_is_replaced(pml):
    """By name: where a class is not replaced, comparing it with itself finds nothing."""
    with sslfast.patch(PML) as patched:
        assert patched.replaced == ("CrossBatchMemory", "NTXentLoss", "SupConLoss", "VICRegLoss")


def test_left_to_the_package(pml, losses):
    z, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    kinds, reducers, regularizer = pml.distances, pml.reducers, peer(f"{PML}.regularizers").LpRegularizer()
    for loss, reason in [
        (losses.NTXentLoss(distance=kinds.LpDistance()), "the distance LpDistance"),
        (losses.SupConLoss(distance=kinds.CosineSimilarity(power=2)), "options of CosineSimilarity"),
        (losses.NTXentLoss(distance=kinds.CosineSimilarity(collect_stats=True)), "its statistics"),
        (losses.NTXentLoss(reducer=reducers.ThresholdReducer(low=0.5)), "the reducer ThresholdReducer"),
        (losses.NTXentLoss(reducer=reducers.AvgNonZeroReducer()), "the reducer AvgNonZeroReducer"),
        (
            losses.SupConLoss(embedding_regularizer=regularizer),
            "an embedding_regularizer",
        ),
    ]:
        left_to_package(PML, loss, z, labels, reason=reason)
    pairs = tuple(torch.tensor(x) for x in ([0, 1], [4, 5], [0, 1], [2, 3]))
    left_to_package(PML, lambda z, y: losses.NTXentLoss()(z, y, pairs), z, labels, reason="an indices_tuple")
    left_to_package(PML, lambda z, y: losses.NTXentLoss()(z, y.double()), z, labels, reason="labels of dtype")
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(), 6)
    left_to_package(PML, memory, z[:3], labels[:3], reason="the loss ContrastiveLoss")
    with pytest.raises(ValueError, match="Number of embeddings"):
        left_to_package(PML, losses.NTXentLoss(), z, labels[:-1], reason="labels of shape")


def test_subclasses_with_code_of_their_own_keep_it(losses):
    class Twice(losses.NTXentLoss):
        def _compute_loss(self, pos_pairs, neg_pairs, indices_tuple):
            found = super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)
            return {"loss": {**found["loss"], "losses": 2 * found["loss"]["losses"]}}

    class OtherPairs(losses.SupConLoss):
        def mat_based_loss(self, mat, indices_tuple):
            return super().mat_based_loss(mat.square(), indices_tuple)

    class Named(losses.NTXentLoss):
        """Only a name of its own."""

    z, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    left_to_package(PML, Twice(), z, labels, reason="Twice has a _compute_loss of its own")
    left_to_package(PML, OtherPairs(), z, labels, reason="a mat_based_loss of its own")
    same_as_package(PML, Named(), z, labels)


def test_a_hook_on_the_distance_sees_its_matrix(losses):
    seen = []
    loss = losses.NTXentLoss()
    loss.distance.register_forward_hook(lambda *parts: seen.append(parts[2].shape))
    left_to_package(PML, loss, torch.randn(6, 4), torch.arange(6) % 3, reason="hooks")
    assert seen[0] == (6, 6)


def test_half_precision_and_autocast(losses):
    """float16 in, float16 out, with the package's bound on a term, 9.7; float32 in an autocast region."""
    labels = LABELS["large classes"]
    z = torch.randn(len(labels), 9)
    for kind in (losses.NTXentLoss, losses.SupConLoss):
        call = lambda z: kind(0.05)(z, labels)  # noqa: B023, E731
        half, true = values_and_gradients(call, [z.half()]), values_and_gradients(call, [z.double()])
        with sslfast.patch(PML):
            found = values_and_gradients(call, [z.half()])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cast, _ = values_and_gradients(call, [z])
        assert found[0].dtype == found[1].dtype == torch.float16 and cast.dtype == torch.float32
        torch.testing.assert_close(found, half, rtol=0.02, atol=0.02 * half[1].abs().max().item())
        torch.testing.assert_close(cast.double(), true[0], rtol=1e-5, atol=0)
        with sslfast.patch(PML):
            assert kind()(z.half(), torch.zeros_like(labels)) == 0
    z = torch.randn(2, 24, 16).half().unbind()
    with sslfast.patch(PML):
        assert losses.VICRegLoss()(z[0], ref_emb=z[1]).dtype == torch.float16


@pytest.mark.parametrize("region", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16], ids=str)
def test_the_bound_on_a_term_in_an_autocast_region(losses, dtype, region):
    """It is that of the package's similarities: 9.7 in float16, which many terms of these rows exceed."""
    z, labels = torch.randn(64, 16).to(dtype), LABELS["pairs"]
    with torch.autocast("cpu", dtype=region):
        own = values_and_gradients(lambda z: losses.NTXentLoss()(z, labels), [z])
        with sslfast.patch(PML):
            fast = values_and_gradients(lambda z: losses.NTXentLoss()(z, labels), [z])
    rtol = 1e-12 if dtype == torch.float64 else 0.01
    torch.testing.assert_close(fast[0].double(), own[0].double(), rtol=rtol, atol=0)
    assert (fast[1] - own[1]).double().norm() <= 3 * rtol * own[1].double().norm()


def test_limits_of_the_reducer_that_were_changed(losses):
    z, labels = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 4
    for name, limit in (("low", 2.0), ("low", None), ("high", 2.5)):
        loss = losses.SupConLoss()
        setattr(loss.reducer, name, limit)
        left_to_package(PML, loss, z, labels, reason="a low or high that was changed")


@pytest.mark.parametrize("where", ["embeddings", "references"])
def test_nan_comes_out_of_sup_con(losses, where):
    """The package leaves an anchor whose loss is NaN out of the average, as one whose loss is 0."""
    z, ref, labels = torch.randn(8, 4), torch.randn(8, 4), torch.arange(8) % 3
    (z if where == "embeddings" else ref)[2] = torch.nan
    call = lambda z: losses.SupConLoss()(z, labels, None, ref, labels.clone())  # noqa: E731
    assert call(z).isfinite()
    with sslfast.patch(PML):
        assert call(z).isnan()


def test_objects_live_through_patch(losses):
    from sslfast.adapters import pytorch_metric_learning as adapter

    before = losses.NTXentLoss(0.3)
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 4, 8)
    z, labels = torch.randn(6, 4), torch.arange(6) % 3
    with sslfast.patch(PML), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        for loss in (before, copy.deepcopy(before), pickle.loads(pickle.dumps(before)), adapter.NTXentLoss(0.3)):
            assert isinstance(loss, losses.NTXentLoss) and loss.temperature == 0.3
            assert torch.equal(loss(z, labels), before(z, labels))
        memory(z, labels)
        both = losses.MultipleLosses([before, losses.SupConLoss()], weights=[1, 2])
        found = both(z, labels)
        state = memory.state_dict()
    assert "forward" not in vars(losses.NTXentLoss) and "forward" in vars(losses.CrossBatchMemory)
    assert sorted(state) == ["embedding_memory", "label_memory"] and torch.equal(state["embedding_memory"][:6], z)
    torch.testing.assert_close(found, both(z, labels))
    served = adapter.NTXentLoss(0.3)  # served without patch too
    assert pickle.loads(pickle.dumps(served)).temperature == 0.3
    torch.testing.assert_close(served(z, labels), before(z, labels))


def test_what_is_taken_for_rows_that_are_right(losses):
    """Anchors whose loss is 0 to the last bit leave SupCon's average, as in the package's own float32."""
    rows = torch.eye(8)[[0, 0, 1, 1, 2, 3]]
    z = F.normalize(rows + 0.001 * torch.randn(6, 8))
    same_as_package(PML, losses.SupConLoss(0.005), z, torch.tensor([0, 0, 1, 1, 2, 2]), floor=200.0)
