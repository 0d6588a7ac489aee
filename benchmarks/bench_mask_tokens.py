"""BERT's masking of words beside the steps of transformers' collator; ``rows`` × ``S`` ids of a vocabulary of ``V``.

Every run draws anew. What is compared with the truth is therefore how often each thing happens, and that nothing
happens to special tokens and to those that were not chosen.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sslfast.masking import mask_tokens

from .contrastive import generator
from .harness import CALL, Case, Work, require_backend
from .text_peers import hf_mask_tokens

BASELINES = ("transformers",)
PROVIDERS = (*BASELINES, "sslfast")
TINY = {"rows": 64, "S": 128, "V": 1000}
MASK_ID, PROBABILITY = 103, 0.15

# Shares of at least 1,200 chosen tokens: the rarest, a tenth of them, has a standard deviation of 9 %.
CHANCE = 0.3
# Of 19,600 chosen ones 2 %.
CHANCE_OF_MANY = 0.1


def cases(device: str, quick: bool) -> list[Case]:
    """256 rows of 512 ids."""
    return [Case("mask_tokens", {"rows": 256, "S": 512, "V": 30522}, "int64", CALL, device)]


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    """ids [rows, S], and which of them are special: the first and the last, and padding of an eighth on average."""
    rows, length = case.shape["rows"], case.shape["S"]
    draw = generator()
    ids = torch.randint(case.shape["V"], (rows, length), generator=draw)
    end = torch.randint(3 * length // 4, length, (rows, 1), generator=draw)
    place = torch.arange(length)
    return ids, (place == 0) | (place >= end)


def setup(case: Case, provider: str) -> Work:
    """The closure of one provider: (inputs, labels) of the ids, new ones each time.

    The collator works on the CPU, on ids that it may write to: a copy of them is made beforehand, and for a GPU what it
    makes is copied there.
    """
    ids, special = _inputs(case)
    work = _sslfast(case, ids, special) if provider == "sslfast" else _collator(case, ids, special)

    def proof() -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return rates(ids, special, *(result.cpu() for result in work()))

    return Work(work.prepare, work.run, proof, CHANCE_OF_MANY if ids.numel() >= 2**17 else CHANCE)


def _collator(case: Case, ids: Tensor, special: Tensor) -> Work:
    def run(own: Tensor) -> tuple[Tensor, ...]:
        made = hf_mask_tokens(own, special, MASK_ID, case.shape["V"], PROBABILITY)
        return tuple(result.to(case.device) for result in made)

    return Work(ids.clone, run)


def _sslfast(case: Case, ids: Tensor, special: Tensor) -> Work:
    samples, epochs = torch.arange(len(ids)).to(case.device), itertools.count()
    ids, special = ids.to(case.device), special.to(case.device)

    def run(epoch: int) -> tuple[Tensor, ...]:
        return mask_tokens(
            ids,
            samples,
            mask_id=MASK_ID,
            vocab_size=case.shape["V"],
            probability=PROBABILITY,
            special=special,
            epoch=epoch,
        )

    require_backend(lambda: run(0), "cuda" if case.device == "cuda" else "cpu")
    return Work(lambda: next(epochs), run)


def rates(ids: Tensor, special: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Shares: of candidates chosen; of these masked, replaced by others, left; of all ids those treated right."""
    chosen = labels != -100
    masked, same = inputs == MASK_ID, inputs == ids
    right = torch.where(chosen, ~special & (labels == ids), same)
    shares = [chosen[~special], masked[chosen], (~masked & ~same)[chosen], (same & ~masked)[chosen]]
    return (*(share.double().mean() for share in shares), right.all().double())


def truth(case: Case) -> tuple[Tensor, ...]:
    """The shares as they are defined: 15 %, of these 80 %, 10 % and 10 %, and everything right."""
    shares = (PROBABILITY, 0.8, 0.1, 0.1, 1.0)
    return tuple(torch.tensor(share, dtype=torch.float64) for share in shares)


def cost(case: Case) -> tuple[float, float]:
    """Ids read, inputs and labels written, eight bytes each, and a byte of what is special."""
    return 0.0, 25.0 * case.shape["rows"] * case.shape["S"]


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Nothing is skipped."""
    return None
