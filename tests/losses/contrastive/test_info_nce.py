"""InfoNCE against the formula written out row by row, in float64 and float32, and wrong input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from helpers import roundings, within_budget
from sslfast.losses.contrastive.info_nce import InfoNCELoss

GRAD_LOSS = 3.0  # not 1: a backward that forgets it fails
M, N, D, K, H = 23, 31, 12, 9, 3


def info_nce(
    q,
    k,
    temperature=0.07,
    *,
    negatives=None,
    hard_negatives=None,
    row_ids=None,
    col_ids=None,
    positives=None,
    **more,
):
    """The module with the names of the formula below; and the function that has these options, with the same bits."""
    given = {"positives": positives, "ids": None if row_ids is None and col_ids is None else (row_ids, col_ids)}
    both = tuple(x for x in (negatives, hard_negatives) if x is not None)
    given["negatives"] = both[0] if len(both) == 1 else both or None
    found = InfoNCELoss(temperature, **more)(q, k, **given)
    names = {name for name in ("label_smoothing", "tau_plus", "symmetric") if more.get(name)}
    given = {name: value for name, value in given.items() if value is not None}
    if more.get("diagnostics") or torch.compiler.is_compiling():
        return found
    if "symmetric" in names:
        rest = {name: value for name, value in more.items() if name != "symmetric"}
        same = sslfast.symmetric_info_nce(q, k, temperature, **given, **rest)
    elif len(names) < 2:
        function = {"label_smoothing": sslfast.smoothed_info_nce, "tau_plus": sslfast.debiased_info_nce}
        same = function.get(next(iter(names), ""), sslfast.info_nce)(q, k, temperature, **given, **more)
    else:
        return found
    assert torch.equal(same, found) or (same.isnan() and found.isnan())
    return found


def plain(q, k, tau, *, symmetric=False, normalize=True, **options) -> Tensor:
    """The documented formula, one row after the other."""
    if symmetric:
        ids = options.pop("row_ids", None), options.pop("col_ids", None)
        there = plain(q, k, tau, normalize=normalize, row_ids=ids[0], col_ids=ids[1], **options)
        return (there + plain(k, q, tau, normalize=normalize, row_ids=ids[1], col_ids=ids[0], **options)) / 2
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    q, k = unit(q), unit(k)
    s = q @ k.T / tau
    columns = [s]
    if options.get("row_ids") is not None:
        columns = [s.masked_fill(options["row_ids"][:, None] == options["col_ids"][None], -torch.inf)]
    if options.get("negatives") is not None:
        columns.append(q @ unit(options["negatives"]).T / tau)
    if options.get("hard_negatives") is not None:
        columns.append(torch.einsum("md,mhd->mh", q, unit(options["hard_negatives"])) / tau)
    logits = torch.cat(columns, dim=1)
    positives = options.get("positives")
    positives = torch.arange(len(q)) if positives is None else positives
    return torch.stack([_row(logits[i], s[i], p.reshape(-1), tau, options) for i, p in enumerate(positives)]).mean()


def _row(logits, s, positives, tau, options) -> Tensor:
    positives = positives[positives >= 0]
    if len(positives) == 0:
        return 0.0 * logits.sum()
    positive, prior, smoothing = s[positives].mean(), options.get("tau_plus", 0.0), options.get("label_smoothing", 0.0)
    loss = logits.logsumexp(0) - positive
    if prior:
        p = int(positives[0])
        negatives = torch.cat([logits[:p], logits[p + 1 :]])
        n = len(negatives)
        estimate = (negatives.exp().sum() - n * prior * positive.exp()) / (1 - prior)
        loss = torch.log1p(torch.maximum(estimate, n * torch.exp(-1 / tau.abs())) / positive.exp())
    return loss + smoothing * (positive - logits.mean()) if smoothing else loss


def inputs(dtype: torch.dtype = torch.float64, square: bool = False) -> dict[str, Tensor]:
    """Rows of norms around 1 and related positives, representable in ``dtype``."""
    q = torch.randn(M, D)
    k = torch.randn(M if square else N, D)
    k[:M] += q
    given = {"q": q, "k": k, "tau": torch.tensor(0.2), "negatives": torch.randn(K, D)}
    given["hard_negatives"] = torch.randn(M, H, D) + 0.5 * q[:, None]
    return {name: t.to(dtype) for name, t in given.items()}


def value_and_gradients(function, given: dict[str, Tensor], names: list[str], options: dict) -> list[Tensor]:
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    named = {name: leaf for name, leaf in leaves.items() if name not in ("q", "k", "tau")}
    loss = function(leaves["q"], leaves["k"], leaves["tau"], **named, **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, GRAD_LOSS))]


IDS = {"row_ids": torch.arange(M) % 7, "col_ids": torch.arange(N) % 11 + 3}
SEVERAL = torch.stack([torch.arange(M), torch.arange(M) % 5 + 20, torch.full((M,), -1)], dim=1)
SEVERAL[4] = -1
SEVERAL[5, 0] = -1
CASES = {
    "plain": ({}, []),
    "not normalised": ({"normalize": False}, []),
    "positives": ({"positives": torch.arange(M).flip(0)}, []),
    "missing positives": ({"positives": torch.arange(M).masked_fill(torch.arange(M) % 3 == 0, -1)}, []),
    "several positives": ({"positives": SEVERAL}, []),
    "shared negatives": ({}, ["negatives"]),
    "hard negatives": ({}, ["hard_negatives"]),
    "ids": (IDS, ["negatives"]),
    "smoothing": ({"label_smoothing": 0.1}, ["negatives", "hard_negatives"]),
    "smoothing, several positives": ({"label_smoothing": 0.2, "positives": SEVERAL}, []),
    "debiased": ({"tau_plus": 0.02}, ["negatives", "hard_negatives"]),
    "debiased and smoothed": ({"tau_plus": 0.02, "label_smoothing": 0.1}, []),
    "symmetric": ({"symmetric": True}, []),
    "symmetric, smoothed, debiased": ({"symmetric": True, "label_smoothing": 0.1, "tau_plus": 0.01}, []),
    "symmetric, ids": ({"symmetric": True, "row_ids": torch.arange(M) // 2, "col_ids": torch.arange(M) // 2 + 1}, []),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case: str, dtype: torch.dtype) -> None:
    options, extra = CASES[case]
    given, names = inputs(dtype, options.get("symmetric", False)), ["q", "k", "tau", *extra]
    ours = value_and_gradients(info_nce, given, names, options)
    same = roundings(value_and_gradients, plain, given, names, options)
    truth = value_and_gradients(plain, {n: t.double() for n, t in given.items()}, names, options)
    for name, kernel, reference, exact in zip(["loss", *names], ours, same, truth, strict=True):
        within_budget(f"{case}: {name}", kernel, reference, exact, dtype, 1.0 if name == "loss" else 0.1)


def test_smoothing_is_that_of_cross_entropy() -> None:
    given = inputs()
    logits = F.normalize(given["q"]) @ F.normalize(given["k"]).T / 0.2
    expected = F.cross_entropy(logits, torch.arange(M), label_smoothing=0.15)
    torch.testing.assert_close(info_nce(given["q"], given["k"], 0.2, label_smoothing=0.15), expected)


@pytest.mark.parametrize("tau", [0.01, 0.05, -0.5])
def test_debiasing_at_any_temperature(tau: float) -> None:
    """Rows where the floor holds and rows where it does not; no overflow where ``e^{1/τ}`` has none left in float32."""
    q = F.normalize(torch.randn(64, 16, dtype=torch.float64))
    k = torch.where(torch.arange(64)[:, None] % 2 == 0, q, torch.randn(64, 16, dtype=torch.float64))
    given = {"q": q, "k": k, "tau": torch.tensor(tau, dtype=torch.float64)}
    single = {name: t.float() for name, t in given.items()}
    exact = {name: t.double() for name, t in single.items()}
    options = {"tau_plus": 0.1}
    ours = value_and_gradients(info_nce, single, ["q", "k", "tau"], options)
    truth = value_and_gradients(plain, exact, ["q", "k", "tau"], options)
    for name, kernel, expected in zip(("loss", "dq", "dk", "dtau"), ours, truth, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(
            kernel.double(), expected, rtol=1e-4, atol=1e-4 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_with_nothing_left_are_not_nan() -> None:
    """Every column of row 0 is excluded: −inf, as documented for the primitive, and zero gradient."""
    given = inputs()
    q, k = given["q"].requires_grad_(), given["k"].requires_grad_()
    row_ids, col_ids = torch.arange(M), torch.zeros(N, dtype=torch.int64)
    positives = torch.arange(M)
    positives[0] = -1
    loss = info_nce(q, k, 0.2, positives=positives, row_ids=row_ids, col_ids=col_ids)
    loss.backward()
    assert loss.isfinite() and q.grad.isfinite().all() and k.grad.isfinite().all()
    assert (q.grad[0] == 0).all() and (q.grad[1:] != 0).any(1).all()


def test_one_row() -> None:
    q, k = (torch.randn(1, 5).requires_grad_() for _ in range(2))
    for options in ({}, {"tau_plus": 0.1}, {"symmetric": True}, {"label_smoothing": 0.1}):
        loss = info_nce(q, k, 0.1, **options)
        grads = torch.autograd.grad(loss, (q, k))
        assert loss.abs() <= 1e-6 and all(g.abs().max() <= 1e-5 for g in grads)


@pytest.mark.parametrize("case", ["plain", "negatives", "ids", "debiased"])
def test_diagnostics(case: str) -> None:
    given = {name: F.normalize(t, dim=-1) if t.dim() else t for name, t in inputs().items()}
    options = {
        "plain": {},
        "negatives": {"negatives": given["negatives"], "hard_negatives": given["hard_negatives"]},
        "ids": IDS,
        "debiased": {"tau_plus": 0.02},
    }[case]
    loss, found = info_nce(given["q"], given["k"], given["tau"], diagnostics=True, **options)
    torch.testing.assert_close(loss, info_nce(given["q"], given["k"], given["tau"], **options))
    s = given["q"] @ given["k"].T
    rows = torch.arange(M)
    positive = s[rows, rows]
    if case == "ids":
        s[IDS["row_ids"][:, None] == IDS["col_ids"][None]] = -torch.inf
    in_sums = [s]
    if case == "negatives":
        in_sums += [given["q"] @ given["negatives"].T, torch.einsum("md,mhd->mh", given["q"], given["hard_negatives"])]
    s = torch.cat(in_sums, dim=1)
    pairs = s[s.isfinite()]
    negative = s.clone()
    negative[rows, rows] = -torch.inf
    hardest = negative.amax(1)
    torch.testing.assert_close(found.accuracy, (positive > hardest).double().mean())
    torch.testing.assert_close(found.positive_similarity, positive.mean())
    torch.testing.assert_close(found.hardest_negative_similarity, hardest.mean())
    torch.testing.assert_close(found.alignment, (given["q"] - given["k"][:M]).square().sum(1).mean())
    t = 1 / given["tau"] / 2
    torch.testing.assert_close(found.uniformity_at_temperature, (-t * (2 - 2 * pairs)).exp().mean().log())


def test_twice_differentiable() -> None:
    q, k = (torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    hard = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_()
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    function = lambda q, k, hard, tau: info_nce(q, k, tau, hard_negatives=hard, tau_plus=0.05)  # noqa: E731
    assert torch.autograd.gradcheck(function, (q, k, hard, tau))
    assert torch.autograd.gradgradcheck(function, (q, k, hard, tau))


@pytest.mark.parametrize("options", [{}, {"tau_plus": 0.1, "label_smoothing": 0.1}, {"symmetric": True}], ids=str)
def test_compile_without_graph_breaks(options: dict) -> None:
    given = inputs(torch.float32, square=True)
    step = torch.compile(
        lambda q, k, tau, **rest: info_nce(q, k, tau, **rest, **options), fullgraph=True, backend="aot_eager"
    )
    names = ["q", "k", "tau"] if options.get("symmetric") else ["q", "k", "tau", "negatives", "hard_negatives"]
    ours = value_and_gradients(step, given, names, {})
    for a, b in zip(ours, value_and_gradients(info_nce, given, names, options), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_never_lowers_precision() -> None:
    given = inputs(torch.float32)
    options = {"negatives": given["negatives"], "hard_negatives": given["hard_negatives"], "label_smoothing": 0.1}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(given["q"], given["k"], 0.2, **options)
        mixed = info_nce(given["q"].bfloat16(), given["k"], 0.2)
    assert torch.equal(inside, info_nce(given["q"], given["k"], 0.2, **options))
    assert torch.equal(mixed, info_nce(given["q"].bfloat16().float(), given["k"], 0.2))


def test_module_is_the_function() -> None:
    given = inputs(torch.float32)
    learns = torch.nn.Parameter(torch.tensor(0.1))
    module = InfoNCELoss(learns, label_smoothing=0.1)
    loss = module(given["q"], given["k"], negatives=given["negatives"])
    loss.backward()
    expected = info_nce(given["q"], given["k"], 0.1, negatives=given["negatives"], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert list(module.state_dict()) == ["temperature"] and learns.grad != 0
    loss, found = InfoNCELoss(diagnostics=True)(given["q"], given["k"])
    assert loss.isfinite() and 0 <= found.accuracy <= 1


Q, KEYS = torch.ones(4, 3), torch.ones(6, 3)


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (Q, torch.ones(6, 2), {}, ValueError, r"q and k .*same width.*3 and 2"),
        (KEYS, Q, {}, ValueError, r"q has 6 rows and k only 4"),
        (Q, KEYS.double(), {}, TypeError, r"same dtype"),
        (Q, KEYS, {"temperature": 0.0}, ValueError, r"temperature .*not zero"),
        (Q, KEYS, {"positives": torch.zeros(3, dtype=torch.int64)}, ValueError, r"positives .*\(4,\).*\(3,\)"),
        (Q, KEYS, {"positives": torch.zeros(4)}, TypeError, r"positives must hold integers"),
        (Q, KEYS, {"positives": torch.full((4, 2), 6)}, ValueError, r"positives must be rows of k, 0 to 5.*got 6 to 6"),
        (Q, KEYS, {"positives": [0, 1, 2, 3]}, TypeError, r"positives must be a torch.Tensor"),
        (Q, KEYS, {"negatives": torch.ones(5, 2)}, ValueError, r"negatives and q .*same width.*2 and 3"),
        (Q, KEYS, {"hard_negatives": torch.ones(5, 2, 3)}, ValueError, r"negatives .*\(M, H, D\).*M = 4.*\(5, 2, 3\)"),
        (Q, KEYS, {"negatives": Q, "hard_negatives": Q}, ValueError, r"one of each; got \(4, 3\) and \(4, 3\)"),
        (Q, KEYS, {"hard_negatives": torch.ones(4, 0, 3)}, ValueError, r"H at least 1"),
        (Q, KEYS, {"row_ids": torch.arange(4)}, TypeError, r"col_ids must be a torch.Tensor"),
        (Q, KEYS, {"label_smoothing": 1.0}, ValueError, r"label_smoothing .*less than 1, got 1\.0"),
        (Q, KEYS, {"tau_plus": -0.1}, ValueError, r"tau_plus .*at least 0"),
        (
            Q,
            KEYS,
            {"tau_plus": 0.1, "row_ids": torch.arange(4), "col_ids": torch.arange(6)},
            ValueError,
            "cannot be combined with ids",
        ),
        (Q, KEYS, {"tau_plus": 0.1, "positives": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, "one positive"),
        (Q, KEYS, {"diagnostics": True, "positives": torch.full((4,), -1)}, ValueError, "one positive in every row"),
        (Q, KEYS, {"symmetric": True}, ValueError, r"as many rows in q as in k, got 4 and 6"),
        (Q, Q, {"symmetric": True, "negatives": KEYS}, ValueError, r"symmetric=True cannot be combined"),
    ],
)
def test_wrong_input(q, k, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce(q, k, **options)


def test_module_rejects_a_zero_temperature() -> None:
    with pytest.raises(ValueError, match="temperature must be finite and not zero"):
        InfoNCELoss(math.nan)


def test_a_nan_comes_out_of_the_debiased_loss() -> None:
    q, negatives = torch.randn(4, 8), torch.randn(3, 8)
    negatives[1] = float("nan")
    assert info_nce(q, q + 0.1, negatives=negatives, tau_plus=0.1).isnan()


def test_diagnostics_do_not_hold_on_to_a_queue() -> None:
    q, queue = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    loss, _ = info_nce(q, q.detach() + 0.1, negatives=queue, normalize=False, diagnostics=True)
    queue.add_(1.0)
    loss.backward()
    assert q.grad is not None and q.grad.isfinite().all()


def test_an_unknown_strategy_is_refused_at_once() -> None:
    for make in (sslfast.InfoNCELoss, sslfast.NTXentLoss, sslfast.ClipLoss, sslfast.SupConLoss):
        with pytest.raises(ValueError, match="strategy must be one of 'gather', 'ring', got 'rings'"):
            make(strategy="rings")
    with pytest.raises(ValueError, match="got 'rings'"):
        sslfast.nt_xent(torch.randn(4, 3), torch.randn(4, 3), strategy="rings")
