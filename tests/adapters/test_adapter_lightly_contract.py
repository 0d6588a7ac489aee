"""lightly with sslfast inside: copies, pickles, subclasses, half precision, compilation and errors stay lightly's."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import sslfast
from adapter_common import left_to_package, peer, same_as_package
from helpers import two_views
from lightly_common import all_losses, pair
from sslfast.adapters import _serve

HALF = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's DCLWLoss


SERVED = {
    *(
        "NTXentLoss",
        "DCLLoss",
        "DCLWLoss",
        "HypersphereLoss",
        "BarlowTwinsLoss",
        "VICRegLoss",
        "VICRegLLoss",
        "TiCoLoss",
    ),
    *("MMCRLoss", "FroSSLLoss", "WMSELoss", "Whitening2d", "SIGReg", "NegativeCosineSimilarity"),
    *("SwaVLoss", "DINOLoss", "IBOTPatchLoss", "KoLeoLoss"),
    *("MACLLoss", "DetConSLoss", "DetConBLoss", "CO2Regularizer"),
    *("EMPSSLLoss", "PatchKernelAlignmentLoss", "NNMemoryBankModule"),
    *("IBOTPlusPlusPatchLoss", "CAPILoss"),
    *("MSNLoss", "PMSNLoss", "PMSNCustomLoss"),
}


@pytest.fixture(scope="module")
def loss():
    return peer("lightly.loss")


def test_everything_is_served_or_left_with_a_reason(loss):
    regularizers = importlib.import_module("lightly.loss.regularizer")
    names = {name for m in (loss, regularizers) for name, value in vars(m).items() if inspect.isclass(value)}
    with sslfast.patch("lightly") as patched:
        listed = [*patched.replaced, *patched.through, *patched.unchanged]
        assert names - {"VISRegLossComponents"} <= set(listed)  # that one is what VISReg returns
        assert len(set(listed)) == len(listed)
        # By name: where a class is not replaced, comparing it with itself finds nothing.
        assert {name for name in patched.replaced if name[0].isupper()} == SERVED


def test_the_adapters_classes(loss):
    """Importable without a patch: lightly's subclasses, served."""
    adapter = importlib.import_module("sslfast.adapters.lightly")
    assert issubclass(adapter.DCLWLoss, (adapter.DCLLoss, loss.DCLLoss)) and isinstance(adapter.DCLWLoss(), nn.Module)
    a, b = pair((9, 4))
    for name in ("NTXentLoss", "DCLWLoss", "BarlowTwinsLoss", "TiCoLoss"):
        mine, theirs = getattr(adapter, name), getattr(loss, name)
        assert issubclass(mine, theirs) and inspect.signature(mine) == inspect.signature(theirs)
        torch.testing.assert_close(mine()(a, b), theirs()(a, b))
        assert pickle.loads(pickle.dumps(mine())).forward.__func__.__sslfast__


def test_copies_pickles_and_states():
    for name, (criterion, inputs) in all_losses().items():
        torch.manual_seed(4)
        unpatched = copy.deepcopy(criterion)
        own = unpatched(*inputs)
        with sslfast.patch("lightly"):
            torch.manual_seed(4)
            copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
            expected = criterion(*inputs)
            allowed = {"rtol": 1e-4, "atol": 0} if name == "CAPILoss" else {}  # lightly's epsilon
            torch.testing.assert_close(expected, own, **allowed, msg=lambda m, n=name: f"{n}: {m}")
            for other in copies:
                torch.manual_seed(4)
                assert type(other) is type(criterion)
                assert torch.equal(other(*inputs), expected), name
                other.load_state_dict(criterion.state_dict())
        torch.testing.assert_close(dict(criterion.state_dict()), dict(unpatched.state_dict()))
        assert vars(criterion).keys() == vars(unpatched).keys()
        kept = pickle.loads(pickle.dumps(copies[0]))  # out of the patch, and lightly's own again
        assert type(kept) is type(criterion)
        kept(*inputs)


def test_a_subclass_of_the_users(loss):
    class Twice(loss.BarlowTwinsLoss):
        def forward(self, z_a, z_b):
            return 2 * super().forward(z_a, z_b)

    class Other(loss.DCLLoss):
        def _loss(self, *rows):
            return super()._loss(*rows) + 1

    a, b = pair((9, 4))
    same_as_package("lightly", lambda a, b: Twice()(a, b), a, b, floor=10)
    left_to_package("lightly", lambda a, b: Other()(a, b), a, b, reason="Other has a _loss of its own")
    smooth = loss.NTXentLoss()
    smooth.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)
    left_to_package("lightly", smooth, a, b, reason="cross_entropy is not the plain one")


def test_hooks_are_called(loss):
    seen = []
    criterion = loss.WMSELoss(2, w_size=4, track_running_stats=False)
    criterion.whitening.register_forward_hook(lambda *call: seen.append(call))
    with sslfast.patch("lightly"), pytest.warns(UserWarning, match="hooks on whitening"):
        criterion(torch.randn(16, 2))
    assert len(seen) == 4  # of two views, two sub-batches each


EVERY = torch.nn.modules.module
KINDS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["the module", "every module"])
def test_hooks_of_each_kind(loss, of, kind):
    criterion, seen = loss.NTXentLoss(), []
    register = getattr(criterion.cross_entropy, f"register_{kind}")
    if of == "every module":
        register = getattr(EVERY, f"register_module_{kind}")
    handle = register(lambda module, *call: seen.append(type(module)))
    _serve._told.clear()
    try:
        with sslfast.patch("lightly"), pytest.warns(UserWarning, match="cross_entropy is not the plain one"):
            criterion(*(x.requires_grad_() for x in pair((9, 4)))).backward()
    finally:
        handle.remove()
    assert nn.CrossEntropyLoss in seen


