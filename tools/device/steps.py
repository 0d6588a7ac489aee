"""What a stage consists of, and what its steps may use."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (ROOT / "tests", ROOT / "tests" / "helpers")

GREEN, RED, NOT_RUN = "green", "red", "not run"
# Seconds that a step may take, where it says nothing else: the first call of a kernel compiles it.
LIMIT = 60.0


class NotRun(RuntimeError):
    """A step cannot be done here, for the reason in the message."""


@dataclass(frozen=True)
class Step:
    """``run`` returns what is worth noting, and raises where something is wrong; ``seconds``: longer is a hang."""

    name: str
    run: Callable[[], str | None]
    seconds: float = LIMIT


@dataclass
class Context:
    """What the steps of one process know.

    Attributes:
        output: the folder of results.
        rehearse: tiny problems on the CPU, the Triton kernels in the interpreter.
        deadline: of the stage, on ``time.monotonic()``'s clock.
        emit: sends an event to the parent process.
    """

    output: Path
    rehearse: bool = False
    deadline: float = float("inf")
    emit: Callable[[dict[str, Any]], None] = field(default=lambda event: None)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        """Seconds until the stage must end."""
        return self.deadline - time.monotonic()

    def result(self, name: str, status: str, detail: str = "") -> None:
        """One more result beside the step's own: a failed test, a launch with an error."""
        self.emit({"event": "end", "step": name, "status": status, "detail": detail, "seconds": 0.0})

    def row(self, row: dict[str, Any]) -> None:
        """A row of the CSV of results."""
        self.emit({"event": "row", "row": row})

    def sweep(self, **found: Any) -> None:
        """What one configuration took."""
        self.emit({"event": "sweep", "found": found})


def with_tests_on_path() -> None:
    """The lists of cases and the error budget are those of the tests."""
    sys.path += [str(folder) for folder in TESTS if str(folder) not in sys.path]
