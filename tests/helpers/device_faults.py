"""Steps that go wrong in every way there is, for the tests of ``tools.device``."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import types

from tools.device.steps import Context, NotRun, Step


def steps(context: Context) -> list[Step]:
    return [
        Step("fine", lambda: "noted"),
        Step("raises", raises),
        Step("runs out of memory", out_of_memory),
        Step("cannot be done here", absent),
        Step("hangs", lambda: hang(context), seconds=1.0),
        Step("takes its process along", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        Step("leaves the process", lambda: os._exit(3)),
        Step("breaks the device", broken),
        Step("is done in a new process", lambda: f"after {'torch' in sys.modules}"),
        Step("has rows", lambda: rows(context)),
        Step("last", lambda: None),
    ]


def raises() -> str:
    raise ValueError("the first line\nand another")


def out_of_memory() -> str:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB")


def absent() -> str:
    raise NotRun("there is no such device")


def hang(context: Context) -> str:
    child = subprocess.Popen(["sleep", "600"])
    (context.output / "child").write_text(str(child.pid))
    time.sleep(600)
    return "never"


def broken() -> str:
    """An error after which the device answers no more; the process goes on with it unless it is ended."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sys.modules["torch"] = types.ModuleType("torch")
    sys.modules["torch"].cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    synchronize()
    return "never"


def rows(context: Context) -> str:
    for provider, ms in (("sslfast", "2"), ("eager", "6")):
        row = {"op": "clip", "provider": provider, "mode": "both", "dtype": "bfloat16", "shape": '{"N": 8}'}
        context.row({**row, "metric": "time_ms", "p20": "1", "p50": ms, "p80": "9", "device": "NVIDIA H200"})
    context.sweep(sweep="tiles", config="64×64", ms=1.0, now=False)
    context.sweep(sweep="tiles", config="128×64", ms=2.0, now=True)
    context.result("one more", "red", "found on the way")
    return ""


def slow(context: Context) -> list[Step]:
    return [Step(f"step {i}", functools.partial(time.sleep, 600 * bool(i)), 900.0) for i in range(3)]
