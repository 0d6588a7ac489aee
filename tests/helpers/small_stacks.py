"""Runs everything public on the CPU kernels in a thread with a small stack, forward and backward:

    OMP_STACKSIZE=64k python -m small_stacks

prints the operations that a CPU kernel served. A process of its own: where a stack is too small, it dies.
"""

from __future__ import annotations

import itertools
import json
import threading
import warnings
from collections.abc import Callable

import torch

from fake_cuda import CASES
from fake_cuda.inputs import Case, Inputs
from fake_cuda.worker import tensors
from sslfast import NormalizedPrototypes, _backends, masking, sigreg
from sslfast.ops.gram_anchor import gram_anchor
from sslfast.ops.koleo import koleo
from sslfast.ops.l2_normalize import l2_normalize
from sslfast.ops.nearest_neighbours import nearest_neighbours
from sslfast.ops.negative_cosine import negative_cosine
from sslfast.ops.neighbour_distance import neighbour_distance
from sslfast.ops.nt_xent import nt_xent
from sslfast.ops.prototype_columns import TeacherRows, visit
from sslfast.ops.prototype_cross_entropy import prototype_cross_entropy
from sslfast.ops.second_moment import second_moment
from sslfast.ops.similarity_logsigmoid import similarity_logsigmoid
from sslfast.ops.similarity_lse import similarity_lse, similarity_terms

STACK = 64 * 1024
M, F, IMAGES = 400, 64, 64  # rows, features and images that are work for several threads
# The other threads' stacks are OpenMP's.
LARGE: dict[str, Case] = {
    "prototype_cross_entropy": lambda x: prototype_cross_entropy(
        x.z(3, M, F), x.fixed(2, M, F), NormalizedPrototypes(x.z(4 * M, F), x.z(4 * M)), x.fixed(4 * M, F)
    ),
    "prototype_columns": lambda x: (
        visit(TeacherRows.of(x.fixed(M, F), x.fixed(4 * M, F), 0.1, None), x.fixed(4 * M), by_row=True).column_lse
    ),
    "nt_xent": lambda x: nt_xent(x.z(M, F), x.z(M, F), 0.01),
    "similarity_terms": lambda x: similarity_terms(
        x.z(M, F), x.z(M, F), 5.0, columns=True, positives=x.ids(M), hardest=True, row_ids=x.ids(M), col_ids=x.ids(M)
    ),
    "similarity_terms, large logits": lambda x: similarity_terms(x.z(M, F), x.z(M, F), 50.0, columns=True),
    "similarity_lse, fixed keys": lambda x: similarity_lse(x.z(M, F), x.fixed(4 * M, F), 5.0, bias=x.fixed(4 * M)),
    "similarity_lse of rows with themselves": lambda x: _self_lse(x),
    "similarity_logsigmoid": lambda x: similarity_logsigmoid(x.z(M, F), x.z(M, F), 5.0, -5.0),
    "l2_normalize": lambda x: l2_normalize(x.z(4 * M, F)),
    "characteristic_sums, unit_slices": lambda x: sigreg(x.z(2, M, F), num_vectors=3 * F),
    "gram_anchor": lambda x: gram_anchor(x.z(16, M, F), x.fixed(16, M, F)),
    "gram_anchor, one image": lambda x: gram_anchor(x.z(1, M, F), x.fixed(1, M, F)),
    "negative_cosine": lambda x: negative_cosine(x.z(4 * M, F), x.z(4 * M, F)),
    "nearest_neighbours": lambda x: nearest_neighbours(x.z(M, F), x.z(M, F), 70),
    "nearest_neighbours of rows among themselves": lambda x: nearest_neighbours(x.z(2 * M, F), None, 70),
    "nearest_neighbours by distance": lambda x: nearest_neighbours(x.z(2 * M, F), x.z(M, F), metric="euclidean"),
    "neighbour_distance": lambda x: neighbour_distance(x.z(M, F), x.z(M, F), x.ids(M, 3)),
    "koleo": lambda x: koleo(x.z(2 * M, F), 3, 1e-8),
    **{
        f"second_moment, {form}, {cross}": lambda x, form=form, cross=cross: second_moment(  # type: ignore[misc]
            x.z(M, 6 * F), x.z(M, 6 * F), cross=cross, scale="variance", form=form
        )
        for form, cross in itertools.product(("dual", "primal"), (False, True))
    },
    "embed_patches": lambda x: masking.embed_patches(
        x.z(IMAGES, 3, 16, 16), x.ids(IMAGES, 9), weight=x.z(F, 3, 4, 4), patch_size=4, position=x.z(16, F)
    ),
    "gather_tokens": lambda x: masking.gather_tokens(
        x.z(IMAGES, 16, 4 * F), x.ids(IMAGES, 9), position=x.z(16, 4 * F), prefix=x.z(1, 4 * F)
    ),
    "scatter_tokens": lambda x: masking.scatter_tokens(x.z(IMAGES, 9, 4 * F), x.ids(IMAGES, 16), x.z(4 * F)),
    "random_masks": lambda x: masking.random_masks(x.ids(4 * IMAGES), (28, 28)),
    "block_masks": lambda x: masking.block_masks(x.ids(IMAGES), grid=(28, 28), count=300),
    "mask_tokens": lambda x: masking.mask_tokens(x.ids(IMAGES, 512), x.ids(IMAGES), mask_id=1, vocab_size=600),
    "mask_tokens, exact": lambda x: masking.mask_tokens(
        x.ids(IMAGES, 4096), x.ids(IMAGES), mask_id=1, vocab_size=600, exact=True
    ),
}


def _self_lse(x: Inputs) -> torch.Tensor:
    z, ids = x.z(M, F), x.ids(M)
    return similarity_terms(z, z, 5.0, row_ids=ids, col_ids=ids, positives=ids.roll(1), hardest=True).row_lse


def step(case: Case, dtype: torch.dtype) -> None:
    learning = [t for t in tensors(case(Inputs(torch.device("cpu"), dtype, True))) if t.requires_grad]
    if learning:
        torch.autograd.backward(learning, [torch.ones_like(t) for t in learning])


def in_small_thread(function: Callable[[], None]) -> None:
    """Threads are made with the stack that is asked for; an exception of the thread is the caller's."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    before = threading.stack_size(STACK)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if raised:
        raise raised[0]


def main() -> None:
    warnings.simplefilter("ignore")
    served: set[str] = set()
    choose = _backends.select

    def choose_and_record(op: str, preferred: str, why_not: Callable[[str], str | None]) -> str:
        backend = choose(op, preferred, why_not)
        if backend == "cpu":
            served.add(op)
        return backend

    _backends.select = choose_and_record
    in_small_thread(lambda: torch.mm(torch.ones(M, F), torch.ones(F, M)))  # plain PyTorch does
    for dtype in (torch.float32, torch.float64):
        for name, case in (*CASES.items(), *LARGE.items()):
            print(name, dtype, flush=True)  # the last of these is the one that died
            try:
                step(case, dtype)  # Python's imports and caches, which a first call fills, take more than this stack
            except TypeError:  # a call that mixes dtypes, or is not for float64
                continue
            in_small_thread(lambda case=case, dtype=dtype: step(case, dtype))  # type: ignore[misc]
    print(json.dumps(sorted(served)))


if __name__ == "__main__":
    main()
