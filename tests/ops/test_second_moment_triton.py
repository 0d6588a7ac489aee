"""The Triton kernels of second_moment: values and gradients, through the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sslfast
from helpers import reference_moment, roundings, same_nonfinite, within_budget
from sslfast.ops.second_moment import second_moment
from sslfast.ops.types import SCALES, dual_is_cheaper
from triton_common import DEVICE, MARKS

op = sslfast.ops.second_moment
pytestmark = MARKS

FORMS = ("primal", "dual")
PRODUCTS = ("library", "tiles")
# A batch alone, a pair, a pair across.
MODES = {"one": (1, False), "pair": (2, False), "cross": (2, True)}
# (rows, features): one row; one column; tiny; a Gram matrix and a moment matrix whose sums several programs share;
# prime; aligned to the tiles; more than one tile in both.
SHAPES = [(1, 8), (33, 1), (3, 5), (20, 300), (300, 9), (67, 97), (64, 64), (130, 75)]
OUTPUTS = ("off_diagonal", "diagonal", "distance", "da", "db")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by them. Those of a GPU are in test_moment_loss_triton.py."""
    if DEVICE.type == "cpu":
        from sslfast.kernels import second_moment_off_diagonal

        monkeypatch.setattr(second_moment_off_diagonal, "ROWS", 32)


