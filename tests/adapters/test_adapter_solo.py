"""solo-learn with sslfast inside: the same losses, gradients and errors, of the installed release and of 1.0.6."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import types

import pytest
import torch

import sslfast
from adapter_common import left_to_package, same_as_package
from benchmarks import Unavailable
from solo_common import Newer, losses

DTYPES = [torch.float32, torch.float64]
SHAPES = [(64, 32), (101, 30), (9, 140), (2, 5), (3, 1)]
OLDER = ("barlow", "byol", "moco", "nnclr", "ressl", "simclr", "simsiam", "swav", "vicreg")
SERVED = {"1.0.2": ["DINOLoss", "SinkhornKnopp", *(f"{name}_loss_func" for name in OLDER)]}


@pytest.fixture(scope="module")
def solo():
    try:
        return losses()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def newer(solo):
    with Newer() as package:
        yield package


def views(shape, dtype, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * shape[0] + shape[1])
    z = torch.randn(count, *shape, generator=generator, dtype=dtype)
    return (z[0], *(z[0] + 0.7 * other for other in z[1:]))


def barlow_of(solo, **options):
    """Its batch normalisation has statistics of the default dtype alone: the truth in float64 needs that as default."""

    def call(a, b):
        torch.set_default_dtype(a.dtype)
        try:
            return solo.barlow_loss_func(a, b, **options)
        finally:
            torch.set_default_dtype(torch.float32)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("name", ["byol_loss_func", "simsiam_loss_func"])
def test_cosines(solo, name, simplified, shape, dtype):
    """The target has no gradient in the package's functions either."""
    p, z = views(shape, dtype)
    same_as_package("solo", lambda p: getattr(solo, name)(p, z.to(p.dtype), simplified=simplified), p, floor=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"lamb": 0.3, "scale_loss": 2.0}], ids=str)
def test_barlow(solo, shape, dtype, options):
    same_as_package("solo", barlow_of(solo, **options), *views(shape, dtype), floor=float(shape[1] ** 2))


def both_releases(package, a, b):
    """The losses of two views, with their defaults and with other options."""
    return (
        package.nnclr_loss_func(a, b),
        package.nnclr_loss_func(a, b, temperature=-0.4),
        package.vicreg_loss_func(a, b) / 25,
        package.vicreg_loss_func(a, b, 0.0, 2, cov_loss_weight=3.5),
    )


def newer_alone(package, a, b):
    return (
        package.vibcreg_loss_func(a, b) / 25,
        package.vibcreg_loss_func(a, b, 1.0, 0.5, cov_loss_weight=30.0),
        package.mocov3_loss_func(a, b),
        package.mocov3_loss_func(a, b.detach(), temperature=1.3),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("release", "losses_of"), [("solo", both_releases), ("newer", both_releases), ("newer", newer_alone)]
)
def test_views(request, release, losses_of, shape, dtype):
    package = request.getfixturevalue(release)
    same_as_package("solo", lambda a, b: losses_of(package, a, b), *views(shape, dtype), floor=10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.05])
def test_simclr_of_two_views(solo, shape, dtype, temperature):
    if "indexes" in inspect.signature(solo.simclr_loss_func).parameters:
        pytest.skip("later releases take indexes")
    call = solo.simclr_loss_func
    same_as_package("solo", lambda a, b: call(a, b, temperature), *views(shape, dtype), floor=10.0)


