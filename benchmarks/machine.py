"""The machine under test: its name and versions, its measured peaks, one timed sample, one peak of memory."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sslfast

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20

# One product of the fp32 micro-kernel: both operands and the result stay in a core's own cache (about 0.4 MiB).
TILE = (192, 192, 128)
PEAK_TRIALS = 5


# ---------------------------------------------------------------------------------------------------------- identity


@dataclass(frozen=True)
class Machine:
    """What every row of the CSV says about where it was measured; no host name, no path."""

    device: str
    threads: int
    driver: str
    torch: str
    triton: str
    sslfast: str
    commit: str
    command: str

    @property
    def slug(self) -> str:
        """File name of this machine's results, e.g. ``cpu-amd-epyc-2-threads`` or ``nvidia-h100-80gb-hbm3``."""
        name = self.device if self.driver else f"cpu {self.device} {self.threads} threads"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: str, command: str) -> Machine:
    """Name the processor or GPU behind ``device`` (``"cpu"`` or ``"cuda"``), the versions and the commit."""
    gpu = device == "cuda"
    return Machine(
        device=torch.cuda.get_device_name() if gpu else cpu_name(),
        threads=torch.get_num_threads(),
        driver=_gpu_driver() if gpu else "",
        torch=torch.__version__,
        triton=_triton_version(),
        sslfast=sslfast.__version__,
        commit=_commit(),
        command=command,
    )


def cpu_name() -> str:
    """The processor's model without marketing marks and clock rate."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*|\d+-Core Processor", "", name).replace("  ", " ").strip()


def _output(*command: str) -> str:
    """What ``command`` prints, or nothing where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpu_driver() -> str:
    """The NVIDIA driver's version, ``unknown`` where nvidia-smi is not installed: never empty, as it is on a CPU."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _commit() -> str:
    """The short commit, ``-dirty`` when anything but the results differs from it, or ``unknown``."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "--no-optional-locks", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return (commit or "unknown") + ("-dirty" if commit and changed else "")


# ------------------------------------------------------------------------------------------------------------- peaks


@dataclass(frozen=True)
class Peak:
    """One measured ceiling: ``source`` says what reached it, ``kind`` is ``gflops`` or ``gb_per_s`` (10⁹ a second)."""

    source: str
    kind: str
    dtype: str
    shape: dict[str, int]
    value: float


@dataclass(frozen=True)
class Peaks:
    """The ceilings of one device, measured in the same run as the results that are divided by them."""

    all: tuple[Peak, ...]

    def gflops(self, dtype: str) -> float | None:
        """10⁹ operations a second in ``dtype``; ``None`` where that was not measured."""
        return next((p.value for p in self.all if p.kind == "gflops" and p.dtype == dtype), None)

    def bound_ms(self, flops: float, bytes_moved: float, dtype: str) -> float | None:
        """``max(flops / peak, bytes / bandwidth)`` in milliseconds; ``None`` without a peak for ``dtype``.

        What does not count operations needs no peak of them.
        """
        rate = self.gflops(dtype)
        bandwidths = [p.value for p in self.all if p.kind == "gb_per_s"]
        if not bandwidths or (flops and not rate):
            return None
        return max(flops / rate if rate else 0.0, bytes_moved / bandwidths[0]) / 1e6


