"""sentence-transformers with sslfast inside: the same losses, gradients, errors and training runs."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sslfast
from adapter_common import left_to_package, peer, same_as_package, served_runs_agree, values_and_gradients
from helpers import GRAD_LOSS, roundings, within_budget

PACKAGE = "sentence_transformers"
DTYPES = [torch.float32, torch.float64]
# Rows, features, hard negatives.
SHAPES = [(64, 32, 0), (61, 30, 2), (2, 5, 1), (1, 8, 0), (1, 3, 3), (33, 1, 1)]
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 100.0, "directions": ("doc_to_query", "query_to_doc"), "partition_mode": "per_direction"},
    {"scale": 3.0, "directions": ("query_to_doc",), "partition_mode": "per_direction"},
    {"directions": ALL},
    {"directions": ("query_to_doc", "doc_to_doc"), "hardness_mode": "all_negatives"},  # with no strength
]


@pytest.fixture(scope="module")
def losses():
    return peer("sentence_transformers.sentence_transformer.losses")


@pytest.fixture(scope="module")
def util():
    return peer("sentence_transformers.util")


def columns(rows: int, width: int, hard: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Anchors, related positives, and negatives; a repeated row and one of zeros among them."""
    found = [torch.randn(rows, width, dtype=dtype)]
    found += [found[0] + 0.8 * torch.randn(rows, width, dtype=dtype) for _ in range(1 + hard)]
    if rows > 3:
        found[1][-1] = found[1][0]
        found[-1][1] = 0.0
    return found


def plain(losses: Any, **options: Any) -> Callable[..., Tensor]:
    loss = losses.MultipleNegativesRankingLoss(nn.Identity(), **options)
    return lambda *x: loss.compute_loss_from_embeddings(list(x), None)