def multiply_by(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's products or tiles', whichever are cheaper."""
    from sslfast.kernels import second_moment as kernel

    monkeypatch.setattr(kernel, "by_library", lambda *_: products == "library")


def make(n: int, d: int, mode: str, dtype: torch.dtype = torch.float32, *, mean: float = 1.0) -> list[Tensor]:
    """Batches whose columns have different means and sizes, and are correlated within a batch and across."""
    random = torch.Generator().manual_seed(n * d)
    common = torch.randn(n, 1, generator=random)
    a = torch.randn(n, d, generator=random) + 0.5 * common
    b = 0.5 * a + torch.randn(n, d, generator=random)
    size, shift = torch.linspace(0.5, 2.0, d), mean * torch.randn(d, generator=random)
    return [(x * size + shift).to(DEVICE, dtype) for x in (a, b)][: MODES[mode][0]]


def run(
    function: Any, batches: list[Tensor], kind: torch.dtype, mode: str, *, unit: float = 1.0, **options: Any
) -> list[Tensor]:
    """Outputs and the gradients of their sum, weighted by some ``unit``, computed in ``kind``."""
    leaves = [x.to(kind, copy=True).requires_grad_() for x in batches]
    outputs = function(*leaves, cross=MODES[mode][1], **options)
    random, (n, d) = torch.Generator().manual_seed(1), batches[0].shape
    weights = [torch.randn(t.shape, generator=random).to(DEVICE) for t in outputs]
    weights[0] = weights[0] / (n * d) ** 0.5  # so that all terms of the gradient are of one size
    total = sum((unit * w * t).sum() for w, t in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


def check(batches: list[Tensor], mode: str, form: str, floor: float = 1e-6, **options: Any) -> list[Tensor]:
    """Everything the kernels can give against the reference in float64, by the error budget."""
    dtype = batches[0].dtype
    with sslfast.use_backend("triton"):
        kernel = run(second_moment, batches, dtype, mode, form=form, **options)
    # As the kernels do, the reference sums 16-bit inputs in float32.
    plain = roundings(run, reference_moment, batches, torch.float32, mode, **options)
    truth = run(reference_moment, batches, torch.float64, mode, **options)
    # Where M can be diagonal, ‖M‖² − Σ M_ii² and its gradient may leave nothing; there form="auto" is primal.
    floors: dict[str, float] = {}
    if form == "dual" and not dual_is_cheaper(*batches[0].shape):
        gradient = truth[1].abs().max().item() / batches[0].numel() ** 0.5
        floors = {"off_diagonal": truth[1].square().sum().item(), "da": gradient, "db": gradient}
    for what, *values in zip(OUTPUTS, kernel, plain, truth, strict=False):
        assert values[0].dtype == (dtype if what in ("da", "db") else torch.float32)
        within_budget(what, *values, dtype, floor=max(floor, floors.get(what, 0.0)))
    return kernel


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], form: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by(products, monkeypatch)
    if shape[0] == 1:
        check(make(*shape, "cross"), "cross", form, center=False, floor=1.0)
    else:
        # What the projections of the scaling leave of a gradient can be much smaller than its terms.
        check(make(*shape, "cross"), "cross", form, scale="variance", floor=1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("center", "scale"), [(False, "none"), (True, "none"), (False, "variance"), (True, "norm")])
def test_options(center: bool, scale: str, mode: str, form: str) -> None:
    check(make(33, 37, mode), mode, form, center=center, scale=scale, floor=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "products"),
    [(torch.bfloat16, "library"), (torch.float16, "library"), (torch.float16, "tiles")],
    ids=str,
)
def test_16_bit(dtype: torch.dtype, products: str, mode: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_by(products, monkeypatch)
    check(make(75, 84, mode, dtype), mode, form, scale="variance")


@pytest.mark.parametrize("form", FORMS)
def test_float16_moments_beyond_its_range(form: str) -> None:
    """Sums of squares of some 10^6, and gradients through them."""
    batches = [30 * x for x in make(130, 90, "pair", torch.float16)]
    check(batches, "pair", form, center=False, unit=1e-5)


def test_a_diagonal_that_dominates() -> None:
    """Columns that are nearly orthogonal: rounding X̂ to 16 bits must leave nothing of M_ii² in ‖M‖² − Σ M_ii²."""
    x = torch.linalg.qr(make(80, 40, "one")[0])[0].to(torch.float16)
    with sslfast.use_backend("triton"):
        primal, dual = (second_moment(x, scale="variance", form=form) for form in FORMS)
    slack = 1e-6 * primal.diagonal.square().sum().item()
    torch.testing.assert_close(dual.off_diagonal, primal.off_diagonal, rtol=0, atol=slack)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("programs", [4, 512])
def test_rows_that_several_programs_share(programs: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with very many rows: two launches for the columns, of few programs with many tiles each or of many programs
    with one."""
    from sslfast.kernels import second_moment_columns as kernel

    monkeypatch.setattr(kernel, "SPLIT_ROWS", 0)
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    monkeypatch.setattr(kernel, "CHUNKS", 2)
    monkeypatch.setattr(kernel, "tile_of", lambda columns: (16, 16))
    check(make(70, 20, mode, mean=10.0), mode, "primal", scale="variance", floor=1e-2)


@pytest.mark.parametrize("scale", SCALES)
def test_means_far_from_zero(scale: str) -> None:
    check(make(300, 20, "cross", mean=1e3), "cross", "primal", scale=scale)


@pytest.mark.parametrize("center", [False, True])
def test_columns_whose_norm_is_below_eps(center: bool) -> None:
    """They are divided by a constant, so nothing is projected out of their gradient."""
    batches = make(40, 6, "cross", mean=0.0)
    for x in batches:
        x[:, 1] *= 1e-5
        x[:, 4] = 0.0
    check(batches, "cross", "primal", center=center, scale="norm", eps=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_large_tiles(form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half of the tables, which takes results that are larger than a test can be."""
    from sslfast.kernels import _configs

    multiply_by("tiles", monkeypatch)
    monkeypatch.setattr(_configs, "LARGE", 0)
    check(make(40, 70, mode), mode, form, scale="variance", floor=1e-2)


@pytest.mark.parametrize(
    ("mode", "dtype"), [*((mode, torch.float32) for mode in MODES), ("pair", torch.float16)], ids=str
)
@pytest.mark.parametrize("products", PRODUCTS)
def test_moments_that_are_not_kept(
    products: str, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M by bands of 128 columns, here three, that the backward makes again."""
    from sslfast.kernels import second_moment as kernel

    monkeypatch.setattr(op, "KEPT", 0)
    monkeypatch.setattr(kernel, "BAND", 1)
    multiply_by(products, monkeypatch)
    check(make(20, 262, mode, dtype), mode, "primal", scale="norm", floor=1e-2)


@pytest.mark.filterwarnings("ignore:.*NaN.*:RuntimeWarning", "ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMS)
def test_nonfinite_entries(form: str, bad: float) -> None:
    for mode, center, columns in (("pair", True, 9), ("cross", False, 9), ("cross", True, 1)):
        batches = make(20, columns, mode)
        batches[-1][7, columns // 3] = bad
        options = {"center": center, "scale": "norm" if center else "none"}
        with sslfast.use_backend("triton"):
            kernel = run(second_moment, batches, torch.float32, mode, form=form, **options)
        plain = run(reference_moment, batches, torch.float32, mode, **options)
        for what, *values in zip(OUTPUTS, kernel, plain, strict=True):
            if form == "dual":  # ∞ − ∞ where M has ∞
                values = [t.where(t.isfinite(), torch.nan) for t in values]
            same_nonfinite(what, *values)
        assert kernel[0][-1].isnan()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["pair", "cross"])
def test_every_subset_of_gradients(mode: str, form: str) -> None:
    batches = make(21, 18, mode)

    def grads(backend: str, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_(w) for x, w in zip(batches, wanted, strict=True)]
        with sslfast.use_backend(backend):
            off, diagonal, _ = second_moment(*leaves, cross=MODES[mode][1], scale="variance", form=form)
        (off.sum() + diagonal.sum()).backward()  # stride-0 gradients, and none of the distance
        return [x.grad for x in leaves]

    full = grads("reference", (True, True))
    for wanted in ((True, True), (True, False), (False, True)):
        for w, g, expected in zip(wanted, grads("triton", wanted), full, strict=True):
            assert (g is not None) == w
            if g is not None:
                torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_one_output_alone(form: str) -> None:
    batches = make(30, 20, "pair")
    for index in range(3):

        def only(*args: Tensor, index: int = index, **kwargs: Any) -> list[Tensor]:
            return [second_moment(*args, **kwargs)[index]]

        def only_plain(*args: Tensor, index: int = index, **kwargs: Any) -> list[Tensor]:
            return [reference_moment(*args, **kwargs)[index]]

        with sslfast.use_backend("triton"):
            kernel = run(only, batches, torch.float32, "pair", form=form)
        plain = run(only_plain, batches, torch.float32, "pair")
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["columns", "rows", "neither", "different"])
def test_strided_inputs(layout: str) -> None:
    """Contiguous columns (a transposed batch) and rows that are apart, as they lie in memory; copies of others."""
    a, b = make(33, 10, "cross")
    apart = torch.stack([a, b], 1)  # [N, 2, D]: rows that are 2·D apart
    a2, b2 = {
        "columns": (a.T.contiguous().T, b.T.contiguous().T),
        "rows": (apart[:, 0], apart[:, 1]),
        "neither": (torch.stack([a, a], 2)[:, :, 0], torch.stack([b, b], 2)[:, :, 1]),
        "different": (a.T.contiguous().T, b),
    }[layout]
    results = []
    for views in ((a, b), (a2, b2)):
        views = [x.detach().requires_grad_() for x in views]
        with sslfast.use_backend("triton"):
            sums = second_moment(*views, cross=True, scale="variance")
        results.append([*sums, *torch.autograd.grad(sums.off_diagonal.sum() + sums.diagonal.sum(), views)])
    torch.testing.assert_close(*results)


def test_columns_whose_norm_is_eps() -> None:
    """As of clamp_min, the norm has a gradient there."""
    leaf = torch.eye(5, device=DEVICE)[:, :3].repeat(1, 2).requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        with sslfast.use_backend(backend):
            off = second_moment(leaf, center=False, scale="norm", eps=1.0, form="primal").off_diagonal
        grads += torch.autograd.grad(off.sum(), leaf)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["pair", "cross"])
def test_float16_moments_of_every_size(mode: str, form: str) -> None:
    """The operand of the backward is brought into float16's range by a power of two."""
    for size in (1e-3, 1e3):
        batches = [(size * x).to(torch.float16) for x in make(66, 70, mode)]
        unit = 0.1 / (66 * size**3)  # so that gradients are about 1
        gradients = []
        for kind, backend in ((torch.float16, "triton"), (torch.float32, "reference"), (torch.float64, "reference")):
            leaves = [x.to(kind, copy=True).requires_grad_() for x in batches]
            with sslfast.use_backend(backend):
                off = second_moment(*leaves, cross=MODES[mode][1], center=False, form=form).off_diagonal
            gradients.append(torch.autograd.grad(unit * off.sum(), leaves))
        for what, *values in zip(("da", "db"), *gradients, strict=True):
            assert 0.1 < values[-1].abs().max() < 1e4
            within_budget(what, *values, torch.float16, floor=0.0)


# ------------------------------------------------------------------------------------------- which products are taken


def plan(shape: tuple[int, int], dtype: torch.dtype, architecture: int, whole: bool, patch: pytest.MonkeyPatch) -> bool:
    """Whether the library multiplies in a step of a pair."""
    from sslfast.kernels import _second_moment_plan
    from sslfast.kernels.second_moment_columns import Options

    patch.setattr(_second_moment_plan, "architecture", lambda _: architecture)
    options = Options(False, True, 0, 1e-5, dual_is_cheaper(*shape), 0, 0.0, (0.0, 0.0, 0.0))
    return _second_moment_plan.by_library(torch.empty(shape, dtype=dtype, device="meta"), options, 2, whole)


@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
def test_small_batches_are_the_librarys(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer and cheaper launches."""
    for shape in ((32, 128), (256, 512), (256, 2048)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert plan(shape, dtype, architecture, True, monkeypatch)


@pytest.mark.parametrize("whole", [True, False])
def test_products_by_the_cheaper(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact float32 products are three of TF32 in tiles, of half of a symmetric M; the library's are single ones."""
    shape = (16384, 2048) if whole else (16384, 8192)
    assert not plan(shape, torch.float32, 80, whole, monkeypatch)
    for architecture, dtype in ((86, torch.float32), (80, torch.bfloat16), (90, torch.float16), (90, torch.bfloat16)):
        assert plan(shape, dtype, architecture, whole, monkeypatch)


def test_deterministic_algorithms_on_a_gpu_are_tiles() -> None:
    """PyTorch refuses the library's products under that setting, but for a variable of the environment."""
    from sslfast.kernels import _second_moment_plan
    from sslfast.kernels.second_moment_columns import Options

    class OnGpu:
        is_cuda = True

    options = Options(True, True, 1, 1e-5, True, 0, 0.0, (0.0, 0.0, 0.0))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert not _second_moment_plan.by_library(OnGpu(), options, 2, True)
    finally:
        torch.use_deterministic_algorithms(before)


def test_products_of_16_bits_on_a_gpu_are_float32() -> None:
    """As PyTorch's shape functions have it: into new memory, and into a matrix whose rows are apart."""
    from sslfast.kernels.second_moment import multiply
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            hat = torch.empty((2, 5, 8), dtype=dtype, device="cuda")
            out = torch.empty_strided((2, 5, 5), (40, 8, 1), device="cuda")
            for found in (multiply(hat, hat.mT), multiply(hat, hat.mT, out=out)):
                assert found.shape == (2, 5, 5) and found.dtype == torch.float32