def in_half(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x  # a mask


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_comes_back(dtype):
    """In the inputs' dtype, where lightly's does; sums are float32."""
    refused = []
    for name, (criterion, inputs) in all_losses().items():
        criterion, inputs = (
            criterion.to(dtype),
            [[t.to(dtype) for t in x] if isinstance(x, list) else in_half(x, dtype) for x in inputs],
        )
        try:
            own = copy.deepcopy(criterion)(*inputs)
        except RuntimeError:  # no pdist, singular values, Cholesky factors of halves on a CPU
            refused.append(name)
            continue
        with sslfast.patch("lightly"), warnings.catch_warnings():
            warnings.filterwarnings("error", message="sslfast does not serve")
            fast = criterion(*inputs)
        assert fast.dtype == own.dtype, name
        assert own.isinf() or (fast.float() - own.float()).abs() <= 0.05 * own.float().abs() + 0.02, (name, fast, own)
    assert set(refused) == {"HypersphereLoss", "MMCRLoss", "Whitening2d", "WMSELoss"}


def test_autocast():
    """A float32 loss and gradients in the inputs' dtypes, near lightly's."""
    for name in (
        "NTXentLoss",
        "with a bank",
        "DCLWLoss",
        "HypersphereLoss",
        "BarlowTwinsLoss",
        "VICRegLoss",
        "TiCoLoss",
    ):
        criterion, (a, b) = all_losses()[name]
        own, a, b = copy.deepcopy(criterion), a.bfloat16().requires_grad_(), b
        with sslfast.patch("lightly"), torch.autocast("cpu"):
            fast = criterion(a, b)
        assert fast.dtype == torch.float32 and torch.autograd.grad(fast, a)[0].dtype == torch.bfloat16
        torch.testing.assert_close(fast, own(a.float(), b), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_state_of_tico_after_autocast(loss, dtype):
    """``C`` in the inputs' dtype, as lightly's, so that the next call can be outside of autocast."""
    states = []
    a, b = (x.to(dtype) for x in pair((24, 6)))
    for patched in (contextlib.nullcontext, lambda: sslfast.patch("lightly")):
        criterion = loss.TiCoLoss()
        with patched(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="sslfast does not serve")
            with torch.autocast("cpu", dtype=dtype):
                criterion(a, b)
            inside = criterion.C
            outside = criterion(a, b)
        states.append((inside, outside))
    torch.testing.assert_close(states[1], states[0], rtol=2e-2, atol=2e-2)  # compares dtypes too


def test_compiled():
    """fullgraph, as lightly's own classes, and also the decoupled ones, which lightly's are not."""
    for name, (criterion, inputs) in all_losses().items():
        if name in ("DirectCLRLoss", "DCLLoss"):
            continue  # their parts are compiled here
        if name == "WMSELoss":
            continue  # torch.compile refuses the tensor that lightly starts its sum from
        if name == "CO2 with a bank":
            continue  # whose pointer lightly reads, as it does for NTXentLoss where the anchors learn
        with sslfast.patch("lightly"):
            torch._dynamo.reset()
            expected = copy.deepcopy(criterion)(*inputs)
            torch.testing.assert_close(torch.compile(criterion, backend="eager", fullgraph=True)(*inputs), expected)


def test_second_derivatives(loss):
    with sslfast.patch("lightly"):
        a, b = (t.requires_grad_() for t in two_views((5, 3), torch.float64))
        for criterion in (loss.BarlowTwinsLoss(), loss.NTXentLoss(), loss.VICRegLoss(), loss.DCLLoss()):
            assert torch.autograd.gradgradcheck(criterion, (a, b))


def test_errors_are_lightlys(loss):
    with sslfast.patch("lightly"):
        with pytest.raises(ValueError, match=r"Illegal temperature: abs\(0\) < 1e-8"):
            loss.NTXentLoss(0)
        with pytest.raises(AssertionError, match="batch size > 1 but found 1 and 1"):
            loss.VICRegLoss()(*pair((1, 4)))
        with pytest.raises(AssertionError, match="must have same shape"):
            loss.TiCoLoss()(torch.randn(3, 4), torch.randn(4, 4))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            loss.BarlowTwinsLoss()(*pair((1, 4)))
        with pytest.raises(ValueError, match="at least two views but found 1"):
            loss.FroSSLLoss()([torch.randn(3, 4)])
        with pytest.raises(RuntimeError, match="divisible by num_samples"):
            loss.WMSELoss(4, w_size=8)(torch.randn(17, 4))
        with pytest.raises(ValueError, match="must have same length but found 1 and 0"):
            loss.VICRegLLoss()([pair((3, 4))], [])
        with pytest.raises(ValueError, match="too many values to unpack"):
            loss.NTXentLoss()(*pair((3, 4, 5)))


def test_gathering_without_a_process_group(loss):
    """As lightly's: local."""
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss", "BarlowTwinsLoss", "VICRegLoss", "TiCoLoss"):
        criterion = getattr(loss, name)(gather_distributed=True)
        same_as_package("lightly", lambda a, b, c=criterion: copy.deepcopy(c)(a, b), *pair((9, 4)), floor=100)
