"""The process that runs steps: ``python -m tools.device.worker`` with one argument, a request in JSON.

It tells its parent through a pipe what it is going to do, what it starts and how it ended, so that the parent knows
which step hangs or took the process along.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .steps import GREEN, NOT_RUN, RED, Context, NotRun, Step

BROKEN = 70  # exit status: the device's context is lost, the rest needs a new process
PATIENCE = 20  # by how much longer a step may take in a rehearsal: a busy CPU is no GPU
LONGEST = 4000  # characters of a detail: the end of a traceback says most


def outcome(step: Step) -> tuple[str, str]:
    """(status, detail) of one step, whatever it raises, be it when the device is waited for."""
    try:
        detail = str(step.run() or "")
        settle()
        return GREEN, detail
    except NotRun as reason:
        return NOT_RUN, str(reason)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            return RED, f"out of memory: {error}"
        return RED, traceback.format_exc()


def settle() -> None:
    """Wait for the device, so that an error is the step's that made it, and give back the memory that the step held."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


def recovered() -> bool:
    """Whether the device still answers; after an illegal access, for one, every later call fails."""
    try:
        settle()
    except Exception:
        return False
    return True


def load(target: str) -> Callable[[Context], list[Step]]:
    """``module:function`` that makes the steps."""
    module, _, function = target.partition(":")
    found: Callable[[Context], list[Step]] = getattr(importlib.import_module(module), function)
    return found


def main() -> int:
    request = json.loads(sys.argv[1])
    pipe = os.fdopen(request["pipe"], "w", buffering=1)

    def emit(event: dict[str, Any]) -> None:
        pipe.write(json.dumps(event) + "\n")

    deadline = time.monotonic() + request["seconds"]
    context = Context(Path(request["output"]), request["rehearse"], deadline, emit)
    steps = [step for step in load(request["target"])(context) if request["only"] in step.name]
    steps = steps[request["shard"] :: request["shards"]]
    emit({"event": "plan", "steps": [step.name for step in steps]})
    for step in steps:
        if step.name in request["done"]:
            continue
        if context.left() <= 0:
            break
        print(f"--- {step.name}", flush=True)
        emit({"event": "start", "step": step.name, "limit": step.seconds * (PATIENCE if context.rehearse else 1)})
        begin = time.monotonic()
        status, detail = outcome(step)
        if status == RED:
            print(detail, flush=True)
        seconds = round(time.monotonic() - begin, 3)
        short = detail if len(detail) <= LONGEST else f"… {detail[-LONGEST:]}"
        emit({"event": "end", "step": step.name, "status": status, "detail": short, "seconds": seconds})
        if status == RED and not recovered():
            return BROKEN
    emit({"event": "finished"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
