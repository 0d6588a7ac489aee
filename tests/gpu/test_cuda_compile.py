"""Every CUDA source compiles for each architecture we support, without warnings and without register spills.

Needs nvcc and no GPU: the sources see torch through its stable ABI only, so a CPU build of torch is enough. They are
compiled by the package's own build, once for all that is asked here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import packages

SOURCES = sorted(path.name for path in (packages.ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = {"80": "8.0", "90": "9.0", "100": "10.0"}
SHARED_MEMORY = 48 << 10  # bytes a block has without asking for more
STRICT = "-Werror all-warnings -Xcompiler=-Werror -Xptxas=-v"


@pytest.fixture(scope="session")
def targets() -> list[str]:
    """The architectures that this nvcc knows."""
    home = os.environ.get("CUDA_HOME")
    compiler = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if compiler is None:
        pytest.skip("nvcc is missing")
    known = subprocess.check_output([compiler, "--list-gpu-arch"], text=True).split()
    found = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    if not found:
        pytest.skip(f"this nvcc knows none of {', '.join(ARCHITECTURES)}")
    return found


@pytest.fixture(scope="session")
def cuda_wheel(targets: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel with every architecture, built where a warning is an error, and what the build says."""
    made = tmp_path_factory.mktemp("cuda")
    tree = packages.copy_of_the_tree(made / "sslfast")
    archs = ";".join(ARCHITECTURES[a] for a in targets)
    return packages.build_wheel(
        tree, made, FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=archs, NVCC_APPEND_FLAGS=STRICT, MAX_JOBS="2"
    )


def said_of(source: str, output: str) -> str:
    """What ninja prints below the command that compiles ``source``."""
    parts = re.split(r"^ *\[\d+/\d+\] ", output, flags=re.MULTILINE)
    (found,) = [part for part in parts if f" csrc/cuda/{source} " in part.partition("\n")[0]]
    return found


def test_there_is_something_to_compile() -> None:
    assert SOURCES


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_warnings_and_spills(source: str, targets: list[str], cuda_wheel: tuple[Path, str]) -> None:
    said = said_of(source, cuda_wheel[1])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills, "ptxas reported no kernel"
    assert all(counts == ("0", "0") for counts in spills), said
    frames = re.findall(r"Function properties for (\S+)\n\s+(\d+) bytes stack frame", said)
    assert len(frames) == len(spills)
    for architecture in targets:
        assert f"for 'sm_{architecture}'" in said
    assert all(size == "0" for _, size in frames), f"local memory: {frames}"
    assert all(int(size) <= SHARED_MEMORY for size in re.findall(r"(\d+) bytes smem", said)), said


@pytest.mark.slow
def test_the_library_beside_any_torch(cuda_wheel: tuple[Path, str], tmp_path: Path) -> None:
    wheel, output = cuda_wheel
    assert "sslfast/_C_cuda.so" in zipfile.ZipFile(wheel).namelist()
    assert "_C_cuda (nvcc" in output
    python = packages.environment_with(wheel, tmp_path)
    cuda = packages.succeed([python, "-c", packages.USE_KERNEL], tmp_path).splitlines()[-1]
    expected = "loaded" if torch.version.cuda else f"built, but this torch ({torch.__version__}) has no CUDA"
    assert cuda == expected
