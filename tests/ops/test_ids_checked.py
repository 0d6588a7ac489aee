"""SSLFAST_CHECK_IDS=1: ids on a GPU are looked at as those on the CPU are, with the same errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast._checks import ids_checked
from sslfast.masking import embed_patches, gather_patches, gather_tokens, scatter_tokens
from sslfast.ops._patches import check_values
from sslfast.ops.gather_tokens import check_ids
from sslfast.ops.masked_feature_loss import _checked
from sslfast.ops.masked_patch_loss import _checked_index
from sslfast.ops.scatter_tokens import _check_restore

NAME = "SSLFAST_CHECK_IDS"


class OnGpu(Tensor):
    """A tensor whose values can be had, and which says that it is on a GPU."""

    is_cuda, is_cpu = True, False


def on_gpu(values: list[list[int]]) -> Tensor:
    return torch.tensor(values).as_subclass(OnGpu)


TWICE, BEYOND = [[0, 1, 2], [2, 2, 0]], [[0, 1, 2], [2, 1, 3]]
PRED, TEACHER = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
Check = Callable[[Tensor], object]
# The check, ids that it refuses, and what it says then.
CHECKS: dict[str, tuple[Check, list[list[int]], str]] = {
    "gather, twice": (lambda i: check_ids("ids", i, 3), TWICE, "ids must not repeat an id .* got 2 twice"),
    "gather, beyond": (lambda i: check_ids("ids", i, 3), BEYOND, r"ids must be from −1 .* to 2, got 3"),
    "scatter": (_check_restore, TWICE, r"ids_restore must hold each of 0 … 2 once .* \[0, 2, 2\], sorted, in row 1"),
    "patches, twice": (lambda i: check_values(i, 3), TWICE, "ids must not repeat within a row, got 2 twice"),
    "patches, beyond": (lambda i: check_values(i, 3), BEYOND, "ids must be from 0 to 2, .* got 3"),
    "features": (lambda i: _checked(PRED, TEACHER, i), BEYOND, "ids must be positions .* 0 to 2, got 0 to 3"),
    "pixels": (lambda i: _checked_index(i, PRED, 5), TWICE, "masks must not hold a patch of an image twice"),
    "pixels, beyond": (lambda i: _checked_index(i, PRED, 3), BEYOND, "masks must hold patches, 0 to 2, got 0 to 3"),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_variable_switches_the_checks_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, wrong, message = CHECKS[name]
    with pytest.raises(ValueError, match=message):
        call(torch.tensor(wrong))  # on the CPU in any case
    for off in (None, "", "0"):
        monkeypatch.delenv(NAME, raising=False) if off is None else monkeypatch.setenv(NAME, off)
        call(on_gpu(wrong))
    monkeypatch.setenv(NAME, "1")
    with pytest.raises(ValueError, match=message):
        call(on_gpu(wrong))
    call(on_gpu([[0, 1, 2], [2, 1, 0]]))


def test_nothing_is_looked_at_where_there_is_nothing_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "1")
    with FakeTensorMode():
        assert not ids_checked(torch.zeros(2, 3, dtype=torch.int64))
        assert not ids_checked(torch.zeros(2, 3, dtype=torch.int64, device="cuda"))
    assert not ids_checked(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    seen: list[bool] = []

    def compiled(ids: Tensor) -> Tensor:
        seen.append(ids_checked(ids))
        return ids + 1

    torch.compile(compiled, backend="eager", fullgraph=True)(torch.zeros(2, dtype=torch.int64))
    assert seen == [False]


@pytest.mark.gpu
def test_public_functions_raise_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "1")
    x, ids = torch.zeros(2, 3, 4, device="cuda"), torch.tensor(TWICE, device="cuda")
    images, weight = torch.zeros(2, 1, 2, 6, device="cuda"), torch.zeros(4, 4, device="cuda")
    for call in (
        lambda: gather_tokens(x, ids),
        lambda: scatter_tokens(x, ids, x[0, 0]),
        lambda: gather_patches(images, ids, patch_size=2),
        lambda: embed_patches(images, ids, weight, patch_size=2),
    ):
        with pytest.raises(ValueError, match="twice|once in every row"):
            call()