def cached(losses: Any, **options: Any) -> Callable[..., Tensor]:
    loss = losses.CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), mini_batch_size=7, **options)
    return lambda *x: loss.calculate_loss([list(t.split(7)) for t in x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", [plain, cached])
def test_ranking(losses, form, options, shape, dtype):
    same_as_package(PACKAGE, form(losses, **options), *columns(*shape, dtype), floor=options.get("scale", 20.0))


@pytest.mark.parametrize("form", [plain, cached])
def test_similarities(losses, util, form):
    x = columns(21, 6, 1, torch.float64)
    for similarity in (util.dot_score, util.pytorch_cos_sim):
        same_as_package(PACKAGE, form(losses, similarity_fct=similarity, scale=2.0), *x, floor=30.0)
    cosine, dots = (form(losses, similarity_fct=f)(*x) for f in (util.cos_sim, util.dot_score))
    assert not torch.allclose(cosine, dots)


def test_a_scale_that_learns(losses):
    """A tensor of no dimension gets its gradient."""
    x = [*columns(21, 6, 1, torch.float64), torch.tensor(9.0, dtype=torch.float64)]

    def call(*x: Tensor) -> Tensor:
        loss = losses.MultipleNegativesRankingLoss(nn.Identity())
        loss.scale = x[-1]
        return loss.compute_loss_from_embeddings(list(x[:-1]), None)

    same_as_package(PACKAGE, call, *x, floor=9.0)


def test_backward_inside(losses):
    """with_backward: gradients reach the mini-batches' embeddings, and the value has no graph."""
    x = columns(21, 6, 1, torch.float64)
    loss = losses.CachedMultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), mini_batch_size=5)

    def run() -> list[Tensor]:
        reps = [[part.clone().requires_grad_() for part in t.split(4)] for t in x]
        value = loss.calculate_loss(reps, None, with_backward=True)
        assert not value.requires_grad
        return [value, *(part.grad for minibatches in reps for part in minibatches)]

    served_runs_agree(PACKAGE, run, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_sixteen_bits(losses, dtype, autocast):
    """Without autocast the similarities are float32, as the package's are."""
    x = [t.to(dtype) for t in columns(61, 24, 1)]
    if autocast:
        x[0] = x[0].float()

    def call(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return plain(losses)(*x)

    truth = values_and_gradients(plain(losses), [t.double() for t in x])
    own = roundings(values_and_gradients, call, x)
    with sslfast.patch(PACKAGE), warnings.catch_warnings():
        warnings.filterwarnings("error", message="sslfast does not serve")
        mine = values_and_gradients(call, x)
    assert mine[0].dtype == torch.float32
    for i, (fast, package, true) in enumerate(zip(mine, own, truth, strict=True)):
        tolerance = torch.float32 if i == 0 and not autocast else torch.bfloat16
        if i:
            assert fast.dtype == x[i - 1].dtype
            # The gradient of a row of zeros, divided by 1e-12, leaves the range of float16.
            keep = x[i - 1].any(1) | (dtype != torch.float16)
            fast, package, true = fast[keep], package[keep], true[keep]
        within_budget(f"{i}", fast, package, true, tolerance, 20.0 if i == 0 else GRAD_LOSS * 20.0 / x[0].numel())


def test_left_to_the_package(losses, util):
    x = columns(9, 4, 1)
    for form, (options, reason) in product(
        (plain, cached),
        (
            ({"similarity_fct": util.euclidean_sim}, "a similarity_fct other than"),
            ({"similarity_fct": lambda a, b: util.cos_sim(a, b) ** 2}, "a similarity_fct other than"),
            ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hardness_mode='hard_negatives'"),
            ({"hardness_mode": "in_batch_negatives", "hardness_strength": 0.1}, "hardness_mode='in_batch_negatives'"),
        ),
    ):
        left_to_package(PACKAGE, form(losses, **options), *x, reason=reason)

    assigned = losses.MultipleNegativesRankingLoss(nn.Identity())
    assigned.directions, assigned.partition_mode = ("query_to_doc", "query_to_query"), "per_direction"
    left_to_package(
        PACKAGE, lambda *x: assigned.compute_loss_from_embeddings(list(x), None), *x, reason="per_direction"
    )
    assigned.directions, assigned.scale = ("query_to_doc",), -2.0
    left_to_package(PACKAGE, lambda *x: assigned.compute_loss_from_embeddings(list(x), None), *x, reason="scale=-2.0")
    more = torch.randn(13, 4)
    left_to_package(PACKAGE, plain(losses), *x, more, reason="several shapes")


def test_errors_are_the_package_s_own(losses):
    x = columns(9, 4, 1)
    for call, arguments in (
        (plain(losses), x[:1]),
        (plain(losses), [x[0], x[1][:4]]),
        (plain(losses), [x[0], x[1][:, :3]]),
        (plain(losses), [x[0], x[1].double()]),
        (plain(losses), [x[0], x[1].to_sparse()]),
        (cached(losses), x[:1]),
        (cached(losses), [x[0], x[1][:, :3]]),
    ):
        with pytest.raises(Exception) as own:  # noqa: PT011  (whatever it is)
            call(*arguments)
        with sslfast.patch(PACKAGE), pytest.raises(type(own.value)) as mine:
            call(*arguments)
        assert str(mine.value) == str(own.value)
    with sslfast.patch(PACKAGE):
        for options in ({"scale": 0.0}, {"directions": ("doc_to_doc",)}, {"hardness_strength": -1.0}):
            with pytest.raises(ValueError, match=r"positive|query_to_doc|non-negative"):
                losses.MultipleNegativesRankingLoss(nn.Identity(), **options)


def test_gather_without_a_process_group_is_local(losses):
    x = columns(9, 4, 1, torch.float64)
    same_as_package(PACKAGE, plain(losses, gather_across_devices=True), *x, floor=20.0)


def test_symmetric_classes_and_old_names(losses, recwarn):
    """The deprecated classes are served through their base, and so are the names that the package used to have."""
    x = columns(21, 6, 0)
    old = peer("sentence_transformers.losses")
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        assert getattr(old, name) is getattr(losses, name)

    def symmetric(*x: Tensor) -> Tensor:
        return old.MultipleNegativesSymmetricRankingLoss(nn.Identity()).compute_loss_from_embeddings(list(x), None)

    def cached_symmetric(*x: Tensor) -> Tensor:
        loss = old.CachedMultipleNegativesSymmetricRankingLoss(nn.Sequential(nn.Identity()))
        return loss.calculate_loss([[t] for t in x])

    for call in (symmetric, cached_symmetric):
        same_as_package(PACKAGE, call, *x, floor=20.0)


def test_objects_stay_what_they_were(losses):
    x = columns(9, 4, 1)
    model = nn.Sequential(nn.Linear(4, 4))
    before = losses.MultipleNegativesRankingLoss(model, scale=5.0)
    names = list(before.state_dict())
    with sslfast.patch(PACKAGE) as patch:
        assert patch.replaced == ("CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss")
        for kind in (losses.MultipleNegativesRankingLoss, losses.CachedMultipleNegativesRankingLoss):
            made = kind(model, scale=5.0)
            for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                assert type(again) is kind and again.get_config_dict() == made.get_config_dict()
                assert list(again.state_dict()) == list(made.state_dict())
        fast = before.compute_loss_from_embeddings(x, None)
        assert list(before.state_dict()) == names == ["model.0.weight", "model.0.bias"]
    torch.testing.assert_close(before.compute_loss_from_embeddings(x, None), fast)


def test_adapter_classes(losses):
    from sslfast.adapters import sentence_transformers as adapters

    x = columns(21, 6, 1)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        assert issubclass(getattr(adapters, name), getattr(losses, name))
    for form, shared in ((plain, 1), (cached, 1)):
        mine, own = form(adapters), form(losses)
        torch.testing.assert_close(mine(*x), own(*x))
        assert len(_operators(mine, x)) >= shared and not _operators(own, x)


def _operators(call: Callable[..., Tensor], inputs: list[Tensor]) -> set[str]:
    """sslfast's operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*inputs)
    return {event.key for event in profile.key_averages() if event.key.startswith("sslfast::")}


def test_compiled_whole(losses):
    x = columns(17, 6, 1)
    own = values_and_gradients(plain(losses, directions=ALL), x)
    torch._dynamo.reset()
    with sslfast.patch(PACKAGE):
        fast = values_and_gradients(torch.compile(plain(losses, directions=ALL), fullgraph=True, backend="eager"), x)
    for mine, package in zip(fast, own, strict=True):
        torch.testing.assert_close(mine, package, rtol=1e-4, atol=1e-5)


class Encoder(nn.Sequential):
    """What the losses ask of a model: features in, ``sentence_embedding`` out."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"sentence_embedding": super().forward(features["input_ids"])}

    def get_embedding_dimension(self) -> int:
        return 8


@pytest.mark.parametrize("kind", ["plain", "cached", "matryoshka", "cached matryoshka"])
def test_training_runs_as_before(losses, kind):
    """Through ``forward``: the encoder, dropout replayed by the gradient cache, and the wrapper that truncates."""
    torch.manual_seed(7)
    features = [{"input_ids": torch.randn(12, 5)} for _ in range(3)]
    labels = torch.zeros(12)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        model = Encoder(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 8)).double()
        inputs = [{"input_ids": f["input_ids"].double()} for f in features]
        name = "CachedMultipleNegativesRankingLoss" if "cached" in kind else "MultipleNegativesRankingLoss"
        loss = getattr(losses, name)(model, **({"mini_batch_size": 5} if "cached" in kind else {}))
        if "matryoshka" in kind:
            loss = losses.MatryoshkaLoss(model, loss, [8, 3])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            value = loss([dict(f) for f in inputs], labels)
            value.backward()
            optimizer.step()
            found.append(value.detach())
        return [*found, *(p.detach() for p in model.parameters())]

    served_runs_agree(PACKAGE, run, rtol=1e-8, atol=1e-10)
