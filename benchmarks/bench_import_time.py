"""What ``import sslfast`` costs over ``import torch``: a fresh interpreter each, from its start to its end."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from .harness import CALL, Case, Work
from .machine import ROOT

PROVIDERS = ("torch", "sslfast")
BASELINES = ("torch",)
TINY: dict[str, int] = {}


def cases(device: str, quick: bool) -> list[Case]:
    return [Case("import_time", {}, mode=CALL, device=device)]


def setup(case: Case, provider: str) -> Work:
    """A process that imports the package and ends; its status is the result."""

    def run(_: None) -> tuple[Tensor, ...]:
        done = subprocess.run([sys.executable, "-c", f"import {provider}"], cwd=ROOT, check=False)
        return (torch.tensor(float(done.returncode)),)

    return Work(lambda: None, run)


def truth(case: Case) -> tuple[Tensor, ...]:
    """Status 0."""
    return (torch.zeros((), dtype=torch.float64),)


def cost(case: Case) -> tuple[float, float]:
    """Nothing has to be computed."""
    return 0.0, 0.0


def why_skip(case: Case, provider: str, metric: str) -> str | None:
    """Memory is that of another process."""
    return "the imports are another process's" if metric == "peak_mib" else None
