"""Every case on a device, twice, against the CPU; a line for each that is wrong; exit status 1 if there is one."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from . import Case, cases_with, difference, number_wrong, same_bits


def fault_of(case: Case, device: str) -> str | None:
    """What is wrong with the case on ``device``, or ``None``."""
    call = case.prepare(device)
    first, second = call(), call()
    if wrong := difference(case, first, case.run("cpu")):
        return wrong
    return None if same_bits(first, second) else "other bits in the second run"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cuda_cases", description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or operators contain it")
    parser.add_argument("--list", action="store_true", help="print names and operators, run nothing")
    options = parser.parse_args()
    chosen = cases_with(options.only)
    if options.list:
        for case in chosen:
            print(f"{case.name}  [{', '.join(case.operators)}]")
        return 0
    begin = time.monotonic()
    wrong = number_wrong(chosen, lambda case: fault_of(case, options.device))
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
    operators = {name for case in chosen for name in case.operators}
    seconds = time.monotonic() - begin
    print(f"{len(chosen)} cases of {len(operators)} operators on {options.device}: {wrong} wrong, {seconds:.1f} s")
    return int(wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
