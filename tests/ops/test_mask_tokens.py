"""BERT's masking of words: the same bits on every path, the chances that were asked for, whole words, exact counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sslfast
from sslfast import masking
from sslfast.masking import text
from sslfast.ops.mask_tokens import limits_of, mask_tokens

pytestmark = pytest.mark.sanitize

BACKENDS = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MASK, VOCABULARY = 103, 30522
RULES: dict[str, Any] = {"mask_id": MASK, "vocab_size": VOCABULARY}
# Rows of one token, of less and more than a block of four, of the kernels' chunks, and the longest.
LENGTHS = [1, 2, 5, 31, 128, 512, 1024, 1027, 2500]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def batch(rows: int, length: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor, Tensor]:
    """Ids that are never the mask token, some special tokens, and words of one to four tokens, some apart."""
    ids = torch.randint(1000, VOCABULARY, (rows, length)).to(dtype)
    special = torch.rand(rows, length) < 0.15
    words = (torch.rand(rows, length) < 0.6).cumsum(1)
    words = torch.where(torch.rand(rows, length) < 0.05, torch.randint(0, 2**16, (rows, length)), words)
    return ids, special, torch.where(torch.rand(rows, length) < 0.05, -1, words)


def draw(backend: str, ids: Tensor, samples: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    device = device_of(backend)
    samples = torch.arange(len(ids)) if samples is None else samples
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in {**RULES, **options}.items()}
    before = ids.clone()
    with sslfast.use_backend(backend):
        inputs, labels = masking.mask_tokens(ids.to(device), samples.to(device), **options)
    assert inputs.shape == labels.shape == ids.shape and inputs.dtype == labels.dtype == ids.dtype
    assert torch.equal(ids, before)
    return inputs.cpu(), labels.cpu()


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.levels
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_kernel_draws_the_references_bits(exact: bool, dtype: torch.dtype, backend: str) -> None:
    keys = [(0, 0, 0), (-1, 2**32 - 1, 1023), (2**64 - 1, 5, 1), (2**32, 1, 512)]
    for i, length in enumerate(LENGTHS):
        ids, special, words = batch(5, length, dtype)
        samples = torch.tensor([0, 2**32 - 1, 2**63 - 1, -1, -(2**63)])
        seed, epoch, view = keys[i % len(keys)]
        for apart, of_word in ((None, None), (special, None), (None, words), (special, words)):
            options = {"special": apart, "word_ids": of_word, "exact": exact, "probability": (0.15, 0.9)[i % 2]}
            options |= {"seed": seed, "epoch": epoch, "view": view, "mask_share": 0.6, "random_share": 0.3}
            expected = draw("reference", ids, samples, **options)
            assert same(draw(backend, ids, samples, **options), expected), (length, options)
            arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
            host = masking.mask_tokens(ids.numpy(), samples.numpy(), **RULES, **arrays)
            assert all(
                isinstance(h, np.ndarray) and h.dtype == e.numpy().dtype for h, e in zip(host, expected, strict=True)
            )
            assert same((torch.from_numpy(host[0]), torch.from_numpy(host[1])), expected), (length, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_word", [False, True])
def test_chances_are_those_asked_for(by_word: bool, backend: str) -> None:
    """15 %; of these 80, 10 and 10 %; random words are uniform; each within 4.5 standard deviations."""
    ids, special, _ = batch(500, 401)
    n_words = torch.arange(401).expand(500, -1)  # each token its own word: the words' numbers have the same chances
    options = {"special": special, "word_ids": n_words if by_word else None}
    inputs, labels = draw(backend, ids, **options)
    chosen = labels != -100
    assert not (chosen & special).any()
    assert torch.equal(inputs[~chosen], ids[~chosen]) and torch.equal(labels[chosen], ids[chosen])

    def likely(count: int, of: int, p: float) -> bool:
        return abs(count - p * of) <= 4.5 * math.sqrt(of * p * (1 - p))

    assert likely(int(chosen.sum()), int((~special).sum()), 0.15)
    for columns in (chosen[:, j::4][~special[:, j::4]] for j in range(4)):  # no word of a Philox block is different
        assert likely(int(columns.sum()), columns.numel(), 0.15)
    total = int(chosen.sum())
    masked, kept = inputs[chosen] == MASK, inputs[chosen] == ids[chosen]
    assert likely(int(masked.sum()), total, 0.8) and likely(int(kept.sum()), total, 0.1)
    first = inputs[:, 0][chosen[:, 0]] == MASK  # token 0 shares its block's number with its key: not its stream
    assert not first.all() and likely(int(first.sum()), len(first), 0.8)
    random = inputs[chosen][~masked & ~kept].double()
    assert likely(len(random), total, 0.1)
    assert abs(random.mean() - (VOCABULARY - 1) / 2) <= 4.5 * VOCABULARY / math.sqrt(12 * len(random))
    assert random.min() < VOCABULARY * 0.01 and VOCABULARY * 0.99 < random.max() < VOCABULARY
    # Neighbours, rows, and what is chosen and what becomes of it hang together no more than by chance.
    x = chosen.double() - 0.15
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[:, 4:], x[:, :-4])):
        assert abs((a * b).mean()) <= 4.5 * 0.15 * 0.85 / math.sqrt(a.numel()) + 0.15**2 * 0.05
    assert torch.equal(draw(backend, ids, probability=0.0)[0], ids)
    assert (draw(backend, ids, probability=1.0, mask_share=1, random_share=0)[0] == MASK).all()
    two = draw(backend, ids, probability=1.0, mask_share=0.7, random_share=0.3, vocab_size=2)[0]
    assert set(two.unique().tolist()) == {0, 1, MASK}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exact", [False, True])
def test_words_are_chosen_whole(exact: bool, backend: str) -> None:
    ids, special, words = batch(60, 300)
    labels = draw(backend, ids, special=special, word_ids=words, exact=exact)[1]
    chosen, can = labels != -100, ~special & (words >= 0)
    assert not (chosen & ~can).any() and 0.1 < chosen.sum() / can.sum() < 0.2
    for b in range(len(ids)):
        for word in words[b].unique():
            of_word = chosen[b, (words[b] == word) & can[b]]
            assert of_word.all() or not of_word.any()
    parts = chosen & (words == words.roll(1, 1))
    assert parts.any(), "the case was meant to have words of several tokens"


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_counts(backend: str) -> None:
    for length, p in ((1, 0.15), (3, 0.15), (10, 0.15), (10, 0.25), (128, 0.15), (513, 0.5), (64, 1.0)):
        ids, special, _ = batch(40, length)
        labels = draw(backend, ids, special=special, exact=True, probability=p)[1]
        can = (~special).sum(1)
        wanted = torch.floor(p * can.double() + 0.5).clamp_min(1) * (can > 0)
        assert torch.equal((labels != -100).sum(1), wanted.long()), (length, p)
    assert (draw(backend, ids, exact=True, probability=0.0)[1] == -100).all()
    # Each token is chosen equally often.
    often = (draw(backend, ids[:1].expand(4000, -1), torch.arange(4000), exact=True)[1] != -100).double().mean(0)
    assert (often - 10 / 64).abs().max() <= 4.5 * math.sqrt(10 / 64 * 54 / 64 / 4000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_counts_of_words(backend: str) -> None:
    """A word that does not fit is passed over; only where none fits is there one that is longer than the budget."""
    sizes = torch.tensor([7, 1, 5, 1, 9, 2, 3, 12])
    words = torch.arange(8).repeat_interleave(sizes).expand(300, -1)  # 40 tokens, budget 6
    ids = torch.randint(1000, VOCABULARY, words.shape)
    chosen = draw(backend, ids, word_ids=words, exact=True)[1] != -100
    assert (chosen.sum(1) <= 6).all()
    for row in chosen:
        room = 6 - row.sum()
        left = {int(w) for w in words[0]} - {int(w) for w in words[0][row]}
        assert all(sizes[w] > room for w in left), "a word that would have fitted was left out"
    long = torch.arange(4).repeat_interleave(10).expand(200, -1)
    chosen = draw(backend, ids[:200], word_ids=long, exact=True)[1] != -100
    assert (chosen.sum(1) == 10).all() and set(long[0][chosen[0]].tolist()) < {0, 1, 2, 3}
    assert len({int(long[b][chosen[b]][0]) for b in range(200)}) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone(backend: str) -> None:
    ids, special, words = batch(70, 97)
    samples = torch.randint(2**63 - 1, (70,))
    for options in ({}, {"exact": True}, {"word_ids": words}):
        options = {"seed": 3, "special": special, **options}
        whole = draw(backend, ids, samples, **options)
        order = torch.randperm(70)
        for some in (order, order[:1], order[13:50]):
            of_some = {k: v[some] if isinstance(v, Tensor) else v for k, v in options.items()}
            assert same(draw(backend, ids[some], samples[some], **of_some), (whole[0][some], whole[1][some]))
        strided = {k: v.T.contiguous().T if isinstance(v, Tensor) else v for k, v in options.items()}
        assert same(draw(backend, ids.T.contiguous().T, samples, **strided), whole)
        shifted = torch.cat([ids.new_zeros(70, 1), ids], 1)[:, 1:]  # rows that start anywhere
        assert same(draw(backend, shifted, samples, **options), whole)
    first = draw(backend, ids, samples)[1] != -100
    for key in ({"seed": 1}, {"seed": 2**32}, {"epoch": 1}, {"view": 1}):
        other = draw(backend, ids, samples, **key)[1] != -100
        assert 0.15 < (first ^ other).double().mean() < 0.35  # 2 · 0.15 · 0.85
    assert not torch.equal(first, draw(backend, ids, samples + 2**32)[1] != -100)
    for options in ({}, {"exact": True}):
        assert draw(backend, ids[:0], **options)[0].shape == (0, 97)
        assert draw(backend, ids[:, :0], **options)[0].shape == (70, 0)


def test_without_samples_numbers_come_from_torchs_generator() -> None:
    ids, special, _ = batch(8, 200)
    torch.manual_seed(3)
    first, second = (masking.mask_tokens(ids, **RULES) for _ in range(2))
    torch.manual_seed(3)
    again = masking.mask_tokens(ids, **RULES)
    assert same(first, again) and not same(first, second)
    torch.manual_seed(3)
    host = masking.mask_tokens(ids.numpy(), **RULES)
    assert np.array_equal(host[0], first[0].numpy())
    state = torch.get_rng_state()
    for given in (ids, ids.numpy()):
        masking.mask_tokens(given, np.arange(8) if given is not ids else range(8), **RULES)
    assert torch.equal(torch.get_rng_state(), state)  # with samples nothing is drawn from it
    # An integer mask, as tokenizers give it.
    integer = masking.mask_tokens(ids, range(8), special=special.to(torch.int64), **RULES)
    assert same(integer, masking.mask_tokens(ids, range(8), special=special, **RULES))


def test_numpy_without_the_host_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, special, words = (t.numpy() for t in batch(6, 50))
    options = {**RULES, "special": special, "word_ids": words, "exact": True}
    with_host = masking.mask_tokens(ids, np.arange(6), **options)
    monkeypatch.setattr(text._native, "host", None)
    without = masking.mask_tokens(ids, np.arange(6), **options)
    assert all(np.array_equal(a, b) for a, b in zip(with_host, without, strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck_and_compile(backend: str) -> None:
    device = device_of(backend)
    ids, special, words = (t.to(device) for t in batch(4, 33))
    samples = torch.arange(4, device=device)
    for exact in (False, True):
        torch.library.opcheck(
            torch.ops.sslfast.mask_tokens.default,
            (ids, samples, special, words, limits_of(0.15, 0.8, 0.1), MASK, VOCABULARY, -100, exact, -1, 7, 3),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )

    def function(ids: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        return masking.mask_tokens(ids, samples, special=special, word_ids=words, seed=7, **RULES)

    with sslfast.use_backend(backend):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert same(compiled(ids, samples), function(ids, samples))


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        ([[1]], {}, TypeError, "input_ids must be a tensor or a NumPy array, got list"),
        (IDS.double(), {}, TypeError, r"input_ids .*got \[2, 3\] of torch.float64"),
        (IDS[0], {}, TypeError, r"input_ids .*got \[3\]"),
        (IDS.numpy().astype(np.int16), {}, TypeError, r"input_ids .*of int16"),
        (IDS.new_zeros(1, 2**16 + 1), {}, ValueError, "input_ids must have at most 65536 tokens a row, got 65537"),
        (IDS, {"samples": [1]}, ValueError, "samples must be as many as the rows, 2, got 1"),
        (IDS.numpy(), {"samples": np.arange(3)}, ValueError, "samples must be as many as the rows, 2, got 3"),
        (IDS, {"special": IDS[:1]}, ValueError, r"special must be \[2, 3\] of torch.bool on cpu, got \[1, 3\]"),
        (IDS, {"special": [[0]]}, ValueError, r"special must be \[2, 3\], got \[1, 1\]"),
        (IDS.numpy(), {"special": np.zeros((3, 2))}, ValueError, r"special must be \[2, 3\], got \[3, 2\]"),
        (IDS, {"word_ids": IDS + 2**16}, ValueError, "word_ids must be below 65536, got 65536"),
        (IDS.numpy(), {"word_ids": IDS.numpy() + 2**16}, ValueError, "word_ids must be below 65536, got 65536"),
        (IDS, {"probability": 1.5}, ValueError, "probability must be between 0 and 1, got 1.5"),
        (IDS, {"mask_share": float("nan")}, ValueError, "mask_share must be between 0 and 1, got nan"),
        (IDS, {"mask_share": 0.8, "random_share": 0.3}, ValueError, r"mask_share \+ random_share must be at most 1"),
        (IDS, {"mask_id": -1}, ValueError, "mask_id must be a whole number from 0 to 2147483647, got -1"),
        (IDS, {"vocab_size": 0}, ValueError, "vocab_size must be .* got 0"),
        (IDS.numpy(), {"vocab_size": 0}, ValueError, "vocab_size must be .* got 0"),
        (IDS, {"seed": 2**64}, ValueError, "seed must be"),
        (IDS, {"epoch": -1}, ValueError, "epoch must be"),
        (IDS, {"view": 1024}, ValueError, "view must be a whole number from 0 to 1023, got 1024"),
    ],
)
def test_wrong_input(ids: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masking.mask_tokens(ids, **{**RULES, **options})


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_operator_checks_what_it_is_given(backend: str) -> None:
    ids = IDS.to(device_of(backend))
    samples, limits = torch.arange(2, device=ids.device), limits_of(0.15, 0.8, 0.1)

    def call(*arguments: Any) -> Any:
        return torch.ops.sslfast.mask_tokens(*arguments, 1, 2, -100, False, 0, 0, 0)

    with pytest.raises(RuntimeError, match="samples has an unexpected shape"):
        call(ids, samples[:1], None, None, limits)
    with pytest.raises(RuntimeError, match="special must be Bool, got Long"):
        call(ids, samples, ids, None, limits)
    with pytest.raises(RuntimeError, match="word_ids has an unexpected shape"):
        call(ids, samples, None, ids[:, :1], limits)
    with pytest.raises(RuntimeError, match="input_ids must be int64 or int32"):
        call(ids.double(), samples, None, None, limits)
    with pytest.raises(RuntimeError, match="limits must be three numbers"):
        call(ids, samples, None, None, limits[:2])
    with pytest.raises(TypeError, match=r"input_ids must be \[B, S\]"):
        mask_tokens(ids.double(), samples, None, None, limits, **RULES)