INDEXES = {
    "two views": [0, 1, 2, 3, 4, 5] * 2,
    "neighbours": [7, 7, 3, 3, 9, 9, -4, -4],
    "four views": [5, 2, 9] * 4,
    "classes": [1, 0, 1, 1, 0, 8, 8, 8, 8, 1, 0, 0, 0],
    "one class": [3, 3, 3],
    "a pair": [1, 1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("indexes", INDEXES.values(), ids=INDEXES)
@pytest.mark.parametrize("temperature", [0.1, -0.7])
def test_simclr_of_indexes(newer, indexes, dtype, temperature):
    ids = torch.tensor(indexes)
    (z,) = views((len(indexes), 12), dtype, count=1)
    z = z + 0.5 * torch.randn(int(ids.max()) + 5, 12, dtype=dtype)[ids]
    same_as_package("solo", lambda x: newer.simclr_loss_func(x, ids, temperature), z, floor=10.0)


def test_simclr_where_the_package_overflows(newer):
    """exp(1/τ) is infinite in float32 from τ = 1/88 down: the package gives NaN, sslfast what it gives in float64."""
    z = torch.nn.functional.normalize(views((40, 16), torch.float64, count=1)[0]).repeat(2, 1)
    z, ids = z + 0.01 * views((80, 16), torch.float64)[1], torch.arange(40).repeat(2)
    assert newer.simclr_loss_func(z.float(), ids, 0.01).isnan()
    truth = newer.simclr_loss_func(z, ids, 0.01)
    with sslfast.patch("solo"):
        torch.testing.assert_close(newer.simclr_loss_func(z.float(), ids, 0.01).double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(32, 16, 200), (5, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("temperature", [0.1, 0.9])
def test_moco(newer, n, d, k, temperature, dtype):
    q, key = (torch.nn.functional.normalize(z, dim=1) for z in views((n, d), dtype))
    queue = views((d, k), dtype, count=1)[0]
    call = newer.mocov2plus_loss_func
    same_as_package("solo", lambda a, b: newer.mocov2plus_loss_func(a, b, queue.to(a), temperature), q, key, floor=10.0)
    assert newer.mocov2plus_loss_func is call


@pytest.fixture
def balance(solo):
    return sys.modules["solo.utils.sinkhorn_knopp"].SinkhornKnopp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(32, 200), (5, 7), (3, 1)])
@pytest.mark.parametrize("count", [2, 3])
def test_swav(solo, balance, count, n, k, dtype):
    """Assignments and the loss, as its method calls them: two or more views."""
    scores = 0.3 * torch.randn(count, n, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    def call(*scores):
        assigned = [balance(epsilon=0.2)(x.detach())[:n] for x in scores]
        return solo.swav_loss_func(list(scores), assigned, 0.2), *assigned

    same_as_package("solo", call, *scores.to(dtype), floor=10.0)


def test_assignments_where_the_package_overflows(balance):
    scores = torch.randn(8, 5)
    scores[2, 1] = 5.0
    assert balance()(scores).isnan().any()
    with sslfast.patch("solo"):
        torch.testing.assert_close(balance()(scores), sslfast.sinkhorn(scores.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(16, 200), (5, 7), (1, 3)])
def test_dino(solo, n, k, dtype):
    """Two steps of two epochs: the second has another center and another temperature."""
    student, teacher = torch.randn(2, 2 * n, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64)

    def call(student):
        loss, found = solo.DINOLoss(k, 0.04, 0.07, 2, 5), []
        for epoch in (0, 1):
            loss.epoch = epoch
            found.append(loss(student * (1 + epoch), teacher.to(student)))
        return *found, loss.center

    same_as_package("solo", call, student.to(dtype), floor=20.0)


def test_dino_of_other_views(solo):
    student, teacher = torch.randn(2, 4, 6)

    def call(x):
        return solo.DINOLoss(6, 0.04, 0.07, 2, 5, num_large_crops=4)(x, teacher)

    left_to_package("solo", call, student, reason="other views than two")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(32, 16, 200), (5, 7, 3), (1, 1, 1)])
@pytest.mark.parametrize("temperatures", [{}, {"temperature_q": 0.5, "temperature_k": 0.2}], ids=str)
def test_ressl(solo, n, d, k, temperatures, dtype):
    q, key = (torch.nn.functional.normalize(z, dim=1) for z in views((n, d), dtype))
    queue = views((k, d), dtype, count=1)[0]
    call = solo.ressl_loss_func
    same_as_package("solo", lambda q, key: call(q, key, queue.to(q), **temperatures), q, key, floor=20.0)


def test_ressl_left_to_solo(solo):
    a, b = views((5, 6), torch.float32)
    queue = torch.randn(9, 6)
    for reason, call in {
        "a gradient for the queue": lambda a, b: solo.ressl_loss_func(a, b, queue + 0 * a.sum()),
        "temperature=tensor": lambda a, b: solo.ressl_loss_func(a, b, queue, temperature_k=torch.tensor(0.2)),
    }.items():
        left_to_package("solo", call, a, b, reason=reason)
    with sslfast.patch("solo"), pytest.raises(RuntimeError):
        solo.ressl_loss_func(a, b, queue[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_comes_out_as_float32(solo, dtype):
    """The package returns its inputs' dtype, but for Barlow Twins."""
    (a, b), queue = torch.randn(2, 8, 6).to(dtype), torch.randn(6, 20).to(dtype)
    for call, own in [
        (lambda: solo.moco_loss_func(a, b, queue), dtype),
        (lambda: solo.vicreg_loss_func(a, b), dtype),
        (lambda: solo.barlow_loss_func(a, b), torch.float32),
    ]:
        plain = call()
        with sslfast.patch("solo"):
            fast = call()
        assert plain.dtype == own and fast.dtype == torch.float32
        torch.testing.assert_close(fast, plain.float(), rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("mask", [torch.bool, torch.float32])
def test_mae(newer, normalise, mask, dtype):
    images, pred = torch.rand(3, 3, 12, 12, dtype=dtype), torch.randn(3, 16, 27, dtype=dtype)
    hidden = (torch.arange(48) % 4 > 0).view(3, 16).to(mask)
    same_as_package(
        "solo", lambda p: newer.mae_loss_func(images.to(p), p, hidden, 3, norm_pix_loss=normalise), pred, floor=1.0
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda p, a, b: p.vicreg_loss_func(a[:1], b[:1]), "one row"),
        (lambda p, a, b: p.vicreg_loss_func(a, b, torch.tensor(2.0)), "sim=tensor"),
        (lambda p, a, b: p.nnclr_loss_func(a[:4], b[:4], torch.tensor(0.2)), "temperature=tensor"),
        (lambda p, a, b: p.mocov2plus_loss_func(a, b, torch.ones(6, 2, requires_grad=True)), "gradient for the queue"),
        (lambda p, a, b: p.simclr_loss_func(a, torch.tensor([0, 0, 1, 1, 2])), "occurs once"),
        (lambda p, a, b: p.simclr_loss_func(a[:4], torch.tensor([0.0, 0, 1, 1])), "indexes of torch.float32"),
        (
            lambda p, a, b: p.mae_loss_func(a.new_ones(1, 3, 2, 2), a[None, :4, :3], 0.3 * torch.ones(1, 4), 1),
            "0 and 1",
        ),
    ],
)
def test_what_is_left_to_the_package(newer, call, reason):
    def value(a, b):
        return torch.nan_to_num(call(newer, a, b).detach()) + a.sum()  # its gradient may be NaN, and equal to none

    left_to_package("solo", value, *views((5, 6), torch.float32), reason=reason)


def test_errors_are_the_package_s_own(solo):
    with sslfast.patch("solo"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            solo.barlow_loss_func(torch.ones(1, 4), torch.ones(1, 4))
        with pytest.raises(ValueError, match="too many values to unpack"):
            solo.vicreg_loss_func(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
        with pytest.raises(RuntimeError, match="dtype|type"):
            solo.barlow_loss_func(torch.ones(3, 4).double(), torch.ones(3, 4).double())


def test_extra_positives_are_the_package_s_own(solo):
    if not hasattr(solo, "manual_simclr_loss_func"):
        pytest.skip("later releases have no extra_pos_mask")
    mask = torch.eye(6, dtype=torch.bool).roll(1, 0)
    a, b = views((3, 4), torch.float32)
    left_to_package(
        "solo", lambda a, b: solo.simclr_loss_func(a, b, extra_pos_mask=mask), a, b, reason="extra_pos_mask"
    )


def holder(name):
    """A module with ``from solo.losses import barlow_loss_func``, as solo.methods has it."""
    module = types.ModuleType(name)
    exec("from solo.losses import barlow_loss_func\nimport solo.losses as all_of_it", vars(module))
    sys.modules[name] = module
    return module


def test_names_imported_before_and_after(solo):
    original = solo.barlow_loss_func
    before = holder("imports_before")
    try:
        with sslfast.patch("solo") as patched:
            after = holder("imports_after")
            served = solo.barlow_loss_func
            assert served is not original and served.__wrapped__ is original
            assert before.barlow_loss_func is served and after.barlow_loss_func is served
            assert importlib.import_module("solo.losses.barlow").barlow_loss_func is served
            assert pickle.loads(pickle.dumps(served)) is served
            assert "barlow_loss_func" in patched.replaced and "wmse_loss_func" in patched.unchanged
        for module in (before, after, solo, importlib.import_module("solo.losses.barlow")):
            assert module.barlow_loss_func is original
    finally:
        del sys.modules["imports_before"], sys.modules["imports_after"]


def test_what_is_served(solo):
    with sslfast.patch("solo") as patched:
        expected = SERVED.get(patched.version)
        assert expected is None or list(patched.replaced) == expected
    names = ["barlow", "mae", "mocov2plus", "mocov3", "nnclr", "simclr", "vibcreg", "vicreg"]
    with Newer(), sslfast.patch("solo") as patched:
        assert {f"{name}_loss_func" for name in names} <= set(patched.replaced)


def test_adapter_functions_are_importable(solo):
    from sslfast.adapters.solo import barlow_loss_func

    a, b = views((20, 6), torch.float32)
    torch.testing.assert_close(barlow_loss_func(a, b), solo.barlow_loss_func(a, b))
    with pytest.raises(ImportError):
        from sslfast.adapters.solo import no_loss_func  # noqa: F401


def test_compiles_in_one_graph(newer):
    a, b = views((24, 8), torch.float32)

    def total(a, b):
        loss = newer.barlow_loss_func(a, b) + newer.vicreg_loss_func(a, b) + newer.vibcreg_loss_func(a, b)
        loss = loss + newer.mocov3_loss_func(a, b) + newer.nnclr_loss_func(a, b)
        return loss + newer.simclr_loss_func(torch.cat([a, b]), torch.arange(24).repeat(2))

    with sslfast.patch("solo"):
        torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="eager")(a, b), total(a, b))
