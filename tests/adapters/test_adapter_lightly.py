"""lightly with sslfast inside: the same losses, gradients, state and errors."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor

import sslfast
from adapter_common import left_to_package, peer, same_as_package
from helpers import two_views
from lightly_common import lightly_loss, pair
from sslfast.adapters import _serve

DTYPES = [torch.float32, torch.float64]
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(64, 32), (101, 30), (2, 5), (33, 1)]
# Wide and tall, ragged, two rows, one feature.
MOMENT_SHAPES = [(64, 32), (31, 90), (101, 30), (2, 5), (33, 1)]

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's DCLWLoss


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


@pytest.fixture(scope="module")
def utils(loss):
    return importlib.import_module("lightly.models.utils")


def same(call, *inputs: Tensor, **options) -> None:
    same_as_package("lightly", call, *inputs, **options)


# ------------------------------------------------------------------------------------------------------- contrastive


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.07, -0.3])
def test_nt_xent(loss, shape, dtype, temperature):
    same(lambda a, b: loss.NTXentLoss(temperature)(a, b), *pair(shape, dtype), floor=1 / abs(temperature))


def test_a_temperature_that_learns(loss):
    def call(a, b, temperature):
        criterion = loss.NTXentLoss()
        criterion.temperature = temperature
        return criterion(a, b)

    same(call, *pair((20, 6)), torch.tensor(0.2), floor=1 / 0.2)
    left_to_package("lightly", call, *pair((20, 6)), torch.tensor([0.2]), reason="a temperature tensor")
    left_to_package("lightly", call, *pair((20, 6)), torch.tensor(1e-9), reason="a temperature that is no number")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"dim": -1, "eps": 1e-6}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_negative_cosine(loss, shape, options, dtype):
    same(lambda a, b: loss.NegativeCosineSimilarity(**options)(a, b), *pair(shape, dtype), floor=1.0)


def test_negative_cosine_that_is_left(loss):
    a, b = pair((6, 4))
    for options, reason in (
        ({"dim": 0}, "dim=0"),
        ({"eps": 0.0}, "eps that is no number"),
        ({"eps": 0.5}, "eps that is no number"),
    ):
        call = lambda a, b, options=options: loss.NegativeCosineSimilarity(**options)(a, b)  # noqa: E731
        left_to_package("lightly", call, a, b, reason=reason)
    places = torch.randn(3, 4, 5)
    left_to_package("lightly", lambda a: loss.NegativeCosineSimilarity()(a, a * a), places, reason="3 dimensions")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["DCL", "DCLW"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dcl(loss, shape, weighted, dtype):
    def call(a, b):
        return loss.DCLWLoss(0.2, sigma=0.3)(a, b) if weighted else loss.DCLLoss(0.2)(a, b)

    same(call, *pair(shape, dtype), floor=1 / 0.2)


def test_one_pair(loss):
    one = pair((1, 8))
    left_to_package("lightly", loss.NTXentLoss(), *one, reason="one pair, which has no negative")
    with sslfast.patch("lightly"):
        assert loss.NTXentLoss()(*one) == 0
        assert loss.DCLLoss()(*one) == float("-inf")  # lightly's: nothing is left in the denominator


def test_weights(loss):
    weights = lightly_loss("dcl_loss").negative_mises_fisher_weights
    same(lambda a, b: loss.DCLLoss(weight_fn=weights)(a, b), *pair((9, 4)), floor=10)
    own = loss.DCLLoss(weight_fn=lambda a, b: (a - b).square().sum(1))
    left_to_package("lightly", own, *pair((9, 4)), reason="a weight_fn of its own")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"t": 2, "lam": 0.3, "alpha": 1.5}], ids=str)
@pytest.mark.parametrize("shape", [(64, 32), (33, 7), (2, 5)], ids=str)
def test_hypersphere(shape, options, dtype):
    same(lambda a, b: lightly_loss("hypersphere_loss").HypersphereLoss(**options)(a, b), *pair(shape, dtype))


@pytest.mark.parametrize("zeros", [1, 2])
def test_hypersphere_of_rows_of_zeros(zeros):
    """As ReLU leaves them."""
    a, b = pair((8, 5), torch.float64)
    a[3 : 3 + zeros] = 0
    criterion = lightly_loss("hypersphere_loss").HypersphereLoss()
    # The other rows' gradients: a zero row's is divided by lightly's eps of 1e-12.
    same(lambda others: criterion(torch.cat([a[3 : 3 + zeros], others]), b), torch.cat([a[:3], a[3 + zeros :]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("shape", [(64, 32), (33, 7), (2, 5)], ids=str)
def test_koleo(loss, shape, eps, dtype):
    same(lambda x: loss.KoLeoLoss(eps=eps)(x), pair(shape, dtype)[0])


def test_koleo_that_is_left_to_lightly(loss):
    x = pair((9, 4))[0]
    left_to_package("lightly", loss.KoLeoLoss(p=1), x, reason="a distance that is not Euclidean")
    left_to_package("lightly", loss.KoLeoLoss(), x[:1], reason="one row, which has no neighbour but itself")
    other = loss.KoLeoLoss()
    other.eps = 1e-3
    left_to_package("lightly", other, x, reason="eps that is no positive number, or two of them")


def banked(loss, dtype: torch.dtype, options=None):
    """A loss with a bank of 20 keys that is the same every time."""
    torch.manual_seed(3)
    return loss.NTXentLoss(0.1, memory_bank_size=(20, 6), **(options or {})).to(dtype)


def keys_of(a: Tensor) -> Tensor:
    return 2 * a.detach().flip(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_memory_bank(loss, dtype):
    same(lambda a, b: banked(loss, a.dtype)(a, b), *pair((7, 6), dtype), floor=10)
    same(lambda a: banked(loss, a.dtype)(a, keys_of(a)), pair((7, 6), dtype)[0], floor=10)  # as MoCo's


def test_the_bank_is_lightlys_bit_by_bit(loss):
    steps = [pair((rows, 6)) for rows in (7, 7, 7, 20, 25, 3)]  # wraps around, where lightly drops keys; fills it; more

    def run() -> list[Tensor]:
        criterion = banked(loss, torch.float32)
        for i, (a, b) in enumerate(steps):
            criterion(a.requires_grad_(i != 1), b)  # anchors that do not learn leave the bank as it is
            with torch.no_grad():
                criterion(b, a)
        return [t.clone() for t in (criterion.memory_bank.bank, criterion.memory_bank.bank_ptr)]

    own = run()
    with sslfast.patch("lightly"):
        fast = run()
    assert all(torch.equal(a, b) for a, b in zip(own, fast, strict=True))


def test_a_bank_that_lightly_refuses(loss):
    with sslfast.patch("lightly"), pytest.raises(RuntimeError, match="same dtype|expected"):
        criterion = banked(loss, torch.float32)
        before = criterion.memory_bank.bank_ptr.clone()
        with torch.no_grad():
            criterion(*pair((7, 6), torch.float64))
    assert torch.equal(criterion.memory_bank.bank_ptr, before)


# ---------------------------------------------------------------------------------------------------- second moments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MOMENT_SHAPES, ids=str)
def test_barlow_twins(loss, shape, dtype):
    same(lambda a, b: loss.BarlowTwinsLoss(0.03)(a, b), *two_views(shape, dtype), floor=shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MOMENT_SHAPES, (64, 3, 32), (63, 3, 32), (16, 2, 1, 128)], ids=str)
def test_vicreg(loss, shape, dtype):
    a, b = two_views(shape, dtype)
    call = lambda a, b: loss.VICRegLoss(10, 20.0, 3, eps=1e-3)(a, b)  # noqa: E731
    if a.dim() > 2 and len(a) * a.shape[-1] < 2048:
        left_to_package("lightly", call, a, b, reason="places of fewer than 2048 numbers, too few to gain anything")
    elif len(a) < 4:
        left_to_package("lightly", call, a, b, reason="fewer than 4 rows, too few to gain anything")
    else:
        same(call, a, b, floor=100)


@pytest.mark.parametrize("shape", [(31, 90), (40, 6), (9, 3, 5)], ids=str)
def test_covariance_loss(shape):
    """Not put into lightly, but there to be imported."""
    mine = importlib.import_module("sslfast.adapters.lightly").covariance_loss
    same(lightly_loss("vicreg_loss").covariance_loss, two_views(shape)[0].float(), floor=10, patched=mine)
    _serve._told.clear()
    with pytest.warns(UserWarning, match="one row"):
        assert mine(torch.randn(1, 4)).isnan()  # lightly's answer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MOMENT_SHAPES, ids=str)
def test_tico(loss, shape, dtype):
    """Three steps: C moves, stays, and is used."""
    steps = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    state = []

    def call(a, b):
        criterion = loss.TiCoLoss(0.7, rho=2)
        first = criterion(a, b, update_covariance_matrix=False)
        assert criterion.C.count_nonzero() == 0
        losses = [first, criterion(a, steps[0].to(a)), criterion(b, a, False), criterion(b, steps[1].to(a))]
        state.append(criterion.C)
        return losses

    same(call, *pair(shape, dtype), floor=10)
    truth, own, fast = state
    assert fast.dtype == own.dtype and not fast.requires_grad
    torch.testing.assert_close(fast, own)


def views(dtype: torch.dtype, global_views=2, local_views=2, rows=4, width=512, features=6):
    """Features and grids of global 7 × 7 and local 3 × 2 views, on regular grids: many places are equally far apart."""
    inputs = []
    for i in range(global_views + local_views):
        height, breadth = (7, 7) if i < global_views else (3, 2)
        ys, xs = torch.arange(float(height)) * 32.1, torch.arange(float(breadth)) * 32.1
        grid = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1).expand(rows, -1, -1, -1) + 5.3 * (i + 1)
        inputs += [torch.randn(rows, width, dtype=dtype), torch.randn(rows, height, breadth, features, dtype=dtype)]
        inputs.append(grid.to(dtype).contiguous())
    return inputs


def of_views(criterion, global_views: int, *inputs: Tensor) -> Tensor:
    triples = [inputs[i : i + 3] for i in range(0, len(inputs), 3)]
    features, grids = [t[:2] for t in triples], [t[2] for t in triples]
    given = [features[:global_views], grids[:global_views]]
    if len(triples) > global_views:
        given += [features[global_views:], grids[global_views:]]
    return criterion(*given)


@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (1, 1)], ids=str)
def test_vicregl(loss, counts):
    """Which places of a regular grid match, rounding decides in float32: the matches are lightly's all the same."""
    options = {"alpha": 0.6, "num_matches": (20, 4)}
    call = lambda *inputs: of_views(loss.VICRegLLoss(**options).to(inputs[0].dtype), counts[0], *inputs)  # noqa: E731
    same(call, *views(torch.float64, *counts), floor=100)
    inputs = views(torch.float32, *counts)
    own = call(*inputs)
    with sslfast.patch("lightly"):
        fast = call(*inputs)
    assert fast.shape == own.shape == (1,)
    torch.testing.assert_close(fast, own, rtol=3e-6, atol=0)


