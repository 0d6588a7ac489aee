"""Gathering tokens: value and gradients against the plain formula, strides, order of sums, wrong input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import sslfast
import token_common as tokens
from sslfast import ops, reference
from sslfast.masking import gather_tokens
from token_common import DEVICES, DTYPES, as_type, name_of, numbers

pytestmark = pytest.mark.sanitize

# masks (0: ids have no such dimension), images, tokens, kept, features, prefix rows
CASES = [
    (0, 3, 7, 4, 5, 1),
    (0, 70, 50, 13, 40, 2),  # more images than a group of the sums
    (3, 5, 11, 7, 33, 0),
    (2, 67, 3, 2, 1, 1),
    (0, 2, 1031, 9, 3, 0),  # more tokens than pieces
    (2, 3, 4, 4, 1030, 5),  # more features than a block
    (0, 1, 1, 1, 1, 0),
    (0, 4, 6, 0, 8, 2),  # nothing kept
    (0, 0, 6, 2, 8, 1),  # no image
]
PRESENT = ("x", "xp", "xf", "xpf", "tp", "tpf")  # x, position, prefix, token


def made(case: tuple[int, ...], present: str, padded: bool = True) -> tuple[list[Tensor | None], Tensor]:
    """Inputs (x, position, prefix, token) in float64, and ids with some of −1."""
    masks, batch, length, kept, width, prefix = case
    ids = torch.rand(max(masks, 1), batch, length).argsort(-1)[..., :kept]
    if padded:
        ids[torch.rand(ids.shape) < 0.1] = -1
    shapes = {"x": (batch, length, width), "p": (length, width), "f": (prefix, width), "t": (width,)}
    return [numbers(*shapes[name]) if name in present else None for name in "xpft"], ids if masks else ids[0]


def gather(ids: Tensor, packed: bool = False):
    return lambda x, p, f, t: gather_tokens(x, ids, position=p, prefix=f, token=t, packed=packed)


def plain(ids: Tensor, packed: bool = False):
    return lambda x, p, f, t: reference.gather_tokens(x, ids, p, f, t, packed)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for present in PRESENT:
        inputs, ids = made(case, present)
        with sslfast.use_backend(device):
            tokens.check(gather(ids.to(device)), plain(ids.to(device)), as_type(inputs, device), dtype)


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_packed_rows_value_and_gradients(dtype: torch.dtype, device: str) -> None:
    for present in PRESENT[:4]:
        (x, position, prefix, _), ids = made((0, 66, 20, 7, 37, 2), present)
        assert x is not None
        inputs = as_type([x[:, :7], position, prefix, None], device)
        with sslfast.use_backend(device):
            tokens.check(gather(ids.to(device), True), plain(ids.to(device), True), inputs, dtype)


def test_it_is_mae_encoder_input_and_ijepa_context() -> None:
    """MAE adds the position to all tokens, gathers by a repeated index, and concatenates the class token."""
    x, position, token, class_token = numbers(4, 9, 6), numbers(1, 10, 6), numbers(1, 1, 6), numbers(1, 1, 6)
    ids = torch.rand(4, 9).argsort(1)[:, :3]

    def mae(x: Tensor, position: Tensor, class_token: Tensor) -> Tensor:
        kept = torch.gather(x + position[:, 1:], 1, ids.unsqueeze(-1).repeat(1, 1, 6))
        return torch.cat([(class_token + position[:, :1]).expand(4, -1, -1), kept], 1)

    def ours(x: Tensor, position: Tensor, class_token: Tensor) -> Tensor:
        return gather_tokens(x, ids, position=position[:, 1:], prefix=class_token + position[:, :1])

    inputs = (x, position, class_token)
    for mine, its in zip(
        tokens.value_and_gradients(ours, inputs), tokens.value_and_gradients(mae, inputs), strict=True
    ):
        torch.testing.assert_close(mine, its)
    masks = torch.stack([ids, ids.flip(0)])
    apply_masks = torch.cat([torch.gather(x, 1, m.unsqueeze(-1).repeat(1, 1, 6)) for m in masks])
    assert torch.equal(gather_tokens(x, masks).flatten(0, 1), apply_masks)
    predictor = gather_tokens(None, masks, position=position[:, 1:], token=token)
    assert torch.equal(predictor, token + position[0, 1:][masks])


@pytest.mark.levels
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides(dtype: torch.dtype, device: str) -> None:
    """Tokens as a convolution leaves them, a slice, a repeated image, a start that is not aligned; ids too."""
    base = numbers(5, 39, 24).to(device, dtype)
    for name, x in tokens.strided_tokens(base).items():
        length, width = x.shape[1:]
        ids = torch.rand(length, 5).argsort(0)[:7].T.to(device)  # not contiguous
        position, prefix = numbers(width, length).T.to(device, dtype), numbers(2, 2 * width)[:, ::2].to(device, dtype)
        grad = numbers(9, width, 5).permute(2, 0, 1).to(device, dtype)
        with sslfast.use_backend(device):
            tokens.check_strides(lambda *given, ids=ids: gather(ids)(*given, None), (x, position, prefix), grad, name)


def test_a_gradient_with_its_images_before_its_masks() -> None:
    inputs, ids = made((3, 4, 9, 5, 6, 2), "xpf")
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    value, grad = gather(ids)(*leaves, None), numbers(4, 3, 7, 6).transpose(0, 1)
    found = torch.autograd.grad(value, leaves, grad, retain_graph=True)
    tokens.assert_same(found, torch.autograd.grad(value, leaves, grad.contiguous()))


def test_what_is_dropped_leaves_nothing_behind() -> None:
    x, position = numbers(2, 4, 3), numbers(4, 3)
    x[:, 1] = float("nan")
    position[3] = float("inf")
    x.requires_grad_()
    y = gather_tokens(x, torch.tensor([[0, 2, -1], [2, -1, 0]]), position=position)
    assert y.isfinite().all() and (y[0, 2] == 0).all() and (y[1, 1] == 0).all()
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
    assert (dx[:, [1, 3]] == 0).all() and dx[:, [0, 2]].isnan().all()


def test_repeated_ids_of_the_operator_sum_their_gradients() -> None:
    """Not for the public function; on the CPU the operator serves lightly's get_at_index, which allows them."""
    inputs, ids = made((0, 5, 4, 9, 6, 0), "xp", padded=False)
    ids = torch.randint(4, (5, 9))
    tokens.check(
        lambda x, p, f, t: torch.ops.sslfast.gather_tokens(x, ids, p, f, t, False), plain(ids), inputs, torch.float32
    )


