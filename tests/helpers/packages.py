"""Builds of the package from a copy of the tree, for the tests that use what was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = sysconfig.get_paths()["purelib"]  # where torch is
LEAVE_OUT = (".venv", ".git", "build", "dist", "out", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
# Nothing that the tests set for themselves reaches a build or an installed copy.
OURS = ("SSLFAST_", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET", "PYTHONPATH", "DEBUG")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}

USE_KERNEL = """
import sslfast, torch
from sslfast import _native
import sslfast.kernels
x = torch.randn(9, 40, dtype=torch.float64)
with sslfast.use_backend("cpu"):
    y, loss = sslfast.l2_normalize(x), sslfast.nt_xent(x, -x.flip(0))
torch.testing.assert_close(y, torch.nn.functional.normalize(x))
torch.testing.assert_close(loss, sslfast.reference.nt_xent(x, -x.flip(0)))
print(sslfast.__file__)
print(_native.host.build_info()["version"])
print(_native.why_missing.get("_C_cuda", "loaded"))
"""


def run(command: list[object], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env={**CLEAN, **environment}, capture_output=True, text=True, timeout=3600)


def succeed(command: list[object], cwd: Path, **environment: str) -> str:
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def copy_of_the_tree(target: Path) -> Path:
    """What is under version control, and the object files of the build in place, where there is one.

    With the times of the last change, by which the build compiles what differs: the same commands on the same sources
    made these objects, so a build of the copy differs from one of a clean tree in what it takes alone.
    """
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEAVE_OUT))
    built = Path("build") / "native"
    if (ROOT / built).exists():
        shutil.copytree(ROOT / built, target / built, ignore=shutil.ignore_patterns("cuda"))
    return target


def build_wheel(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of ``source`` (a tree or an sdist), and pip's output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", target]
    if "PIP_CONSTRAINT" not in environment:
        command.append("--no-build-isolation")
    output = succeed([*command, source], target, **environment)
    (wheel,) = target.glob("*.whl")
    return wheel, output


def environment_with(wheel: Path, where: Path) -> Path:
    """The interpreter of a new environment that holds this wheel, and sees torch where the tests have it."""
    succeed([sys.executable, "-m", "venv", "--without-pip", where / "env"], where)
    python = where / "env" / "bin" / "python"
    succeed([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel], where)
    site = succeed([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], where).strip()
    # A path from a .pth file is searched, but its own .pth files (the editable sslfast's) are not read.
    (Path(site) / "torch_of_the_tests.pth").write_text(SITE + "\n")
    return python
