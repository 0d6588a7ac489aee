"""Every CUDA source compiles for each architecture we support, without warnings and without register spills.

Needs nvcc and no GPU: the sources see torch through its stable ABI only, so a CPU build of torch is enough.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90", "100"]
SHARED_MEMORY = 48 << 10  # bytes a block has without asking for more


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None:
        pytest.skip("nvcc is missing")
    return found


def test_there_is_something_to_compile() -> None:
    assert SOURCES


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_and_spills(source: str, tmp_path: Path) -> None:
    """For all architectures in one go: the host's part of a file takes as long as one of them."""
    compiler = nvcc()
    known = subprocess.check_output([compiler, "--list-gpu-arch"], text=True).split()
    targets = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    if not targets:
        pytest.skip(f"this nvcc knows none of {', '.join(ARCHITECTURES)}")
    command = [compiler, "-std=c++20", "-O3", "-lineinfo", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-I{ROOT / 'csrc'}", *(flag for d in cpp_extension.include_paths() for flag in ("-isystem", d))]
    command += [
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets),
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror",
        "-Xptxas=-v",
    ]
    command += ["-c", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills, "ptxas reported no kernel"
    assert all(counts == ("0", "0") for counts in spills), done.stderr
    frames = re.findall(r"Function properties for (\S+)\n\s+(\d+) bytes stack frame", done.stderr)
    assert len(frames) == len(spills)
    for architecture in targets:
        assert f"for 'sm_{architecture}'" in done.stderr
    assert all(size == "0" for _, size in frames), f"local memory: {frames}"
    assert all(int(size) <= SHARED_MEMORY for size in re.findall(r"(\d+) bytes smem", done.stderr)), done.stderr