def measure_peaks(device: str) -> Peaks:
    """Measure the arithmetic peak of each benchmarked dtype and the bandwidth of a copy (bytes read plus written).

    On a GPU also that of ``tf32``, which is no dtype of a case: float32 rows are held to float32.
    """
    if device == "cuda":
        products = [_mm_peak(device, 8192, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        return Peaks((*products, _tf32_peak(8192), _copy_peak(device, 1024)))
    return Peaks((_tile_peak() or _mm_peak(device, 2048, torch.float32), _copy_peak(device, 256)))


def _best_seconds(device: str, run: Callable[[], Any]) -> float:
    run()
    clock = Clock(device, flush=False)
    return min(clock(lambda _: run(), None) for _ in range(PEAK_TRIALS)) / 1e3


def _tile_peak() -> Peak | None:
    """The rate of the package's own fp32 micro-kernel, a cache-resident tile a thread; ``None`` if not built."""
    m, n, k = TILE
    threads = torch.get_num_threads()
    try:
        first = torch.ops.sslfast.tile_peak(m, n, k, 10)
        repeats = max(10, int(10 * 0.05 / max(first, 1e-6)))  # about 50 ms a trial
        seconds = min(torch.ops.sslfast.tile_peak(m, n, k, repeats) for _ in range(PEAK_TRIALS))
    except (AttributeError, NotImplementedError):
        return None
    rate = 2.0 * m * n * k * repeats * threads / seconds / 1e9
    return Peak("tile_peak", "gflops", "float32", {"m": m, "n": n, "k": k}, rate)


def _mm_peak(device: str, size: int, dtype: torch.dtype) -> Peak:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2.0 * size**3 / _best_seconds(device, lambda: torch.mm(a, b, out=out)) / 1e9
    return Peak("torch.mm", "gflops", str(dtype).removeprefix("torch."), {"m": size, "n": size, "k": size}, rate)


def _tf32_peak(size: int) -> Peak:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return replace(_mm_peak("cuda", size, torch.float32), dtype="tf32")
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_peak(device: str, mebibytes: int) -> Peak:
    source = torch.ones(mebibytes * MIB, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rate = 2.0 * mebibytes * MIB / _best_seconds(device, lambda: target.copy_(source)) / 1e9
    return Peak("copy", "gb_per_s", "uint8", {"MiB": mebibytes}, rate)


# -------------------------------------------------------------------------------------------------------------- time


class Clock:
    """Milliseconds of one call, on a cold last-level cache: ``clock(run, state)``.

    Before each sample a buffer of twice that cache is overwritten: a training step may not count on its features being
    there, and a loop over one call would find them. On CUDA the sample lies between two events on the current stream.
    """

    def __init__(self, device: str, flush: bool = True) -> None:
        self.device = device
        size = 2 * _last_level_cache(device) if flush else 0
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[Any], Any], state: Any) -> float:
        self.buffer.zero_()
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run(state)
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            result = run(state)
            elapsed = (time.perf_counter() - begin) * 1e3
        del result  # freeing what the call returned is not part of the call
        return elapsed


def _last_level_cache(device: str) -> int:
    """Bytes of the L2 (CUDA) or L3 (CPU) cache; 32 MiB where the system does not say, never more than 128 MiB."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size or 32 * MIB
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 * MIB
    unit = {"K": 1024, "M": MIB}
    return min(int(text.rstrip("KM")) * unit.get(text[-1], 1), 128 * MIB)


# ------------------------------------------------------------------------------------------------------------ memory

# With these every block above 128 KiB is mapped on its own and unmapped when freed, so the resident set is what is
# alive and not what the allocator keeps for later. glibc reads them when the process starts.
ALLOCATOR_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


def peak_extra_bytes(device: str, run: Callable[[], Any]) -> int:
    """Bytes by which one call raises the process's peak above what is alive before it.

    Counted: everything that the call allocates and touches, its saved activations, workspaces and results, gradients
    included. Not counted: inputs, code, and what the caller's warm-up left alive.
    CPU: the growth of the peak resident set, reset by writing 5 to ``/proc/self/clear_refs`` (Linux). Pages that are
    reserved and never touched do not count; neither does anything below the noise of about 0.2 MiB.
    CUDA: ``torch.cuda.max_memory_allocated`` (workspaces outside of PyTorch's allocator do not count).

    Raises:
        OSError: the peak cannot be reset on this system.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = run()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def available_bytes() -> int:
    """Main memory that a measurement may use now without pushing anything out."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
