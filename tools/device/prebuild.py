"""``python -m tools.device.prebuild``: what a machine with a GPU and no compiler or network needs, into build/device.

Both libraries carry no Python symbols and only LibTorch's stable ABI, so they are built beside the torch that is here,
even a CPU one, in a copy of the tree: nothing of this checkout changes. Beside them, a ptxas without the fault of 12.8
(``ptxas.py``), compressed.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .prepare import LIBRARIES
from .ptxas import CARRIED, RIGHT, in_triton, version_of
from .steps import ROOT

SOURCES = ("csrc", "kernels", "sslfast", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def copy_of_the_tree(target: Path) -> None:
    """The files that a build reads, as they are now, without what was built before."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, target / name, ignore=ignore, symlinks=True)
        else:
            shutil.copyfile(source, target / name)


def pack_ptxas(output: Path) -> str:
    path = in_triton("ptxas-blackwell") or in_triton("ptxas")
    version = version_of(path) if path else None
    if path is None or version is None or tuple(map(int, version.split(".")))[:2] < RIGHT:
        return f"no ptxas: Triton's here is {version or 'missing'}, one of {RIGHT[0]}.{RIGHT[1]} or later is wanted"
    packed = output / "ptxas.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    return f"{packed.name}: {version}, {packed.stat().st_size / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.device.prebuild", description=__doc__)
    parser.add_argument("--arch", default="9.0", help="TORCH_CUDA_ARCH_LIST (default: 9.0, of an H100 or H200)")
    parser.add_argument("--output", type=Path, default=CARRIED, metavar="DIR", help="default: build/device")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sslfast-") as folder:
        tree = Path(folder)
        copy_of_the_tree(tree)
        environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": options.arch}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, check=False)
        if done.returncode:
            return done.returncode
        options.output.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            built = options.output / f"{name}.so"
            shutil.copyfile(tree / "sslfast" / built.name, built)
            print(f"{built.name}: {built.stat().st_size / 1e6:.1f} MB")
    print(pack_ptxas(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
