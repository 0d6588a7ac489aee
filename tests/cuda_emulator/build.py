"""Building the emulated operators with g++ and torch's headers, once for each state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from .rewrite import rewritten

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "cuda_emulator"

# Quick to compile; and no product and sum as one operation, for some results are the same bits on every device.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wno-unknown-pragmas"]
SANITIZERS = {
    # Alignment: a vector that does not lie on a multiple of its size is read by x86, and by no GPU.
    "address": ["-O0", "-fsanitize=address,alignment", "-fsanitize-recover=address"],
    "thread": ["-fsanitize=thread"],
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(sanitizer: str | None = None, csrc: Path = ROOT / "csrc", out: Path = OUT) -> Path:
    """The library with every operator of ``csrc/cuda``, and the kernels of ``selftest.cu``.

    What has been compiled before is used again, by its contents. Of several processes one builds and the others wait.

    Raises:
        RuntimeError: g++ is missing, or what it says.
    """
    gxx = compiler()
    if gxx is None:
        raise RuntimeError("g++ is missing")
    out = out / (sanitizer or "plain")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(gxx, sanitizer, csrc, out)


def _build(gxx: str, sanitizer: str | None, csrc: Path, out: Path) -> Path:
    headers = [*csrc.glob("*.h"), *(csrc / "common").glob("*.h"), *(csrc / "checks").glob("*.h")]
    shared = {path: path.read_text() for path in sorted(headers)}
    shared |= {path: rewritten(path, path.read_text()) for path in sorted((csrc / "cuda").glob("*.h"))}
    own = {path: path.read_text() for path in [*sorted(HERE.glob("*.h")), *sorted((HERE / "include").glob("*.h"))]}
    for path, text in shared.items():
        write(out / "csrc" / path.relative_to(csrc), text)
    instrument = SANITIZERS.get(sanitizer or "", [])
    include = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{out / 'csrc'}"]
    include += [flag for d in cpp_extension.include_paths() for flag in ("-isystem", d)]
    version = subprocess.check_output([gxx, "--version"], text=True)
    common = digest(version, torch.__version__, *FLAGS, *instrument, *own.values())

    jobs: list[tuple[Path, list[str]]] = []  # objects, and how they are made
    for path in [*sorted((csrc / "cuda").glob("*.cu")), HERE / "selftest.cu"]:
        text = rewritten(path, path.read_text())
        source = out / "csrc" / "cuda" / f"{path.stem}.cpp"
        write(source, text)
        target = out / f"{path.stem}-{digest(common, text, *included(text, shared))}.o"
        jobs.append((target, [*FLAGS, *instrument, *include, str(source)]))
    told = [f"-D{sanitizer.upper()}_SANITIZER"] if sanitizer else []
    for path in sorted(HERE.glob("*.cpp")):  # the emulator itself is not instrumented
        target = out / f"{path.stem}-{digest(common, path.read_text())}.o"
        jobs.append((target, [*FLAGS, "-O2", *told, *include, str(path)]))

    def compile_one(job: tuple[Path, list[str]]) -> None:
        if not job[0].exists():
            call([gxx, *job[1], "-c", "-o", f"{job[0]}.part"])
            os.replace(f"{job[0]}.part", job[0])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, jobs))
    objects = [str(target) for target, _ in jobs]
    library = out / f"emulated-{digest(*objects)}.so"
    if not library.exists():
        link = [*(f"-L{d}" for d in cpp_extension.library_paths()), "-ltorch", "-ltorch_cpu"]
        call([gxx, "-shared", *instrument, "-o", f"{library}.part", *objects, *link])
        os.replace(f"{library}.part", library)
    for old in (*out.glob("*.o"), *out.glob("*.so")):
        if str(old) not in objects and old != library:
            old.unlink()
    return library


def included(text: str, headers: dict[Path, str]) -> list[str]:
    """The headers of csrc that ``text`` includes, and those that these do, each once."""
    found: dict[Path, str] = {}
    left = [text]
    while left:
        for name in re.findall(r'^#include "([\w./]+)"', left.pop(), flags=re.MULTILINE):
            for path, content in headers.items():  # from csrc or from the folder that it stands in
                if path not in found and path.as_posix().endswith(f"/{name}"):
                    found[path] = content
                    left.append(content)
    return [found[path] for path in sorted(found)]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
