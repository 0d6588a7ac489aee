"""Every case of ``cuda_cases`` by the emulated kernels: as on the CPU, and the same bits in every order of threads."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from cuda_cases import cases_with, number_wrong

from . import RUNS, SANITIZERS, fault_of, selftest
from .sanitize import reports, run_under


def main() -> int:
    parser = argparse.ArgumentParser(prog="PYTHONPATH=tests:tests/helpers python -m cuda_emulator", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or operators contain it")
    parser.add_argument("--sanitizer", choices=SANITIZERS, help="run under it; what it reports is a fault")
    parser.add_argument("--runs", type=int, default=len(RUNS), help=f"orders of threads; default: {len(RUNS)}")
    parser.add_argument("--selftest", nargs="*", metavar="KERNEL", help="run these kernels of selftest.cu, no case")
    options = parser.parse_args()
    if options.sanitizer is not None:
        done = run_under(options.sanitizer, f"--only={options.only}", f"--runs={options.runs}")
        print(done.stdout, end="")
        found = reports(done.stdout)
        print(f"{len(found)} reports of the {options.sanitizer} sanitizer")
        return int(done.returncode != 0 or bool(found))
    if options.selftest is not None:
        for name in options.selftest:
            print(f"selftest {name}", flush=True)  # before what a sanitizer says of it
            selftest(name, torch.ones(256), "random")
        return 0
    begin, chosen = time.monotonic(), cases_with(options.only)
    wrong = number_wrong(chosen, lambda case: fault_of(case, options.runs))
    print(f"{len(chosen)} cases, emulated: {wrong} wrong, {time.monotonic() - begin:.1f} s")
    return int(wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
