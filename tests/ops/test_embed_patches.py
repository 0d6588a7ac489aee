"""From images to the kept tokens: the kernels against the reference in float64, on every instruction-set level."""

from __future__ import annotations

import pytest
import torch
from test_gather_patches import DTYPES, some_ids, three
from torch import Tensor

import sslfast
from helpers import roundings, within_budget
from sslfast import reference
from sslfast.masking import embed_patches

pytestmark = pytest.mark.sanitize

# (B, C, sides, patch, K, D, P): one micro-tile; ragged everything; films; several blocks and steps; more features than
# a strip and a tile holds; one number; no rows at all.
SHAPES = [
    (2, 3, (16, 16), (8, 8), 2, 32, 1),
    (3, 3, (21, 30), (7, 5), 11, 47, 0),
    (2, 2, (4, 12, 10), (2, 3, 5), 7, 33, 2),
    (67, 1, (24, 24), (4, 4), 30, 20, 1),
    (5, 3, (42, 28), (14, 14), 5, 203, 1),
    (1, 1, (2, 3), (1, 1), 1, 1, 5),
    (2, 1, (4, 4), (2, 2), 0, 6, 3),
]
NAMES = ("weight", "bias", "position", "prefix")


def make(shape: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    batch, channels, sides, patch, kept, d, prefix = shape
    length, features = 1, channels
    for side, p in zip(sides, patch, strict=True):
        length, features = length * (side // p), features * p
    images = torch.randn(batch, channels, *sides, dtype=torch.float64).to(dtype)
    sizes = ((d, features), (d,), (length, d), (prefix, d))
    parameters = [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]
    return images, some_ids(batch, length, kept), parameters


def gradients(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


@pytest.mark.levels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_and_gradients(shape: tuple, dtype: torch.dtype) -> None:
    images, ids, parameters = make(shape, dtype)
    channels, patch = shape[1], shape[3]
    mean, std = [0.3 + 0.1 * c for c in range(channels)], [0.6 + 0.3 * c for c in range(channels)]
    leaves = [t.clone().requires_grad_() for t in (images, *parameters)]
    out = embed_patches(
        leaves[0], ids, *leaves[1:3], position=leaves[3], prefix=leaves[4], patch_size=patch, mean=mean, std=std
    )
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype).mT.contiguous().mT

    def plain(wide: torch.dtype) -> list[Tensor]:
        same = [t.to(wide).requires_grad_() for t in (images, *parameters)]
        found = reference.embed_patches(same[0], ids, *same[1:], three(patch), mean, std)
        return [found, *gradients(found, same, grad)]

    expected = roundings(plain, torch.promote_types(dtype, torch.float32)), plain(torch.float64)
    for name, kernel, single, truth in zip(
        ("tokens", "images", *NAMES), [out, *gradients(out, leaves, grad)], *expected, strict=True
    ):
        assert kernel.dtype == dtype
        if truth.numel():
            within_budget(name, kernel, single.to(dtype), truth, dtype)
        assert kernel.shape == truth.shape


@pytest.mark.levels
def test_many_rows_and_threads() -> None:
    """More rows than are packed at a time, many tiles; the same bits whatever the number of threads."""
    images, ids, parameters = make((70, 3, (112, 112), (16, 16), 19, 260, 1), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in parameters]
            out = embed_patches(images, ids, *leaves[:2], position=leaves[2], prefix=leaves[3], patch_size=16)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            found.append([out, *gradients(out, leaves, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def plain(wide: torch.dtype) -> list[Tensor]:
        same = [t.to(wide).requires_grad_() for t in parameters]
        out = reference.embed_patches(images.to(wide), ids, *same, (1, 16, 16))
        return [out, *gradients(out, same, grad)]

    expected = roundings(plain, torch.float32), plain(torch.float64)
    for name, kernel, single, truth in zip(("tokens", *NAMES), found[0], *expected, strict=True):
        within_budget(name, kernel, single, truth, torch.float32)


def test_is_a_convolution_then_a_gather() -> None:
    """MAE's encoder's beginning; bytes; without ids; a film."""
    conv = torch.nn.Conv2d(3, 24, 8, 8)
    images, position, token = torch.randn(2, 3, 16, 32), torch.randn(1, 8, 24), torch.randn(1, 1, 24)
    ids = some_ids(2, 8, 2)
    all_tokens = conv(images).flatten(2).mT + position
    kept = torch.cat([token.expand(2, -1, -1), all_tokens.gather(1, ids[..., None].expand(-1, -1, 24))], 1)
    found = embed_patches(images, ids, conv.weight, conv.bias, patch_size=8, position=position, prefix=token)
    torch.testing.assert_close(found, kept)
    whole = embed_patches(images, None, conv.weight, conv.bias, patch_size=(8, 8), position=position[0])
    torch.testing.assert_close(whole, all_tokens)
    byte = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8)
    plain = ((byte / 255 - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
    expected = embed_patches(plain, ids, conv.weight, patch_size=8)
    torch.testing.assert_close(embed_patches(byte, ids, conv.weight, patch_size=8, mean=0.5, std=0.25), expected)
    film = torch.nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4))
    frames = torch.randn(2, 3, 4, 8, 8)
    found = embed_patches(frames, None, film.weight, film.bias, patch_size=(2, 4, 4))
    torch.testing.assert_close(found, film(frames).flatten(2).mT)
    composed = sslfast.ops.embed_patches._composed
    inputs = (images, ids, conv.weight.flatten(1), conv.bias, position[0], token[0], [1, 8, 8], [], [])
    torch.testing.assert_close(composed(sslfast.ops.embed_patches.Inputs(*inputs)), kept)


def test_every_subset_of_gradients() -> None:
    images, ids, parameters = make(SHAPES[1], torch.float64)
    parameters[3] = torch.randn(2, 47, dtype=torch.float64)

    def run(wanted: int, function: object) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate([images, *parameters])]
        out = function(leaves[0], ids, *leaves[1:], [1, 7, 5], [], [])  # type: ignore[operator]
        return gradients(out, [t for t in leaves if t.requires_grad], torch.ones_like(out) * 3)

    for wanted in range(1, 32):
        found = run(wanted, torch.ops.sslfast.embed_patches)
        for a, b in zip(found, run(wanted, reference.embed_patches), strict=True):
            torch.testing.assert_close(a, b)
    bare = embed_patches(images, ids, weight := parameters[0].requires_grad_(), patch_size=(7, 5))
    (found,) = torch.autograd.grad(bare.sum(), weight)
    (expected,) = torch.autograd.grad(
        reference.embed_patches(images, ids, weight, None, None, None, (1, 7, 5)).sum(), weight
    )
    torch.testing.assert_close(found, expected)


def test_what_is_not_finite_stays_alone() -> None:
    images, ids, parameters = make((2, 3, (32, 32), (8, 8), 6, 40, 1), torch.float32)
    ids = torch.arange(12).view(2, 6)
    images[0, 0, 0, 3] = float("nan")  # patch 0: kept
    images[1, 2, 31, 31] = float("inf")  # patch 15: not kept
    out = embed_patches(images, ids, *parameters[:2], patch_size=8)
    assert out[0, 0].isnan().all() and out[0, 1:].isfinite().all() and out[1].isfinite().all()


def test_autocast_and_16_bit_weights() -> None:
    images, ids, parameters = make(SHAPES[4], torch.float32)
    arguments = {"patch_size": 14, "position": parameters[2], "prefix": parameters[3]}
    with torch.autocast("cpu", torch.bfloat16):
        found = embed_patches(images, ids, *parameters[:2], **arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), embed_patches(images, ids, *parameters[:2], **arguments), rtol=2e-2, atol=0.2
    )


def test_gradcheck_and_double_backward() -> None:
    images, ids, parameters = make((2, 2, (4, 6), (2, 3), 3, 3, 1), torch.float64)
    leaves = [t.requires_grad_() for t in (images, *parameters)]

    def function(images: Tensor, weight: Tensor, bias: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
        return embed_patches(images, ids, weight, bias, patch_size=(2, 3), position=position, prefix=prefix, std=0.5)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_opcheck() -> None:
    images, ids, parameters = make(SHAPES[2], torch.float32)
    leaves = [t.requires_grad_() for t in parameters]
    embed, backward = torch.ops.sslfast.embed_patches.default, torch.ops.sslfast.embed_patches_backward.default
    torch.library.opcheck(embed, (images, ids, *leaves, [2, 3, 5], [0.1, 0.2], [1.0, 2.0]))
    torch.library.opcheck(embed, (images.mT.contiguous().mT, ids, leaves[0], None, None, None, [2, 3, 5], [], []))
    grad = torch.randn(2, 9, 33)
    for needs in ([1, 1, 1, 1], [0, 1, 0, 1]):
        torch.library.opcheck(backward, (grad, images, ids, [2, 3, 5], [], [2.0, 3.0], needs))


def test_compile_without_graph_breaks() -> None:
    images, ids, parameters = make(SHAPES[0], torch.float32)

    def function(weight: Tensor, bias: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
        return embed_patches(images, ids, weight, bias, patch_size=8, position=position, prefix=prefix, mean=0.5)

    found = []
    for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in parameters]
        out = f(*leaves)
        found.append([out, *gradients(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_reference_serves_and_empty_batch() -> None:
    images, ids, parameters = make(SHAPES[1], torch.float32)
    arguments = {"patch_size": (7, 5), "position": parameters[2]}
    found = embed_patches(images, ids, *parameters[:2], **arguments)
    with sslfast.use_backend("reference"):
        plain = embed_patches(images, ids, *parameters[:2], **arguments)
    torch.testing.assert_close(plain, found, rtol=0, atol=2e-6 * found.abs().max().item())
    weight = parameters[0].requires_grad_()
    empty = embed_patches(images[:0], ids[:0], weight, parameters[1], **arguments)
    assert empty.shape == (0, 11, 47)
    assert (torch.autograd.grad(empty.sum(), weight)[0] == 0).all()


def test_wrong_input() -> None:
    images, ids, (weight, bias, position, prefix) = make(SHAPES[0], torch.float32)
    wrong: list[tuple[type[Exception], str, dict]] = [
        (ValueError, r"weight must be \[D, 192\], .* got shape \(32, 191\)", {"weight": weight[:, 1:]}),
        (
            ValueError,
            r"weight must be \[D, 3, 1, 8, 8\] .* got shape \(32, 3, 4, 16\)",
            {"weight": weight.view(32, 3, 4, 16)},
        ),
        (TypeError, "weight must be a torch.Tensor, got list", {"weight": [1.0]}),
        (TypeError, "bias must have the weight's dtype torch.float32, got torch.float64", {"bias": bias.double()}),
        (ValueError, r"bias must be \[32\], got shape \(31,\)", {"bias": bias[1:]}),
        (ValueError, r"position must be \[4, 32\], got shape \(5, 32\)", {"position": torch.zeros(5, 32)}),
        (ValueError, r"prefix must be \[P, 32\], got shape \(1, 31\)", {"prefix": prefix[:, 1:]}),
        (ValueError, r"prefix must be \[P, 32\], got shape \(\)", {"prefix": torch.zeros(())}),
        (ValueError, "patch_size must divide", {"patch_size": 5}),
        (TypeError, "ids must be int64", {"ids": ids.int()}),
        (RuntimeError, "ids must be from 0 to 3, or -1 for none, got 9", {"ids": ids * 0 + 9}),
        (RuntimeError, "ids must not repeat within a row, got 2 twice", {"ids": ids * 0 + 2}),
    ]
    for kind, message, changed in wrong:
        arguments = {
            "ids": ids,
            "weight": weight,
            "bias": bias,
            "position": position,
            "prefix": prefix,
            "patch_size": 8,
        }
        arguments.update(changed)
        with pytest.raises(kind, match=message):
            embed_patches(images, arguments.pop("ids"), arguments.pop("weight"), arguments.pop("bias"), **arguments)
    with pytest.raises(RuntimeError, match="weight has an unexpected shape"):
        torch.ops.sslfast.embed_patches(images, ids, weight[:, 1:], None, None, None, [1, 8, 8], [], [])
    with pytest.raises(RuntimeError, match=r"grad must be \[B, P \+ K, D\]"):
        torch.ops.sslfast.embed_patches_backward(images[:, 0, :1], images, ids, [1, 8, 8], [], [], [1, 1, 1, 1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_is_as_cpu(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        images, ids, parameters = make(shape, dtype)
        found = []
        for device in ("cpu", "cuda"):
            leaves = [t.detach().to(device).requires_grad_() for t in parameters]
            out = embed_patches(
                images.to(device),
                ids.to(device),
                *leaves[:2],
                position=leaves[2],
                prefix=leaves[3],
                patch_size=shape[3],
            )
            found.append([t.cpu() for t in (out, *gradients(out, leaves, torch.ones_like(out)))])
        loose = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(
                a, b, rtol=loose, atol=loose * max(1.0, a.abs().max().item() if a.numel() else 0)
            )