@pytest.mark.parametrize("device", DEVICES)
def test_every_subset_of_gradients(device: str) -> None:
    for present, backend in itertools.product(("xpf", "tpf"), (device, "reference")):
        inputs, ids = made((2, 5, 7, 3, 6, 2), present)
        with sslfast.use_backend(backend):
            tokens.check_subsets(gather(ids.to(device)), as_type(inputs, device))


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_double_backward(device: str) -> None:
    for present, case in (("xpf", (2, 2, 4, 3, 2, 1)), ("tp", (0, 3, 4, 2, 2, 0))):
        inputs, ids = made(case, present)
        tokens.check_twice_differentiable(gather(ids.to(device)), inputs, device)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    op, backward = torch.ops.sslfast.gather_tokens.default, torch.ops.sslfast.gather_tokens_backward.default
    for present, packed in (("xpf", False), ("tp", False), ("xpf", True)):
        (x, *rest), ids = made((0 if packed else 2, 3, 5, 4, 6, 2), present)
        given = [t if t is None else t.to(device, torch.float32).requires_grad_() for t in (x, *rest)]
        if packed:
            given[0] = given[0][:, :4]
        torch.library.opcheck(op, (given[0], ids.to(device), *given[1:], packed))
        grad = torch.randn(*ids.shape[:-1], 6, 6, device=device)
        torch.library.opcheck(backward, (grad, ids.to(device), 5, packed, [int(t is not None) for t in given]))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_without_graph_breaks(device: str) -> None:
    inputs, ids = made((0, 3, 7, 4, 6, 1), "xpf")
    inputs = as_type(inputs, device)
    compiled = torch.compile(gather(ids.to(device)), backend="aot_eager", fullgraph=True)
    tokens.assert_same(
        tokens.value_and_gradients(compiled, inputs),
        tokens.value_and_gradients(gather(ids.to(device)), inputs),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_run_to_run(device: str) -> None:
    for present in ("xpf", "tpf"):
        inputs, ids = made((2, 150, 40, 10, 70, 2), present)
        tokens.check_repeats(gather(ids.to(device)), as_type(inputs, device, torch.float32))


def test_autocast_casts_the_tables_to_the_tokens() -> None:
    x, position, token = torch.randn(2, 5, 3).bfloat16(), torch.randn(5, 3, requires_grad=True), torch.randn(3)
    ids = torch.tensor([[0, 4], [2, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        y = gather_tokens(x, ids, position=position, prefix=token[None])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, reference.gather_tokens(x, ids, position.bfloat16(), token[None].bfloat16()))
    y.float().sum().backward()
    assert position.grad is not None and position.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"position must have the tokens' dtype torch.bfloat16, got torch.float32"):
        gather_tokens(x, ids, position=position)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input_names_the_argument(backend: str) -> None:
    x, ids = torch.randn(2, 5, 3), torch.tensor([[0, 4], [2, 1]])
    position = torch.randn(5, 3)
    wrong = [
        (ValueError, "either x or token, got both", (x, ids), {"token": position[0]}),
        (ValueError, "either x or token, got neither", (None, ids), {}),
        (ValueError, "token needs position", (None, ids), {"token": position[0]}),
        (TypeError, "x must be float32, .* got torch.int64", (x.long(), ids), {}),
        (ValueError, r"x must have shape \[images, tokens, features\], got \(5, 3\)", (x[0], ids), {}),
        (TypeError, "ids must be int64, got torch.int32", (x, ids.int()), {}),
        (ValueError, r"ids must have 2 or 3 dimensions, got shape \(2,\)", (x, ids[0]), {}),
        (ValueError, r"same images, got \(2, 5, 3\) and \(1, 2\)", (x, ids[:1]), {}),
        (ValueError, r"same images and kept tokens, got \(2, 5, 3\)", (x, ids), {"packed": True}),
        (ValueError, r"ids must be from −1 \(no token\) to 4, got 5", (x, ids + 1), {}),
        (ValueError, r"ids must be from −1 \(no token\) to 4, got -2", (x, ids - 2), {}),
        (ValueError, "must not repeat an id within an image's row, got 2 twice", (x, ids.clamp(2, 2)), {}),
        (ValueError, r"position must have shape \[rows, features\] with 3 features", (x, ids), {"position": x}),
        (ValueError, "a row for each of the 5 tokens, got 4", (x, ids), {"position": position[:4]}),
        (ValueError, r"token must have shape \[features\]", (None, ids), {"token": position, "position": position}),
        (TypeError, "prefix must be a torch.Tensor, got list", (x, ids), {"prefix": [1.0]}),
        (TypeError, "prefix must have the tokens' dtype", (x, ids), {"prefix": position.double()}),
    ]
    with sslfast.use_backend(backend):
        for error, message, arguments, options in wrong:
            with pytest.raises(error, match=message):
                ops.gather_tokens.gather_tokens(*arguments, **options)
        gather_tokens(x, torch.full((2, 3), -1))  # no token may stand more than once


def test_operators_check_what_they_are_given() -> None:
    """Called without the public function, with arguments that would read or write out of bounds."""
    x, ids, grad = torch.randn(2, 5, 3), torch.tensor([[0, 4], [2, 1]]), torch.randn(2, 2, 3)
    op, backward = torch.ops.sslfast.gather_tokens, torch.ops.sslfast.gather_tokens_backward
    for bad in (ids + 1, ids - 2):
        with pytest.raises(RuntimeError, match="ids must be from -1 to 4, got"):
            op(x, bad, None, None, None, False)
        with pytest.raises(RuntimeError, match="ids must be from -1 to 4, got"):
            backward(grad, bad, 5, False, [0, 1, 0, 0])
    with pytest.raises(RuntimeError, match="x has an unexpected shape"):
        op(x[:1], ids, None, None, None, False)
    with pytest.raises(RuntimeError, match="position must have a row for each token"):
        op(x, ids, x[0, :4], None, None, False)
    with pytest.raises(RuntimeError, match="grad has an unexpected shape"):
        backward(grad[:1], ids, 5, False, [1, 0, 0, 0])
    with pytest.raises(RuntimeError, match="ids must be int64"):
        op(x, ids.int(), None, None, None, False)


def test_the_gradient_of_one_image_under_several_masks_in_any_strides() -> None:
    """A dimension of one entry has any stride: the step between masks must not be read off it."""
    x = torch.randn(1, 7, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[[1, 4, 2]], [[0, 4, 6]]])
    weight = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    (found,) = torch.autograd.grad((gather_tokens(x, ids).transpose(0, 1) * weight).sum(), x)
    (expected,) = torch.autograd.grad((reference.gather_tokens(x, ids).transpose(0, 1) * weight).sum(), x)
    torch.testing.assert_close(found, expected)
