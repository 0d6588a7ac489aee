"""Masking on a GPU against the kernels on the CPU: the same masks bit for bit, the same rows, losses and gradients to
rounding; the same bits twice; no wait for the device; and all of it inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import TOLERANCE
from sslfast import masking
from sslfast.ops.embed_patches import embed_patches
from sslfast.ops.gather_patches import gather_patches, scatter_patches
from sslfast.ops.gather_tokens import gather_tokens
from sslfast.ops.masked_feature_loss import masked_feature_loss
from sslfast.ops.masked_patch_loss import masked_patch_loss
from sslfast.ops.masked_rows import masked_rows
from sslfast.ops.partition_mask import partition_mask
from sslfast.ops.scatter_tokens import scatter_tokens

pytestmark = pytest.mark.gpu

Function = Callable[..., Any]


def given(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An input whose gradient is compared too."""
    return torch.randn(*shape).to(dtype).requires_grad_()


def some_ids(*shape: int, length: int, padded: bool = True) -> Tensor:
    """Distinct in each row; a few are −1."""
    ids = torch.rand(*shape[:-1], length).argsort(-1)[..., : shape[-1]].contiguous()
    return ids.masked_fill(torch.rand(ids.shape) < 0.1, -1) if padded else ids


def count(sides: Sequence[int]) -> int:
    return torch.Size(sides).numel()


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, of a tuple or of a dataclass."""
    if isinstance(result, Tensor):
        return [result]
    parts = result if isinstance(result, (tuple, list)) else vars(result).values()
    return [t for part in parts if not isinstance(part, int) for t in flat(part)]


def call_on(
    device: str, function: Function, inputs: Sequence[Any], named: dict[str, Any]
) -> Callable[[], list[Tensor]]:
    """A call that returns results and gradients, its tensors on ``device`` beforehand."""

    def there(x: Any) -> Any:
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    inputs, named = [there(x) for x in inputs], {name: there(x) for name, x in named.items()}
    leaves = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor) and x.requires_grad]
    grads: list[Tensor] = []

    def run() -> list[Tensor]:
        found = flat(function(*inputs, **named))
        if not leaves:
            return found
        if not grads:  # not 1, and the same on every device
            waves = [torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape) + 0.5 for t in found]
            grads.extend(wave.to(t) for wave, t in zip(waves, found, strict=True))
        return [*(t.detach() for t in found), *torch.autograd.grad(found, leaves, grads)]

    return run


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], exact: bool = False) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.cpu(), b.cpu()
        if exact or not a.dtype.is_floating_point:
            assert torch.equal(a, b)
        else:
            allowed = 4 * TOLERANCE[a.dtype] * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
            assert not a.numel() or float((a.double() - b.double()).abs().max()) <= allowed


def check(function: Function, *inputs: Any, exact: bool = False, **named: Any) -> None:
    """As the CPU, the same bits twice, nothing waits, and a graph replays it."""
    run = call_on("cuda", function, inputs, named)
    first = [t.clone() for t in run()]
    assert all(t.is_cuda for t in first)
    assert_same(first, call_on("cpu", function, inputs, named)(), exact)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(again, first, exact=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in captured:
        t.zero_()
    graph.replay()
    assert_same(captured, first, exact=True)


# ------------------------------------------------------------------------------------------------------- generators

KEY = dict(seed=-3, epoch=2, view=1)
MASKS: dict[str, Function] = {
    "random": lambda ids: masking.random_masks(ids, (14, 14), **KEY),
    "random, in order of noise": lambda ids: masking.random_masks(ids, 1000, 0.6, order="noise", **KEY),
    "random, of noise": lambda ids, noise: masking.random_masks(ids, 50, order="noise", noise=noise),
    "tubes": lambda ids: masking.tube_masks(ids, (8, 14, 14), **KEY),
    "units": lambda ids: masking.grid_masks(ids, (12, 18), unit=3, **KEY),
    "blocks": lambda ids: masking.beit_masks(ids, **KEY),
    "blocks, completed": lambda ids: masking.block_masks(ids, (37, 20), 300, complete=True, **KEY),
    "blocks of iBOT": lambda ids: masking.ibot_masks(ids, (14, 14), (0.0, 0.3), (0.0, 0.2), **KEY),
    "DINOv2": lambda ids: masking.dinov2_masks(ids, (16, 16), **KEY),
    "DINOv3": lambda ids: masking.dinov3_masks(ids, (16, 16), **KEY),
    "blocks of I-JEPA": lambda ids: masking.multiblock_masks(ids, (14, 14), context_size=28, **KEY),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_the_same_bits(name: str) -> None:
    ids, noise = torch.randint(0, 2**62, (301,)), torch.rand(301, 50)
    noise[:, 20:30] = noise[:, 10:20]  # ties
    check(MASKS[name], ids, *([noise] if name == "random, of noise" else []), exact=True)


def test_lists_of_a_mask() -> None:
    mask = masking.random_masks(torch.arange(67), 300, 0.5).mask
    check(partition_mask, mask, 150, exact=True)
    check(masked_rows, mask, 67 * 150 + 9, exact=True)
    _, weights, count = masked_rows(mask.cuda(), 100)
    assert weights.isnan().all() and int(count) == 67 * 150  # too short a list is never a silent partial sum


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_words(dtype: torch.dtype, exact: bool) -> None:
    tokens, ids = torch.randint(5, 30000, (33, 130)).to(dtype), torch.randint(0, 2**62, (33,))
    special = torch.rand(tokens.shape) < 0.1
    word_ids = (torch.arange(130) // 2).expand(33, -1).masked_fill(special, -1)

    def words(*inputs: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        return masking.mask_tokens(*inputs, mask_id=4, vocab_size=30000, exact=exact, **KEY, **named)

    check(words, tokens, ids, special=special, exact=True)
    check(words, tokens, ids, word_ids=word_ids, exact=True)


# ----------------------------------------------------------------------------------------------------------- tokens

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, L, K, D: as MAE's, ragged, a batch of many pieces, one row.
SHAPES = [(8, 196, 49, 192), (5, 13, 7, 61), (301, 6, 3, 40), (1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_tokens(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, length, kept, d = shape
    ids, masks = some_ids(b, kept, length=length), some_ids(3, b, kept, length=length)
    x, position, prefix, token = (given(s, dtype) for s in ((b, length, d), (length, d), (2, d), (d,)))
    check(gather_tokens, x, ids)
    check(gather_tokens, x, ids, position=position, prefix=prefix)
    check(gather_tokens, x, masks, position=position, prefix=prefix)
    check(gather_tokens, given((b, kept, d), dtype), ids, position=position, prefix=prefix, packed=True)
    check(gather_tokens, None, masks, position=position, token=token)

    def strided(x: Tensor, ids: Tensor, position: Tensor) -> Tensor:
        return gather_tokens(x[:, 1:], ids, position=position.mT.contiguous().mT[1:])

    check(strided, given((b, length + 1, d), dtype), ids, given((length + 1, d), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_tokens(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, length, kept, d = shape
    restore, mask = some_ids(b, length, length=length, padded=False), torch.rand(b, length) < 0.4
    x, token, position, prefix = (given(s, dtype) for s in ((b, length, d), (d,), (length, d), (2, d)))
    whole = given((2 + 1 + length, d), dtype)
    check(scatter_tokens, given((b, kept, d), dtype), restore, token)
    for at in (position, whole, whole.detach()):  # the last needs no gradient
        check(
            scatter_tokens,
            given((b, 1 + kept, d), dtype),
            restore,
            token,
            position=at,
            prefix=prefix,
            passed=1,
        )
    check(masking.replace_tokens, x, mask, token)
    check(masking.replace_tokens, x, mask, token, position=position, prefix=prefix)


def test_an_id_that_is_not_allowed_gives_nan() -> None:
    ids = torch.tensor([[4, -1, 0, -2]], device="cuda")
    rows = gather_tokens(torch.zeros(1, 4, 8, device="cuda"), ids)[0]
    patches = gather_patches(torch.zeros(1, 3, 4, 4, device="cuda"), ids, patch_size=2)[0]
    for found in (rows, patches):
        assert found.isnan().all(1).tolist() == [True, False, False, True] and not found[1:3].any()


def test_ids_that_are_not_allowed_give_nan_in_every_run() -> None:
    """A repeated id: NaN in the gradient of its token; no permutation: in those of all of the image's tokens."""
    twice = torch.tensor([[0, 3, 3, 1], [2, 0, 1, 3]], device="cuda")
    x = torch.randn(2, 4, 40, device="cuda", requires_grad=True)
    token = torch.zeros(40, device="cuda")

    def gradients() -> list[Tensor]:
        rows = gather_tokens(x, twice)
        restored = scatter_tokens(x[:, :3], twice, token)
        images = (
            scatter_patches(x[..., :4], twice, size=(1, 4, 4), patch_size=2).unflatten(2, (2, 2)).unflatten(4, (2, 2))
        )
        return [
            torch.autograd.grad(rows.sum(), x)[0].isnan().all(2),
            torch.autograd.grad(restored.sum(), x)[0].isnan().all(2),
            images.detach().isnan().all(5).all(3).flatten(1),
        ]

    expected = [
        [[False, False, False, True], [False] * 4],
        [[True, True, True, False], [False] * 4],
        [[False, False, False, True], [False] * 4],
    ]
    for _ in range(3):
        assert [t.tolist() for t in gradients()] == expected


