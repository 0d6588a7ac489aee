"""What the contrastive losses take: any number, any labels; and the rows that they expect to be normalised."""

from __future__ import annotations

import fractions
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.losses import _inputs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_inputs, "_looks", {})
    yield


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 12, 5, dtype=torch.float64)
    return F.normalize(a).to(dtype), F.normalize(b).to(dtype)


# ---------------------------------------------------------------------------------------------------------- any number

NUMBER = 0.25  # the same in every type
TAKES_A_NUMBER: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda a, b, t: sslfast.nt_xent(a, b, t),
    "NTXentLoss": lambda a, b, t: sslfast.NTXentLoss(t)(a, b),
    "info_nce": lambda a, b, t: sslfast.info_nce(a, b, t),
    "moco": lambda a, b, t: sslfast.moco(a, b, b, t),
    "moco_v3": lambda a, b, t: sslfast.moco_v3(a, b, t),
    "dcl": lambda a, b, t: sslfast.dcl(a, b, t),
    "sup_con": lambda a, b, t: sslfast.sup_con(torch.stack([a, b], 1), temperature=t, base_temperature=t),
    "clip": lambda a, b, t: sslfast.clip(a, b, t),
    "sig_lip": lambda a, b, t: sslfast.sig_lip(a, b, t, t),
    "multiple_negatives_ranking": lambda a, b, t: sslfast.multiple_negatives_ranking(a, b, scale=t),
    "uniformity": lambda a, b, t: sslfast.uniformity(a, t),
    "alignment": lambda a, b, t: sslfast.alignment(a, b, t),
    "similarity_lse": lambda a, b, t: sslfast.similarity_lse(a, b, t).sum(),
    "barlow_twins": lambda a, b, t: sslfast.barlow_twins(a, b, eps=t),
    "vicreg": lambda a, b, t: sslfast.vicreg(a, b, eps=t),
    "mmcr": lambda a, b, t: sslfast.mmcr(a[:, None], b[:, None], t),
    "spectral_contrastive": lambda a, b, t: sslfast.spectral_contrastive(a, b, t),
    "second_moment": lambda a, b, t: sslfast.second_moment(a, scale="variance", eps=t).off_diagonal.sum(),
}


@pytest.mark.parametrize("name", TAKES_A_NUMBER)
def test_numbers_of_numpy(name: str) -> None:
    loss, inputs = TAKES_A_NUMBER[name], views()
    true = loss(*inputs, NUMBER)
    for number in (np.float32(NUMBER), np.float64(NUMBER), np.float16(NUMBER)):
        found = loss(*inputs, number)
        assert found.dtype == true.dtype and torch.equal(found, true), type(number)
    whole = loss(*inputs, np.int64(1))
    assert torch.equal(whole, loss(*inputs, 1))


def test_a_number_is_not_rounded_to_its_own_type() -> None:
    """1/τ of a float32 temperature in float64."""
    a, b = views()
    tau = np.float32(0.1)
    assert torch.equal(sslfast.info_nce(a, b, tau), sslfast.info_nce(a, b, float(tau)))


@pytest.mark.parametrize("wrong", [True, np.True_, "0.5", None, 1j, fractions.Fraction(1, 2), [0.5]])
def test_what_is_no_number(wrong: object) -> None:
    with pytest.raises(TypeError, match=f"temperature must be a float or a tensor, got {type(wrong).__name__}"):
        sslfast.nt_xent(*views(), wrong)


# ----------------------------------------------------------------------------------------------------------- any labels


@pytest.mark.parametrize("kind", ["sup_con", "sup_con_keys", "pair_nt_xent", "sup_con_keys, keys"])
def test_labels_of_any_type(kind: str) -> None:
    a, b = views()

    def loss(labels: Tensor) -> Tensor:
        if kind == "sup_con":
            return sslfast.sup_con(torch.stack([a, b], 1), labels)
        if kind == "sup_con_keys":
            return sslfast.sup_con_keys(a, labels)
        if kind == "pair_nt_xent":
            return sslfast.pair_nt_xent(a, labels)
        return sslfast.sup_con_keys(a, labels, b, (labels if labels.dtype == torch.bool else labels.double()))

    labels = torch.tensor([0, 1, 1, 0] * 3)
    true = loss(labels)
    for given in (labels.float() * -0.3, labels.double() * 1e300, labels.half(), labels.bfloat16() - 5):
        assert torch.equal(loss(given), true), given
    assert torch.equal(loss(labels.bool()), true)
    zeros = torch.where(labels == 0, torch.where(torch.arange(12) < 6, 0.0, -0.0), 1.0)
    assert torch.equal(loss(zeros), true)  # −0 is 0
    with pytest.raises(ValueError, match="labels must be no NaN"):
        loss(labels / 0)


# ------------------------------------------------------------------------------------------------------------ unit rows

EXPECTS_UNIT_ROWS: dict[str, Callable[..., Tensor]] = {
    "sup_con": lambda a, b: sslfast.sup_con(torch.stack([a, b], 1)),
    "uniformity": lambda a, b: sslfast.uniformity(a),
    "alignment": lambda a, b: sslfast.alignment(a, b),
    "clip": lambda a, b: sslfast.clip(a, b, 2.0),
    "sig_lip": lambda a, b: sslfast.sig_lip(a, b, 2.0),
}
NORMALISE: dict[str, Callable[..., Tensor]] = {
    "sup_con": lambda a, b: sslfast.sup_con(torch.stack([a, b], 1), normalize=True),
    "uniformity": lambda a, b: sslfast.uniformity(a, normalize=True),
    "alignment": lambda a, b: sslfast.alignment(a, b, normalize=True),
    "hypersphere": lambda a, b: sslfast.hypersphere(a, b),
    "nt_xent": lambda a, b: sslfast.nt_xent(a, b),
}


@pytest.mark.parametrize("name", EXPECTS_UNIT_ROWS)
def test_rows_far_from_norm_one_warn_once_at_the_line_of_the_user(name: str) -> None:
    a, b = (4 * x for x in views())
    with pytest.warns(
        UserWarning, match=f"sslfast.{name}: .* rows of norm 1, and theirs are 4 to 4: normalise"
    ) as told:
        EXPECTS_UNIT_ROWS[name](a, b)
    assert [w.filename for w in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EXPECTS_UNIT_ROWS[name](a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXPECTS_UNIT_ROWS)
def test_unit_rows_of_any_dtype_do_not_warn(name: str, dtype: torch.dtype) -> None:
    a, b = views(dtype)
    a[3], b[5] = 0, float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EXPECTS_UNIT_ROWS[name](a, b)
        EXPECTS_UNIT_ROWS[name](a.to("meta"), b.to("meta"))


@pytest.mark.parametrize("name", NORMALISE)
def test_losses_that_normalise_do_not_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NORMALISE[name](*(4 * x for x in views()))


@pytest.mark.parametrize("name", EXPECTS_UNIT_ROWS)
def test_compiled_without_a_graph_break(name: str) -> None:
    compiled = torch.compile(EXPECTS_UNIT_ROWS[name], fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*(4 * x for x in views()))
