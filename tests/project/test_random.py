"""The random numbers that depend on who draws them: Philox, ranges, and the table of streams."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sslfast
from sslfast._random.philox import LOW, philox, uniforms
from sslfast._random.streams import EACH, FIRST, LAST, STREAMS, stream_of
from sslfast.reference.philox import philox4x32

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_uniforms_are_the_references_philox(seed: int) -> None:
    ids = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 123456789012345])
    samples = ids.numpy().astype(np.uint64)
    for epoch, stream, count in itertools.product((0, 2**32 - 1), (2**15, 2**16 - 1), (1, 4, 10)):
        got = uniforms(ids, count, seed=seed, epoch=epoch, stream=stream)
        words = [
            philox4x32(
                (block | stream << 16, epoch, samples & np.uint64(LOW), samples >> np.uint64(32)),
                (seed & LOW, seed >> 32 & LOW),
            )
            for block in range((count + 3) // 4)
        ]
        expected = np.stack(words).transpose(2, 0, 1).reshape(len(ids), -1)[:, :count] * 2.0**-32
        assert got.dtype == torch.float64 and np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_integers_and_tensors_draw_alike(seed: int) -> None:
    for counter in itertools.product((0, 1, LOW), repeat=4):
        words = philox(counter, seed)
        assert words == tuple(int(word) for word in philox([torch.tensor(c) for c in counter], seed))
        key = (seed & LOW, seed >> 32)
        assert words == tuple(int(word) for word in philox4x32(tuple(np.uint64(c) for c in counter), key))


def test_ranges_are_checked() -> None:
    ids = torch.arange(3)
    assert uniforms(ids, 2**18, stream=FIRST).unique().numel() > 3 * 2**18 - 200  # no block twice
    for wrong in (dict(seed=2**64), dict(epoch=-1), dict(epoch=2**32), dict(stream=FIRST - 1), dict(stream=LAST + 1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            uniforms(ids, 4, **{"stream": FIRST, **wrong})
    with pytest.raises(ValueError, match="count"):
        uniforms(ids, 2**18 + 1, stream=FIRST)


def test_no_two_uses_share_a_stream() -> None:
    used = [number for numbers in STREAMS.values() for number in numbers]
    assert len(used) == len(set(used)) and min(used) >= FIRST and max(used) <= LAST
    with pytest.raises(IndexError):
        stream_of("rotation", 1)


def test_cpp_has_the_same_streams() -> None:
    header = (ROOT / "csrc/common/streams.h").read_text()
    found = {name: int(group) for name, group in re.findall(r"k(\w+)Stream = stream_of_each_view\((\d+)\)", header)}
    assert len(found) >= 5
    for name, group in found.items():
        snake = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        assert STREAMS[snake] == range(FIRST + group * EACH, FIRST + (group + 1) * EACH)


def test_streams_are_numbered_nowhere_else() -> None:
    """A number of a stream that stands by itself is one that the table does not know."""
    for folder, pattern in (("sslfast", "*.py"), ("csrc", "*.h"), ("csrc", "*.cpp"), ("csrc", "*.cu")):
        for path in (ROOT / folder).rglob(pattern):
            if path.name not in ("streams.py", "streams.h"):
                assert not re.search(r"(2\*\*15|1u? << 15)\)? *\+ *\(\d+u? << 10\)", path.read_text()), path


def test_masks_of_one_sample_share_no_number_with_one_another() -> None:
    """Ratios of a batch and sizes of blocks were drawn from one stream once, apart by the number of a block alone."""
    ids = torch.arange(1000)
    drawn = [uniforms(ids, 4, stream=numbers[0]) for numbers in STREAMS.values()]
    assert torch.cat(drawn).flatten().unique().numel() > 0.999 * sum(x.numel() for x in drawn)
    assert sslfast.masking.multiblock_masks([0], grid=(14, 14), context_size=28).context.shape == (1, 28)