def test_the_device_of_the_tensors_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ids = torch.randint(0, 2**62, (7,))
    expected = masking.random_masks(ids, (14, 14), **KEY).ids_keep
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            assert torch.equal(masking.random_masks(ids.to(f"cuda:{other}"), (14, 14), **KEY).ids_keep.cpu(), expected)
            assert torch.equal(masking.random_masks(ids.cuda(), (14, 14), **KEY).ids_keep.cpu(), expected)
            assert torch.cuda.current_device() == current


# ---------------------------------------------------------------------------------------------------------- patches

MANY = "many channels"
IMAGES = {
    "ViT": ((3, 3, 64, 48), (16, 16)),
    "patches of 14": ((2, 3, 28, 42), (14, 14)),
    "ragged": ((3, 1, 6, 10), (3, 5)),
    "film": ((2, 3, 4, 16, 24), (2, 8, 8)),
    MANY: ((2, 70, 8, 8), (4, 2)),
}
LAYOUTS: dict[str, Function] = {
    "planar": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMAGES)
def test_patches(name: str, layout: str, order: Any, dtype: torch.dtype) -> None:
    shape, patch = IMAGES[name]
    channels, length, numbers = shape[1], count(shape[2:]) // count(patch), shape[1] * count(patch)
    ids = some_ids(shape[0], max(1, length // 2), length=length)

    def gathered(x: Tensor, ids: Tensor | None) -> Tensor:
        mean, std = [0.1 * c for c in range(channels)], [0.5 + 0.1 * c for c in range(channels)]
        options: dict[str, Any] = dict(patch_size=patch, order=order, dtype=dtype)
        return gather_patches(LAYOUTS[layout](x), ids, **options, **({} if name == MANY else dict(mean=mean, std=std)))

    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    check(gathered, pixels, ids)
    check(gathered, pixels, None)
    check(gathered, given(shape, torch.float32), ids)
    rows = given((*ids.shape, numbers), dtype)
    check(scatter_patches, rows, ids, size=shape[1:], patch_size=patch, order=order)


def test_embed_patches() -> None:
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    weight, bias, position, prefix = (given(s, torch.float32) for s in ((40, 3, 8, 8), (40,), (24, 40), (2, 40)))
    ids = some_ids(3, 10, length=24, padded=False)
    options: dict[str, Any] = dict(patch_size=8, position=position, prefix=prefix, mean=0.5, std=[0.2, 0.3, 0.4])
    check(embed_patches, images, ids, weight, bias, **options)


# ----------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["pixels", "mae", "videomae"])
@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("name", ["ViT", "film"])
def test_masked_patch_loss(name: str, loss: str, target: str, dtype: torch.dtype) -> None:
    shape, patch = IMAGES[name]
    length, numbers = count(shape[2:]) // count(patch), shape[1] * count(patch)
    ids, mask = some_ids(shape[0], length // 2, length=length, padded=False), torch.rand(shape[0], length) < 0.7
    options: dict[str, Any] = dict(patch_size=patch, loss=loss, target=target)
    for images in (torch.randint(0, 256, shape, dtype=torch.uint8), torch.randn(shape)):
        check(masked_patch_loss, images, given((shape[0], length, numbers), dtype), mask, **options)
        check(masked_patch_loss, images, given((*ids.shape, numbers), dtype), ids, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["smooth_l1", "mse"])
def test_masked_feature_loss(loss: str, dtype: torch.dtype) -> None:
    ids, teacher = some_ids(4, 7, 11, length=50, padded=False), torch.randn(7, 50, 190).to(dtype)
    check(masked_feature_loss, given((4, 7, 11, 190), dtype), teacher, ids, loss=loss)


def test_masked_token_cross_entropy() -> None:
    from sslfast.losses.masked.masked_token import masked_token_cross_entropy

    labels = torch.randint(0, 500, (6, 40)).masked_fill(torch.rand(6, 40) < 0.8, -100)
    hidden, weight, bias = (given(s, torch.float32) for s in ((6, 40, 64), (500, 64), (500,)))
    check(masked_token_cross_entropy, hidden, weight, labels, bias=bias, capacity=120)