def test_vicregl_that_is_left(loss):
    criterion = loss.VICRegLLoss()
    inputs = views(torch.float64, 2, 0)
    inner = copy.deepcopy(criterion)
    inner.vicreg_loss.eps = 1e-2
    twice = views(torch.float64, 3, 0)
    twice[4] = twice[1]  # lightly makes no pair of a tensor and itself
    for call, given, reason in (
        (inner, inputs, "vicreg_loss has weights of its own"),
        (criterion, twice, "one tensor for several views"),
        (criterion, views(torch.float64, 2, 0, width=511), "places of fewer than 2048 numbers"),
    ):
        own = of_views(call, len(given) // 3, *given)
        _serve._told.clear()
        with sslfast.patch("lightly"), pytest.warns(UserWarning, match=reason):
            fast = of_views(call, len(given) // 3, *given)
        torch.testing.assert_close(fast, own)  # not bit by bit: its local losses are VICRegLoss, which sslfast serves


@pytest.mark.parametrize("shape", [(6, 2, 9), (9, 4, 5), (3, 1, 2)], ids=str)
def test_mmcr(loss, shape):
    same(lambda a, b: loss.MMCRLoss(0.1)(a, b), *pair(shape), floor=10)


def test_mmcr_in_float64(loss):
    """Of small singular values a Gram matrix keeps half the digits: too few."""
    scales = torch.tensor([1, 1e-7, 1, 1, 1e-7], dtype=torch.float64)
    views = [x * scales for x in pair((6, 2, 5), torch.float64)]
    left_to_package("lightly", loss.MMCRLoss(0.5), *views, reason="float64, half of whose digits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("shape", [(31, 90), (40, 6), (33, 1), (1, 4)], ids=str)
def test_frossl(loss, shape, count, dtype):
    same(lambda *z: loss.FroSSLLoss(0.4)(list(z)), *torch.randn(count, *shape, dtype=dtype).unbind(), floor=20)


WHITENINGS = [
    {"embedding_dim": 8, "w_size": 16},
    {"embedding_dim": 5, "w_size": 12, "w_iter": 3, "num_samples": 3, "momentum": 0.2},
    {"embedding_dim": 6, "w_size": 48, "eps": 0.1, "track_running_stats": False},
]


@pytest.mark.parametrize("options", WHITENINGS, ids=["1", "3", "no statistics"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_w_mse(loss, options, dtype):
    """Value, gradient, buffers, and the random numbers that are left; by a loss that knows which row is which."""
    buffers, rows = [], 48 * options.get("num_samples", 2)
    options = {"loss_fn": lambda x, y: (torch.arange(len(x)).unsqueeze(1) * (x - 2 * y)).square().mean(), **options}

    def call(x):
        torch.manual_seed(5)
        criterion = loss.WMSELoss(**options).to(x.dtype)
        first = criterion(x)
        second = criterion.whitening(x)
        buffers.append([*criterion.buffers(), torch.rand(1)])
        criterion.eval()
        return [
            first,
            second,
            criterion(x),
            criterion.whitening(x[:1]) if criterion.whitening.track_running_stats else x,
        ]

    x = 1 + torch.randn(rows, options["embedding_dim"], dtype=torch.float64)
    same(call, x.to(dtype), floor=1e3)
    for own, fast in zip(buffers[1], buffers[2], strict=True):
        torch.testing.assert_close(fast, own)


def test_a_covariance_that_is_not_definite(loss):
    """An error leaves the running statistics as they were, as lightly's does."""
    layer = loss.Whitening2d(4)
    with sslfast.patch("lightly"), pytest.raises(torch.linalg.LinAlgError):
        layer(torch.zeros(9, 4))
    assert torch.equal(layer.running_variance, torch.eye(4))


# -------------------------------------------------------------------------------------------------------------- tokens


def test_tokens(utils):
    tokens = torch.randn(4, 9, 6)
    index = torch.rand(4, 9).argsort(1)[:, :5]
    same(lambda x: utils.get_at_index(x, index), tokens)
    same(lambda x, v: utils.set_at_index(x, index, v), tokens, torch.randn(4, 5, 6))
    same(lambda x, t: utils.mask_at_index(x, index, t), tokens, torch.randn(1, 1, 6))
    left_to_package(
        "lightly", lambda x, t: utils.mask_at_index(x, index, t), tokens, torch.randn(4, 9, 6), reason="a mask token"
    )


def test_a_model_of_lightlys_uses_them(loss):
    """``lightly.models.modules`` calls them by ``utils.``, which sslfast.patch reaches."""
    vit = peer("timm.models.vision_transformer")
    masked = peer("lightly.models.modules").MaskedVisionTransformerTIMM

    def call(images):
        torch.manual_seed(1)
        model = masked(vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=2))
        index = torch.arange(17).expand(3, -1)
        return model.to(images.dtype).encode(images, idx_mask=index[:, 3:6], idx_keep=index[:, :9])

    same(call, torch.randn(3, 3, 32, 32))
