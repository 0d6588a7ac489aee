"""Tokens put back in their places: value and gradients against the plain formula, both kinds of index, wrong input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sslfast
import token_common as tokens
from sslfast import reference
from sslfast.masking import replace_tokens, scatter_tokens
from token_common import DEVICES, DTYPES, as_type, name_of, numbers

pytestmark = pytest.mark.sanitize

# images, tokens, kept, features, prefix rows, passed rows
CASES = [
    (3, 7, 4, 5, 1, 1),
    (70, 19, 6, 40, 0, 2),  # more images than a group of the sums
    (2, 300, 75, 3, 2, 0),  # more rows than one piece of the sums
    (3, 5, 2, 2050, 0, 1),  # more features than a block
    (1, 1, 1, 1, 0, 0),
    (4, 6, 0, 8, 0, 1),  # nothing kept
    (4, 6, 6, 8, 1, 0),  # nothing masked
    (0, 6, 2, 8, 1, 1),  # no image
]


def made(case: tuple[int, ...], positions: str, masked: bool) -> tuple[list[Tensor | None], Tensor, int]:
    """Inputs (x, token, position, prefix) in float64, the index, and the passed rows."""
    batch, length, kept, width, prefix, passed = case
    if masked:
        passed, kept = 0, length
        index = torch.rand(batch, length) < 0.6
    else:
        index = torch.rand(batch, length).argsort(1)
    rows = {"none": None, "tokens": length, "all": prefix + passed + length}[positions]
    inputs = [numbers(batch, passed + kept, width), numbers(width)]
    inputs += [None if rows is None else numbers(rows, width), numbers(prefix, width) if prefix else None]
    return inputs, index, passed


def scatter(index: Tensor, passed: int):
    if index.dtype == torch.bool:
        return lambda x, t, p, f: replace_tokens(x, index, t, position=p, prefix=f)
    return lambda x, t, p, f: scatter_tokens(x, index, t, position=p, prefix=f, passed=passed)


def plain(index: Tensor, passed: int):
    return lambda x, t, p, f: reference.scatter_tokens(x, index, t, p, f, passed)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("masked", [False, True], ids=["ids", "mask"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: tuple[int, ...], masked: bool, dtype: torch.dtype, device: str) -> None:
    for positions in ("none", "tokens", "all"):
        inputs, index, passed = made(case, positions, masked)
        index = index.to(device)
        with sslfast.use_backend(device):
            tokens.check(scatter(index, passed), plain(index, passed), as_type(inputs, device), dtype)


def test_it_is_the_decoder_input_of_mae_and_the_tokens_of_dinov2() -> None:
    x, token, position = numbers(4, 4, 6), numbers(1, 1, 6), numbers(1, 10, 6)
    restore = torch.rand(4, 9).argsort(1)

    def mae(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
        filled = torch.cat([x[:, 1:], token.repeat(4, 9 + 1 - x.shape[1], 1)], 1)
        filled = torch.gather(filled, 1, restore.unsqueeze(-1).repeat(1, 1, 6))
        return torch.cat([x[:, :1], filled], 1) + position

    def ours(x: Tensor, token: Tensor, position: Tensor) -> Tensor:
        return scatter_tokens(x, restore, token, position=position, passed=1)

    inputs = (x, token, position)
    for mine, its in zip(
        tokens.value_and_gradients(ours, inputs), tokens.value_and_gradients(mae, inputs), strict=True
    ):
        torch.testing.assert_close(mine, its)
    mask, class_token, registers, x = torch.rand(4, 9) < 0.4, numbers(1, 1, 6), numbers(1, 2, 6), numbers(4, 9, 6)
    rows = torch.cat([class_token.expand(4, -1, -1), torch.where(mask[..., None], token, x)], 1) + position
    dinov2 = torch.cat([rows[:, :1], registers.expand(4, -1, -1), rows[:, 1:]], 1)
    prefix = torch.cat([class_token + position[:, :1], registers], 1)
    assert torch.equal(replace_tokens(x, mask, token, position=position[:, 1:], prefix=prefix), dinov2)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype: torch.dtype, device: str) -> None:
    base = numbers(5, 39, 24).to(device, dtype)
    for name, x in tokens.strided_tokens(base).items():
        length, width = x.shape[1:]
        restore = torch.rand(length + 20, 5).argsort(0).T.to(device)  # not contiguous
        mask = (torch.rand(length, 5) < 0.5).T.to(device)
        for index in (restore, mask):
            rows = 2 + index.shape[1]
            token, position = numbers(width, 2)[:, 0].to(device, dtype), numbers(width, rows).T.to(device, dtype)
            prefix, grad = numbers(2, 2 * width)[:, ::2].to(device, dtype), numbers(rows, width, 5).permute(2, 0, 1)
            grad = grad.to(device, dtype)
            with sslfast.use_backend(device):
                tokens.check_strides(scatter(index, 0), (x, token, position, prefix), grad, name)


def test_what_is_masked_leaves_nothing_behind() -> None:
    x, mask = torch.full((2, 3, 4), float("nan"), requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    y = replace_tokens(x, mask, torch.ones(4))
    assert (y == 1).all()
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
    assert (dx == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True], ids=["ids", "mask"])
def test_every_subset_of_gradients(masked: bool, device: str) -> None:
    for backend in (device, "reference"):
        for positions in ("tokens", "all"):
            inputs, index, passed = made((5, 7, 3, 6, 2, 1), positions, masked)
            with sslfast.use_backend(backend):
                tokens.check_subsets(scatter(index.to(device), passed), as_type(inputs, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True], ids=["ids", "mask"])
def test_gradcheck_and_double_backward(masked: bool, device: str) -> None:
    inputs, index, passed = made((2, 4, 2, 3, 1, 1), "all", masked)
    tokens.check_twice_differentiable(scatter(index.to(device), passed), inputs, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True], ids=["ids", "mask"])
def test_opcheck(masked: bool, device: str) -> None:
    op, backward = torch.ops.sslfast.scatter_tokens.default, torch.ops.sslfast.scatter_tokens_backward.default
    (x, token, *rest), index, passed = made((3, 5, 2, 6, 2, 1), "tokens", masked)
    given = [None if t is None else t.to(device, torch.float32).requires_grad_() for t in (x, token, *rest)]
    torch.library.opcheck(op, (given[0], index.to(device), *given[1:], passed))
    grad = torch.randn(3, 7 + passed, 6, device=device)
    for needs in ([1, 1, 1, 1], [1, 0, 0, 0]):
        torch.library.opcheck(backward, (grad, index.to(device), x.shape[1] - passed, passed, 5, needs))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks(device: str) -> None:
    inputs, index, passed = made((3, 7, 4, 6, 1, 1), "all", False)
    inputs, index = as_type(inputs, device), index.to(device)
    compiled = torch.compile(scatter(index, passed), backend="aot_eager", fullgraph=True)
    tokens.assert_same(
        tokens.value_and_gradients(compiled, inputs),
        tokens.value_and_gradients(scatter(index, passed), inputs),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_run_to_run(device: str) -> None:
    for masked in (False, True):
        inputs, index, passed = made((150, 40, 10, 70, 2, 1), "tokens", masked)
        tokens.check_repeats(scatter(index.to(device), passed), as_type(inputs, device, torch.float32))


def test_autocast_casts_the_tables_to_the_tokens() -> None:
    x, token, mask = torch.randn(2, 5, 3).bfloat16(), torch.randn(1, 1, 3, requires_grad=True), torch.rand(2, 5) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        y = replace_tokens(x, mask, token)
    assert torch.equal(y, torch.where(mask[..., None], token.bfloat16(), x))
    y.float().sum().backward()
    assert token.grad is not None and token.grad.dtype == torch.float32 and token.grad.shape == (1, 1, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_the_argument(backend: str) -> None:
    x, restore, token = torch.randn(2, 3, 4), torch.stack([torch.randperm(5), torch.randperm(5)]), torch.randn(4)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    once = "ids_restore must hold each of 0 … 4 once in every row"
    wrong_ids = [
        (TypeError, "x must be float32, .* got torch.int64", (x.long(), restore, token), {}),
        (TypeError, "ids_restore must be int64, got torch.bool", (x, mask, token), {}),
        (ValueError, r"ids_restore must have 2 dimensions, got shape \(5,\)", (x, restore[0], token), {}),
        (ValueError, r"a row for each image .* got \(1, 5\) for x of shape \(2, 3, 4\)", (x, restore[:1], token), {}),
        (ValueError, "at least those of x, got", (torch.randn(2, 6, 4), restore, token), {}),
        (
            ValueError,
            "passed must be a whole number from 0 to the 3 rows of x, got 4",
            (x, restore, token),
            {"passed": 4},
        ),
        (ValueError, once, (x, restore + 1, token), {}),
        (ValueError, once, (x, restore - 1, token), {}),
        (ValueError, r"got \[0, 1, 2, 3, 3\], sorted, in row 1", (x, restore.clone(), token), {}),
        (
            ValueError,
            r"mask_token must have shape \[features\] with 4 features, got \(3,\)",
            (x, restore, token[:3]),
            {},
        ),
        (TypeError, "mask_token must be a torch.Tensor, got NoneType", (x, restore, None), {}),
        (TypeError, "mask_token must have the tokens' dtype", (x, restore, token.double()), {}),
        (
            ValueError,
            "each of 5 tokens or of 6 rows in all, got 4",
            (x, restore, token),
            {"position": torch.randn(4, 4), "passed": 1},
        ),
    ]
    wrong_ids[8][2][1][1] = torch.tensor([3, 0, 3, 1, 2])
    wrong_masks = [
        (TypeError, "mask must be a bool tensor, got torch.int64", (x, restore, token), {}),
        (ValueError, r"mask must have shape \(2, 3\), .* got \(2, 2\)", (x, mask[:, :2], token), {}),
        (ValueError, r"position must have shape \[rows, features\]", (x, mask, token), {"position": x}),
    ]
    with sslfast.use_backend(backend):
        for function, wrong in ((scatter_tokens, wrong_ids), (replace_tokens, wrong_masks)):
            for error, message, arguments, options in wrong:
                with pytest.raises(error, match=message):
                    function(*arguments, **options)


def test_operators_check_what_they_are_given() -> None:
    """Called without the public function, with arguments that would read or write out of bounds."""
    x, restore, token = torch.randn(2, 3, 4), torch.stack([torch.randperm(5), torch.randperm(5)]), torch.randn(4)
    grad = torch.randn(2, 6, 4)
    op, backward = torch.ops.sslfast.scatter_tokens, torch.ops.sslfast.scatter_tokens_backward
    twice = restore.clone()
    twice[1, 0] = twice[1, 1]
    for bad in (restore + 1, restore - 1, twice):
        with pytest.raises(RuntimeError, match="index must be a permutation in each row, got"):
            op(x, bad, token, None, None, 1)
        with pytest.raises(RuntimeError, match="index must be a permutation in each row, got"):
            backward(grad, bad, 2, 1, 0, [1, 1, 0, 0])
    with pytest.raises(RuntimeError, match="passed must be from 0"):
        op(x, restore, token, None, None, 4)
    with pytest.raises(RuntimeError, match="mask must have a column for each row of x"):
        op(x, restore.bool(), token, None, None, 0)
    with pytest.raises(RuntimeError, match="position must have a row for each token"):
        op(x, restore, token, x[0], None, 1)
    with pytest.raises(RuntimeError, match="grad has an unexpected shape"):
        backward(grad[:, :4], restore, 2, 1, 0, [1, 1, 0, 0])
    with pytest.raises(RuntimeError, match="positions must be the number of tokens"):
        backward(grad, restore, 2, 1, 4, [1, 1, 1, 0])
