"""``sslfast.patch`` itself, on a small package made for the purpose; the real ones are in test_adapter_*.py."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sslfast
from sslfast.adapters import _patch, _serve

LOSSES = """
import torch

class Base(torch.nn.Module):
    def __init__(self, weight: float = 2.0):
        super().__init__()
        self.weight = weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if x.dim() != 1:
            raise IndexError(f"one dimension, not {x.dim()}")
        return self.weight * x.sum()

class Loss(Base):
    pass

def total(x, *, weight: float = 1.0):
    "The total."
    return weight * x.sum()
"""
USERS = "from fakessl.losses import Loss, total\nalso_total = total\n"
# The adapter's answers differ from the package's by one, so that a test sees who answered.
ADAPTER = """
from fakessl import losses
from sslfast.adapters._serve import Package, Unserved, served

def _loss(self, x):
    if x.dim() != 1 or x.numel() == 3:
        return Unserved("three entries")
    return self.weight * x.sum() + 1

def _total(x, *, weight=1.0):
    return Unserved("no entries") if x.numel() == 0 else weight * x.sum() + 1

class Base(losses.Base):
    forward = served(losses.Base.forward, _loss)

class Loss(losses.Loss):
    forward = served(losses.Loss.forward, _loss)

total = served(losses.total, _total)

