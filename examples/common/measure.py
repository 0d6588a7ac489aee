"""Time and memory of a loss alone, forward and backward, from embeddings that lie in memory; peak memory of any work.

``python -m examples.common.measure FILE`` is the worker that one measurement of memory runs in.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Loss = Callable[[Tensor, Tensor], Tensor]

ROOT = Path(__file__).resolve().parents[2]
# Gradients of two float32 implementations may differ by rounding, not by more than this part of their norm.
AGREEMENT = 1e-4
ROUNDS_LEAST, ROUNDS_MOST, ROUNDS_SECONDS = 3, 30, 12.0
WARM_UP = 16


@dataclass(frozen=True)
class Cost:
    """What one step (forward and backward) of each loss costs at one size.

    Attributes:
        pairs: N, the images a batch.
        width: D, of their embeddings.
        seconds: the median time of a step, by the loss's name.
        quartiles: the first and third quartile of the times.
        peak_bytes: extra peak memory; ``None`` where the system does not tell.
        gradient_difference: ‖difference of the losses' gradients‖ / ‖gradient‖, or ``None`` with one loss.
    """

    pairs: int
    width: int
    seconds: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    peak_bytes: dict[str, int | None]
    gradient_difference: float | None


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def serving_backend(loss: Loss, operators: Mapping[str, str], z0: Tensor, z1: Tensor) -> str:
    """The backend that serves ``loss(z0, z1)``, seen from the operators that it calls.

    Args:
        operators: the backend's name for each operator that gives it away.

    Returns:
        One of the names, or ``"reference"`` if none of the operators was called.
    """
    with torch.no_grad():
        seen = operators_of(partial(loss, z0, z1))
    return next((name for operator, name in operators.items() if operator in seen), "reference")


def operators_of(work: Callable[[], object]) -> set[str]:
    """The names of the operators that ``work()`` calls, such as ``aten::mm``."""
    with _Operators() as seen:
        work()
    return seen.names


def step(loss: Loss, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the gradients of both [N, D] inputs."""
    z0, z1 = (z.detach().requires_grad_() for z in (z0, z1))
    grads = torch.autograd.grad(loss(z0, z1), (z0, z1))
    return grads[0], grads[1]


def cost(losses: Mapping[str, Loss], z0: Tensor, z1: Tensor) -> Cost:
    """Measure the losses at one batch, after checking that they compute the same gradient.

    Each round times every loss once, so that what disturbs the machine disturbs all of them. Rounds go on for about 12
    seconds, at least 3 and at most 30 of them.

    Args:
        losses: by name; they can be pickled (the memory is measured in another process).
        z0, z1: [N, D] float32 embeddings.

    Raises:
        RuntimeError: the gradients of two losses differ, so that comparing their cost would mean nothing.
    """
    difference = _gradient_difference(losses, z0, z1)
    if difference is not None and not difference <= AGREEMENT:
        raise RuntimeError(f"the losses {', '.join(losses)} disagree: their gradients differ by {difference:.1e}")
    times: dict[str, list[float]] = {name: [] for name in losses}
    start = time.perf_counter()
    for done in range(ROUNDS_MOST):
        if done >= ROUNDS_LEAST and time.perf_counter() - start > ROUNDS_SECONDS:
            break
        for name, loss in losses.items():
            before = time.perf_counter()
            step(loss, z0, z1)
            times[name].append(time.perf_counter() - before)
    quartiles = {name: statistics.quantiles(each, n=4, method="inclusive") for name, each in times.items()}
    return Cost(
        pairs=z0.shape[0],
        width=z0.shape[1],
        seconds={name: q[1] for name, q in quartiles.items()},
        quartiles={name: (q[0], q[2]) for name, q in quartiles.items()},
        peak_bytes={name: peak_memory(loss, z0, z1) for name, loss in losses.items()},
        gradient_difference=difference,
    )


def _gradient_difference(losses: Mapping[str, Loss], z0: Tensor, z1: Tensor) -> float | None:
    """The largest relative difference from the last loss's gradient; also every loss's first, untimed call."""
    grads = [torch.cat(step(loss, z0, z1)).double() for loss in losses.values()]
    if len(grads) < 2:
        return None
    return max(((grad - grads[-1]).norm() / grads[-1].norm()).item() for grad in grads[:-1])


def peak_memory(loss: Loss, z0: Tensor, z1: Tensor) -> int | None:
    """Extra peak memory of one step, as ``peak_memory_of`` measures it."""
    small = (z[:WARM_UP, :WARM_UP].clone() for z in (z0, z1))
    return peak_memory_of(partial(step, loss, z0, z1), partial(step, loss, *small))


def peak_memory_of(work: Callable[[], object], small: Callable[[], object]) -> int | None:
    """Extra peak memory of ``work()``, in bytes, measured in a fresh process; ``None`` where the system does not tell.

    Args:
        work: what is measured; it can be pickled.
        small: the same, much smaller: called first, for threads, libraries and their tables are the process's cost and
            not the work's. A matrix that it frees can stay with the process, and would not be counted again.

    Raises:
        RuntimeError: the process failed (killed for want of memory, for one).
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "work.pickle"
        file.write_bytes(pickle.dumps((work, small)))
        # The worker imports what the work is made of by name, hence the repository's root as its folder.
        command = [sys.executable, "-m", "examples.common.measure", str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory failed, status {done.returncode}: {done.stderr[-800:]}")
    told = done.stdout.split()[-1]
    return None if told == "unknown" else int(told)


def _resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _worker(file: str) -> None:
    work, small = pickle.loads(Path(file).read_bytes())
    small()
    try:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now, proc(5)
    except OSError:
        print("unknown")
        return
    work()
    print(max(0, _resident("VmHWM") - before))


if __name__ == "__main__":
    _worker(*sys.argv[1:])
