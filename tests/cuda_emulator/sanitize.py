"""Running the emulated kernels under AddressSanitizer or ThreadSanitizer, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from . import LIBRARY
from .build import HERE, ROOT, build, compiler

_OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0:detect_stack_use_after_return=0"},
    # Only what is instrumented, the kernels: torch is not. Each launch at an address is another story.
    "thread": {"TSAN_OPTIONS": "halt_on_error=0:ignore_noninstrumented_modules=1:suppress_equal_addresses=0"},
}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
_REPORT = re.compile(r"ERROR: AddressSanitizer: [\w-]+|WARNING: ThreadSanitizer: [\w ]+|runtime error: .*")


def run_under(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m cuda_emulator`` with these arguments; output and errors together in ``stdout``."""
    gxx = compiler()
    library = build(sanitizer)
    assert gxx is not None
    runtimes = [subprocess.check_output([gxx, f"-print-file-name={name}"], text=True) for name in _RUNTIMES[sanitizer]]
    environment = {
        **os.environ,
        **_OPTIONS[sanitizer],
        LIBRARY: str(library),
        "LD_PRELOAD": ":".join(name.strip() for name in runtimes),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(HERE.parent), str(HERE.parent / "helpers"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, "-m", "cuda_emulator", *arguments]
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path.cwd()
    )


def reports(output: str) -> list[str]:
    """What the sanitizer has found, without addresses."""
    return _REPORT.findall(output)
