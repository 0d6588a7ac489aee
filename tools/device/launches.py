"""The program that runs under compute-sanitizer: small calls, each announced, so that an error has a name.

python -m tools.device.launches operators --seconds 60      every CUDA operator, the cases of tests/cuda_cases
python -m tools.device.launches triton                      three Triton launches
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import sslfast

from .steps import with_tests_on_path

MARK = "### "  # begins the line that announces a case
DONE = "### done"


def cases_in_turns() -> Iterator[Any]:
    """The first case of each operator, then the second: when the time is up, every operator has had some."""
    with_tests_on_path()
    from cuda_cases import cases

    groups: dict[tuple[str, ...], list[Any]] = {}
    for case in cases():
        groups.setdefault(case.operators, []).append(case)
    turns = itertools.zip_longest(*groups.values())
    return (case for turn in turns for case in turn if case is not None)


def operators(device: str, seconds: float, most: int | None) -> str:
    begin, count = time.monotonic(), 0
    for case in itertools.islice(cases_in_turns(), most):
        if time.monotonic() - begin > seconds:
            return f"{count} cases, then the time was up"
        announce(f"{case.name} [{', '.join(case.operators)}]")
        case.prepare(device)()
        finish(device)
        count += 1
    return f"{count} cases"


def triton(device: str) -> str:
    z = torch.randn(40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    for name, loss in (
        ("nt_xent", lambda: sslfast.nt_xent(z, z.flip(0), 0.5)),
        ("clip", lambda: sslfast.clip(z, z.flip(0), 5.0)),
        ("barlow_twins", lambda: sslfast.barlow_twins(z, z.flip(0))),
    ):
        announce(name)
        torch.autograd.grad(loss(), z)
        finish(device)
    return "3 losses"


def announce(name: str) -> None:
    print(f"{MARK}{name}", flush=True)


def finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.device.launches", description=__doc__)
    parser.add_argument("what", choices=("operators", "triton"))
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no further case begins (default: 60)")
    parser.add_argument("--most", type=int, help="cases (default: all)")
    options = parser.parse_args(arguments)
    done = triton(options.device) if options.what == "triton" else operators(
        options.device, options.seconds, options.most
    )  # fmt: skip
    print(f"{DONE}: {done}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
