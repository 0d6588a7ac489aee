"""Extra peak memory of one measured call: in a fresh process, or on a GPU in this one."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace
from typing import Any

import torch

from . import Failed, Unavailable, machine as machine_module
from .harness import Case, discover
from .machine import MIB, ROOT

SECONDS = 240

# Why a measurement may be missing without anything being wrong.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
ABSENT = (Unavailable, *OUT_OF_MEMORY)


def peak_mib(case: Case, provider: str) -> float:
    """Extra peak memory of one measured call in a fresh process, in MiB (what counts: ``peak_extra_bytes``).

    Raises:
        Unavailable: the provider cannot run, runs out of memory, or the system cannot say.
        Failed: the provider failed otherwise.
    """
    request = json.dumps({"case": asdict(case), "provider": provider})
    environment = {**os.environ, **machine_module.ALLOCATOR_ENVIRONMENT, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-c", f"from {__name__} import memory_worker; memory_worker()", request]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took more than {SECONDS} s") from error
    if done.returncode == -9:
        raise Unavailable("killed by the system, out of memory")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failed(f"the measuring process ended with status {done.returncode}: {last}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise Failed(answer["error"])
    if "unavailable" in answer:
        raise Unavailable(answer["unavailable"])
    return answer["bytes"] / MIB


def memory_worker() -> None:
    """The fresh process of ``peak_mib``: reads the request from its first argument, prints the answer as JSON.

    The warm-up on a tiny problem loads code and thread pools but nothing of the problem's size, so that whatever a
    package keeps for later counts. A compiled function is warmed up on the problem itself: its code exists only then.
    """
    request = json.loads(sys.argv[1])
    case, provider = Case(**request["case"]), request["provider"]
    bench = discover()[case.op]
    try:
        measured = bench.setup(case, provider)
        tiny = replace(case, shape={**case.shape, **bench.TINY})
        warm_up = measured if provider == "compile" else bench.setup(tiny, provider)
        warm_up()
        del warm_up
        gc.collect()
        answer: dict[str, Any] = {"bytes": machine_module.peak_extra_bytes(case.device, measured)}
    except (*ABSENT, OSError) as error:
        answer = {"unavailable": reason(error)}
    except Exception as error:
        answer = {"error": reason(error)}
    print(json.dumps(answer))


def reason(error: BaseException) -> str:
    """One line that names the error: the first of its message, without what makes it longer than a line."""
    first = textwrap.shorten((str(error).strip().splitlines() or [""])[0], 160, placeholder=" …")
    return first if isinstance(error, Failed | Unavailable) else f"{type(error).__name__}: {first}"