def contents():
    return Package((Base, Loss), (total,), through={"Wrapped": "Loss"}, unchanged={"Other": "nothing to gain"})
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    """The package ``fakessl`` 1.0, its adapter, and a module that uses it; gone afterwards."""
    (tmp_path / "fakessl").mkdir()
    (tmp_path / "fakessl" / "__init__.py").write_text("from .losses import total\n")
    (tmp_path / "fakessl" / "losses.py").write_text(LOSSES)
    (tmp_path / "fakessl_user.py").write_text(USERS)
    (tmp_path / "fakessl_late.py").write_text(USERS)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "fakessl.py").write_text(ADAPTER)
    (tmp_path / "fakessl-1.0.dist-info").mkdir()
    (tmp_path / "fakessl-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fakessl\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sslfast.adapters, "__path__", [*sslfast.adapters.__path__, str(tmp_path / "adapters")])
    monkeypatch.setitem(_patch.PACKAGES, "fakessl", _patch._Known("fakessl", ("1.0",)))
    monkeypatch.setattr(_serve, "_told", set())
    monkeypatch.setattr(_patch, "_printed", set())
    yield importlib.import_module("fakessl.losses")
    if "fakessl" in _patch._active:
        sslfast.unpatch("fakessl")
    for name in [name for name in sys.modules if "fakessl" in name]:
        del sys.modules[name]


X = torch.tensor([1.0, 2.0])


def test_everything_is_served_and_then_the_package_s_own_again(losses, capsys):
    user = importlib.import_module("fakessl_user")
    early = losses.Loss()
    classes = losses.Base, losses.Loss
    own = losses.total

    done = sslfast.patch("fakessl")
    late = importlib.import_module("fakessl_late")
    assert capsys.readouterr().err == (
        "sslfast.patch: fakessl 1.0\n  fast: Base, Loss, total\n  fast through Loss: Wrapped\n"
        "  unchanged (nothing to gain): Other\n"
    )
    assert done.replaced == ("Base", "Loss", "total") and done.through == {"Wrapped": "Loss"}
    assert done.unchanged == {"Other": "nothing to gain"}
    assert (losses.Base, losses.Loss) == classes  # the classes are the same objects: isinstance, pickles, subclasses
    assert early(X) == losses.Loss()(X) == user.Loss()(X) == late.Loss()(X) == 7 and losses.Base()(X) == 7
    assert losses.total(X) == user.total(X) == user.also_total(X) == late.total(X) == 4
    assert sys.modules["fakessl"].total is losses.total is not own

    sslfast.unpatch("fakessl")
    assert early(X) == losses.Loss()(X) == late.Loss()(X) == losses.Base()(X) == 6
    assert losses.total is user.also_total is late.total is sys.modules["fakessl"].total is own
    assert "forward" not in vars(losses.Loss)  # it was inherited, and is again
    assert capsys.readouterr().err == ""


def test_names_signatures_pickles_and_state_stay(losses):
    before = losses.Loss(weight=3.0), inspect.signature(losses.Loss.forward), inspect.signature(losses.total)
    states = before[0].state_dict()
    pickled = pickle.dumps(before[0])
    with sslfast.patch("fakessl"):
        again = pickle.loads(pickled)
        assert isinstance(again, losses.Loss) and type(again) is type(before[0])
        assert copy.deepcopy(again)(X) == 10 and pickle.loads(pickle.dumps(losses.Loss(3.0)))(X) == 10
        assert losses.Loss().state_dict().keys() == states.keys()
        assert inspect.signature(losses.Loss.forward) == before[1] and inspect.signature(losses.total) == before[2]
        assert losses.total.__doc__ == "The total." and losses.total.__name__ == "total"
        assert pickle.loads(pickle.dumps(losses.total)) is losses.total
        made = pickle.dumps(losses.Loss(3.0))
    assert pickle.loads(made)(X) == 9

    adapter = importlib.import_module("sslfast.adapters.fakessl")
    assert isinstance(adapter.Loss(), losses.Loss) and adapter.Loss()(X) == 7 and adapter.total(X) == 4
    assert pickle.loads(pickle.dumps(adapter.Loss()))(X) == 7


def test_a_subclass_that_calls_super_is_served(losses):
    class Mine(losses.Loss):
        def forward(self, x):
            return 10 * super().forward(x)

    with sslfast.patch("fakessl"):
        assert Mine()(X) == 70
    assert Mine()(X) == 60


def test_what_is_not_served_is_the_package_s_and_said_once(losses):
    with sslfast.patch("fakessl"):
        with pytest.warns(
            UserWarning, match="does not serve this use of fakessl.Base: three entries; the package's own"
        ):
            assert losses.Base()(torch.ones(3)) == 6
        with pytest.warns(UserWarning, match="fakessl.total: no entries"):
            assert losses.total(torch.ones(0)) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert losses.Base()(torch.ones(3)) == 6 and losses.total(torch.ones(0)) == 0
            # Its own error, and nothing else.
            with pytest.raises(IndexError, match="one dimension, not 2"):
                losses.Loss()(torch.ones(2, 2))
            with pytest.raises(TypeError, match="Base.forward.* takes 2 positional arguments but 3 were given"):
                losses.Loss()(X, X)
            with pytest.raises(TypeError, match="total.* missing 1 required positional argument: 'x'"):
                losses.total()
            with pytest.raises(TypeError, match="total.* got an unexpected keyword argument 'scale'"):
                losses.total(X, scale=2)


def test_an_instance_or_a_subclass_with_a_hook_of_its_own(losses):
    class Mine(losses.Loss):
        def weigh(self):
            return 3

    losses.Base.weigh = lambda self: 2
    plain, changed = losses.Loss(), losses.Loss()
    changed.weigh = lambda: 4
    assert _serve.overridden(plain, losses.Base, "weigh", "absent") is None
    assert "Mine has a weigh of its own" in _serve.overridden(Mine(), losses.Base, "absent", "weigh").reason
    assert "an instance with a weigh of its own" in _serve.overridden(changed, losses.Base, "weigh").reason


def test_a_block_undoes_itself_and_only_itself(losses):
    with pytest.raises(KeyError), sslfast.patch("fakessl"):
        raise KeyError
    assert losses.Loss()(X) == 6
    with sslfast.patch("fakessl"):
        with pytest.warns(UserWarning, match="fakessl is patched already; nothing was changed") as caught:
            again = sslfast.patch("fakessl")
        assert caught[0].filename == __file__
        with again:
            pass
        assert losses.Loss()(X) == 7
    assert losses.Loss()(X) == 6
    with sslfast.patch("fakessl"):
        sslfast.unpatch("fakessl")
    assert losses.Loss()(X) == 6


def test_who_replaced_it_later_is_left(losses):
    said = "Loss.forward was replaced again after sslfast.patch"
    with pytest.warns(UserWarning, match=said) as caught, sslfast.patch("fakessl"):
        losses.Loss.forward = lambda self, x: 0
    assert losses.Loss()(X) == 0 and losses.Base()(X) == 6
    sslfast.patch("fakessl")
    losses.Loss.forward = lambda self, x: 1
    with pytest.warns(UserWarning, match=said) as caught_too:
        sslfast.unpatch("fakessl")
    assert losses.Loss()(X) == 1 and caught[0].filename == caught_too[0].filename == __file__


def test_under_the_compiler_it_is_one_graph(losses):
    with sslfast.patch("fakessl"):
        compiled = torch.compile(losses.Loss(), fullgraph=True, backend="eager")
        assert compiled(X) == 7 and compiled(torch.ones(3)) == 6


def test_inside_other_ways_to_differentiate_the_package_computes(losses):
    with sslfast.patch("fakessl"):
        loss = losses.Loss()
        with pytest.warns(UserWarning, match="inside torch.func or forward-mode"):
            assert torch.equal(torch.func.grad(loss)(X), torch.tensor([2.0, 2.0]))
        assert torch.equal(torch.func.vmap(loss)(torch.stack([X, X])), torch.tensor([6.0, 6.0]))  # not 7
        assert torch.func.jvp(loss, (X,), (X,)) == (6, 6)
        with torch.autograd.forward_ad.dual_level():
            found = loss(torch.autograd.forward_ad.make_dual(X, X))
            assert torch.autograd.forward_ad.unpack_dual(found) == (6, 6)
        assert loss(X) == 7


def test_which_tensors_are_served():
    class Mine(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    assert _serve.unserved_matrices(x, torch.nn.Parameter(x)) is None
    for others, reason in {
        (x.as_subclass(Mine),): "a Mine, a tensor of a kind of its own",
        (x[0],): "a tensor of 1 dimensions",
        (x[:0],): "an empty tensor",
        (x.int(),): "dtype torch.int32",
        (x.to_sparse(),): "a sparse tensor",
        (x.to("meta"),): "device meta",
        (x, x.double()): "tensors of several dtypes",
        (x, x[:2]): "tensors of several shapes",
        (x, None): "an argument is no tensor but NoneType",
    }.items():
        assert reason in _serve.unserved_matrices(*others).reason


def test_one_rank_speaks(losses, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with sslfast.patch("fakessl"):
        pass
    assert capsys.readouterr().err == ""


def test_the_list_is_printed_once_and_not_at_all_if_not_wanted(losses, capsys):
    with sslfast.patch("fakessl", verbose=False) as patched:
        assert capsys.readouterr().err == ""
    for _ in range(3):
        with sslfast.patch("fakessl"):
            pass
    assert capsys.readouterr().err == f"{patched}\n"


def test_a_warning_names_the_line_of_the_user(losses):
    """Through ``Module.__call__``, hooks and the package's own frames."""
    code = "def use(loss, x):\n    return loss(x)\n"
    user = {"__name__": "training"}
    exec(compile(code, "training.py", "exec"), user)
    with sslfast.patch("fakessl"), pytest.warns(UserWarning, match="does not serve") as caught:
        user["use"](losses.Base(), torch.ones(3))
        user["use"](losses.total, torch.ones(0))
    assert [(w.filename, w.lineno) for w in caught] == [("training.py", 2)] * 2


def test_one_reason_is_said_once_however_deep_the_package_calls_itself(losses):
    class Outer(losses.Loss):
        def forward(self, x):
            return losses.Base.forward(self, x)

    outer = _serve.served(Outer.forward, lambda self, x: _serve.Unserved("a miner"), "fakessl.Outer")
    with sslfast.patch("fakessl"):
        with pytest.warns(UserWarning) as caught:
            assert outer(Outer(), torch.ones(3)) == 6
        assert len(caught) == 1 and "fakessl.Outer: a miner" in str(caught[0].message)
        with pytest.raises(IndexError):
            outer(Outer(), torch.ones(2, 2))
        with pytest.warns(UserWarning, match="fakessl.Base: three entries"):  # by itself it is said
            losses.Base()(torch.ones(3))


def test_an_unknown_name():
    for name in ("lightning", "", None, 3):
        with pytest.raises(ValueError, match=f"package={name!r} is not known .* allowed: dinov2, dinov3, lightly, m"):
            sslfast.patch(name)
        with pytest.raises(ValueError, match=f"package={name!r} is not patched by sslfast; patched: none"):
            sslfast.unpatch(name)


def test_an_absent_package(losses, monkeypatch):
    monkeypatch.setitem(_patch.PACKAGES, "fakessl", _patch._Known("no-such-distribution", ("1.0",)))
    with pytest.raises(ImportError, match="fakessl is not installed .no distribution 'no-such-distribution' was found"):
        sslfast.patch("fakessl")


def test_a_package_that_does_not_import(losses, tmp_path):
    (tmp_path / "adapters" / "fakessl.py").write_text("import fakessl.missing\n")
    with pytest.raises(ImportError, match="fakessl 1.0 is not importable, .*: No module named 'fakessl.missing'"):
        sslfast.patch("fakessl")
    assert "fakessl" not in _patch._active and losses.Loss()(X) == 6


def test_an_untested_version(losses, monkeypatch):
    monkeypatch.setitem(_patch.PACKAGES, "fakessl", _patch._Known("fakessl", ("0.8", "0.9")))
    with pytest.raises(
        RuntimeError, match="fakessl 1.0 was not tested with sslfast .* which knows 0.8, 0.9; .*allow_unt"
    ):
        sslfast.patch("fakessl")
    assert losses.Loss()(X) == 6
    with sslfast.patch("fakessl", allow_untested=True):
        assert losses.Loss()(X) == 7


def test_the_tested_versions_are_those_of_the_requirements():
    """What CI installs is what is called tested."""
    listed = (Path(__file__).parents[2] / "requirements-bench.txt").read_text()
    pins = {re.sub("[-_.]+", "-", k).lower(): v for k, v in re.findall(r"^([\w.-]+)==([\w.]+)", listed, re.M)}
    for name, known in _patch.PACKAGES.items():
        if known.distribution is not None:
            assert pins[re.sub("[-_.]+", "-", known.distribution).lower()] in known.tested, name


def test_importing_sslfast_imports_none_of_them():
    names = [
        "dinov2",
        "dinov3",
        "lightly",
        "pytorch_metric_learning",
        "open_clip",
        "sentence_transformers",
        "solo",
        "torch._dynamo",
        "triton",
    ]
    code = f"import sslfast, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
