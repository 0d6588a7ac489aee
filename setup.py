"""Build of the compiled parts: ``sslfast/_C.so``, ``sslfast/_C_cuda.so`` and ``sslfast._host``.

``_C`` and ``_C_cuda`` are plain shared libraries on LibTorch's stable ABI, without Python symbols; ``_host`` is a
pybind11 module without torch. The commands go into build/native/build.ninja, so a second build compiles what changed.

Environment variables:
    SSLFAST_SKIP_EXT=1      build nothing: pure Python, Triton and the reference.
    FORCE_CUDA=1            build _C_cuda even beside a torch without CUDA; FORCE_CUDA=0 never builds it.
    TORCH_CUDA_ARCH_LIST    such as "8.0;9.0+PTX"; default: DEFAULT_ARCHS, as far as nvcc knows them.
    CUDA_HOME, CXX          the CUDA toolkit and the C++ compiler; default: nvcc and c++ on PATH.
    MAX_JOBS                compilers at once; default: one a core, as far as memory allows.
    DEBUG=1                 -O0 -g instead of -O3.
    SSLFAST_SANITIZE        such as "address,undefined": instruments _C and _host.
"""

from __future__ import annotations

import glob
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build") / "native"  # relative to ROOT, where ninja runs
OLDEST_TORCH = (2, 10)
# LibTorch's stable ABI as of 2.10: the library then loads into that version and every later one.
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
DEFAULT_ARCHS = "8.0 8.6 9.0 10.0 12.0+PTX"
MEMORY_PER_JOB = 3 << 30  # bytes; nvcc with several architectures is the hungriest

# Compiler flags of each level. The wider ones are those of every processor with AVX2 (2013) and of server processors
# with AVX-512 (2017); a level is chosen when a kernel is called, so a wheel runs everywhere.
LEVELS: dict[str, list[str]] = {"baseline": ["-DSSLFAST_CPU_DISPATCH"]}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]


# The same bits on every machine, so no product and sum may become one operation.
EXACT = ["-ffp-contract=off"]


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


@dataclass
class Toolkit:
    """The CUDA compiler with its directories, asked from nvcc itself: the command may be a wrapper."""

    nvcc: str
    version: str
    include: list[str]
    libraries: list[str]
    archs: list[str]  # such as "9.0" or "12.0+PTX"

    def gencode(self) -> list[str]:
        """One ``-gencode`` for the machine code of each architecture, and one more where its PTX is wanted too."""
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def find_toolkit() -> Toolkit | None:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        return None

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    # A dry run prints the variables that nvcc works with, such as
    #     #$ INCLUDES="-I/opt/cuda/bin/../targets/x86_64-linux/include"
    plan = ask("--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull)
    quoted = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES|TOP)=(.*)$", plan, flags=re.MULTILINE))
    top = Path(quoted["TOP"].strip()).resolve()
    include = [flag[2:] for flag in shlex.split(quoted.get("INCLUDES", ""))] or [str(top / "include")]
    libraries = [flag[2:] for flag in shlex.split(quoted.get("LIBRARIES", ""))] or [str(top / "lib64")]
    version = re.search(r"release (\S+),", ask("--version"))
    known = set(ask("--list-gpu-arch").split())
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = re.split(r"[;,\s]+", (wanted or DEFAULT_ARCHS).strip())
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(f"sslfast: TORCH_CUDA_ARCH_LIST={wanted!r}: {arch!r} is not like 9.0, 9.0a or 9.0+PTX")
    if not wanted:  # what the user names goes to nvcc as it is, which says so if it does not know it
        archs = [a for a in archs if "compute_" + a.removesuffix("+PTX").replace(".", "") in known]
    return Toolkit(nvcc, version.group(1) if version else "?", include, libraries, archs)


def import_torch() -> Any:
    """torch, of a version that has the stable ABI, or an error that says what to do."""
    how = (
        "sslfast's compiled parts need torch >= 2.10 at build time. Install torch first, then run\n"
        "    pip install --no-build-isolation .\n"
        "or leave them out (pure Python, Triton and the reference): SSLFAST_SKIP_EXT=1 pip install ."
    )
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise SystemExit(f"{how}\n(importing torch: {error})") from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise SystemExit(f"{how}\n(found torch {torch.__version__})")
    return torch


@dataclass
class Plan:
    """What to build: the text of build.ninja, and for each extension its file or the reason it is left out."""

    rules: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def compile(self, rule: str, source: str, stem: str, flags: list[str]) -> str:
        target = (BUILD / f"{stem}.o").as_posix()
        self.rules += [f"build {target}: {rule} {source}", f"  flags = {joined(flags)}"]
        return target

    def link(self, name: str, objects: list[str], flags: list[str]) -> None:
        target = (BUILD / f"{name}.so").as_posix()
        self.rules += [f"build {target}: link {' '.join(objects)}", f"  flags = {joined(flags)}"]
        self.files[name] = target


def joined(flags: list[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


def sources(pattern: str) -> list[str]:
    return sorted(Path(p).relative_to(ROOT).as_posix() for p in glob.glob(str(ROOT / pattern)))


def wishes(source: str) -> set[str]:
    """What the first line of a source asks of the build: ``// build: one level, exact``."""
    with open(ROOT / source, encoding="utf-8") as file:
        first = file.readline().strip()
    wanted = set(first.removeprefix("// build: ").split(", ")) if first.startswith("// build: ") else set()
    if unknown := wanted - {"one level", "exact"}:
        raise SystemExit(f"sslfast: {source}: unknown in its line of the build: {', '.join(sorted(unknown))}")
    return wanted


def plan_cpu(plan: Plan, torch_flags: list[str], link_flags: list[str], flags: list[str]) -> None:
    """Every source in csrc/cpu once per instruction-set level; see csrc/cpu/engine/levels.h.

    A first line ``// build: one level`` says that a file has no kernel to compile for each level, ``exact`` that no
    product and sum may become one operation.
    """
    objects = []
    for source in [*sources("csrc/cpu/*.cpp"), *sources("csrc/cpu/engine/*.cpp")]:
        wanted = wishes(source)
        for level, extra in LEVELS.items():
            if level == "baseline" or "one level" not in wanted:
                level_flags = [*flags, *torch_flags, f"-DSSLFAST_CPU_LEVEL={level}", *extra]
                level_flags += EXACT if "exact" in wanted else []
                objects.append(plan.compile("cxx", source, f"{level}/{Path(source).stem}", level_flags))
    plan.link("_C", objects, link_flags)


def plan_cuda(plan: Plan, torch: Any, torch_flags: list[str], link_flags: list[str], debug: bool) -> Toolkit | None:
    if os.environ.get("FORCE_CUDA") == "0":
        plan.missing["_C_cuda"] = "FORCE_CUDA=0"
    elif torch.version.cuda is None and not switched_on("FORCE_CUDA"):
        plan.missing["_C_cuda"] = f"torch {torch.__version__} has no CUDA; FORCE_CUDA=1 builds it all the same"
    elif not (found := sources("csrc/cuda/*.cu")):
        plan.missing["_C_cuda"] = "no sources"
    elif (toolkit := find_toolkit()) is None:
        if switched_on("FORCE_CUDA"):
            raise SystemExit("sslfast: FORCE_CUDA=1, but nvcc was found neither in CUDA_HOME/bin nor on PATH")
        plan.missing["_C_cuda"] = "nvcc was found neither in CUDA_HOME/bin nor on PATH"
    else:
        flags = ["-std=c++20", "-O0" if debug else "-O3", "-lineinfo", "-DUSE_CUDA", "-Icsrc", *torch_flags]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", *toolkit.gencode()]
        objects = [plan.compile("nvcc", source, f"cuda/{Path(source).stem}", flags) for source in found]
        runtime = [*(f"-L{d}" for d in toolkit.libraries), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        # A CUDA torch's libtorch depends on libtorch_cuda, whose symbols are then found when the library is loaded.
        plan.link("_C_cuda", objects, ["-Wl,--no-as-needed", *link_flags, *runtime])
        return toolkit
    return None


def plan_host(plan: Plan, flags: list[str], link_flags: list[str], info: dict[str, str]) -> None:
    """The torch-free module; what was built is compiled into it through a generated header."""
    try:
        pybind11 = importlib.import_module("pybind11")
    except ImportError as error:
        plan.missing["_host"] = f"pybind11 is missing ({error})"
        return
    header = "".join(f'#define SSLFAST_BUILD_{key.upper()} "{value}"\n' for key, value in info.items())
    path = ROOT / BUILD / "build_info.h"
    # Left alone where nothing changed: ninja goes by the time of the last change.
    if not path.exists() or path.read_text() != header:
        path.write_text(header)
    include = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    host_flags = [*flags, *EXACT, *(f"-isystem{d}" for d in include), f"-I{BUILD.as_posix()}"]
    objects = [
        plan.compile("cxx", source, f"host/{Path(source).stem}", host_flags) for source in sources("csrc/host/*.cpp")
    ]
    plan.link("_host", objects, link_flags)


def make_plan(version: str) -> tuple[Plan, str]:
    """The plan, and the line that tells what is built and why the rest is not."""
    torch = import_torch()
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SystemExit(f"sslfast: no C++ compiler {compiler!r}; install one, set CXX, or set SSLFAST_SKIP_EXT=1")
    debug = switched_on("DEBUG")
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
    # No value changes: errno and floating-point exception flags are not read, and loops with sqrt or ?: become vectors.
    flags += ["-fno-math-errno", "-fno-trapping-math"]
    flags += ["-O0", "-g"] if debug else ["-O3"]
    sanitize = os.environ.get("SSLFAST_SANITIZE", "")
    instrument = [f"-fsanitize={sanitize}"] if sanitize else []
    if sanitize:
        flags += [*instrument, "-fno-omit-frame-pointer", "-g"]
    torch_flags = [TARGET_TORCH, *(flag for d in cpp_extension.include_paths() for flag in ("-isystem", d))]
    link_flags = [f"-L{d}" for d in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu"]

    plan = Plan()
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    plan_cpu(plan, torch_flags, [*instrument, *link_flags], flags)
    toolkit = plan_cuda(plan, torch, torch_flags, link_flags, debug)
    info = {
        "version": version,
        "torch": torch.__version__,
        "cpu_levels": " ".join(LEVELS),
        "cuda_archs": " ".join(toolkit.archs) if toolkit else "",
        "nvcc": toolkit.version if toolkit else "",
        "options": " ".join(["DEBUG=1"] * debug + [f"SSLFAST_SANITIZE={sanitize}"] * bool(sanitize)),
    }
    plan_host(plan, flags, instrument, info)
    head = [
        f"builddir = {BUILD.as_posix()}",
        f"cxx = {compiler}",
        "rule cxx",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
    ]
    if toolkit:
        head += [
            "rule nvcc",
            f"  command = {joined([toolkit.nvcc])} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    plan.rules = head + plan.rules
    detail = {"_C": f" ({info['cpu_levels']})", "_C_cuda": f" (nvcc {info['nvcc']}: {info['cuda_archs']})"}
    built = ", ".join(name + detail.get(name, "") for name in plan.files)
    left_out = "".join(f"; not {name} ({reason})" for name, reason in plan.missing.items())
    return plan, f"sslfast: built {built} against torch {torch.__version__}{left_out}"


def job_count() -> int:
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdigit() or int(wanted) == 0:
            raise SystemExit(f"sslfast: MAX_JOBS={wanted!r} is not a positive whole number")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // MEMORY_PER_JOB))


class BuildNative(build_ext):
    """Runs ninja and puts the libraries where setuptools expects its extensions."""

    def build_extensions(self) -> None:
        plan, summary = make_plan(self.distribution.get_version())
        (ROOT / BUILD / "build.ninja").write_text("\n".join(plan.rules) + "\n")
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if ninja is None:
            raise SystemExit("sslfast: the build needs ninja; pip install ninja, or set SSLFAST_SKIP_EXT=1")
        build_file = (BUILD / "build.ninja").as_posix()
        # Output goes to stderr with ours, so that the order of lines is kept.
        done = subprocess.run([ninja, "-f", build_file, f"-j{job_count()}"], cwd=ROOT, stdout=sys.stderr)
        if done.returncode != 0:
            raise SystemExit("sslfast: the compiler failed; its message is above (pip shows it with -v)")
        # The rest of setuptools (in-place copies, lists of outputs) then sees what exists, no more.
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] in plan.files]
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / plan.files[extension.name.rpartition(".")[2]], target)
        print(summary, file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """``_C`` and ``_C_cuda`` belong to no Python version, so their names carry none."""
        if fullname.rpartition(".")[2] in ("_C", "_C_cuda"):
            return os.path.join(*fullname.split(".")) + ".so"
        return str(super().get_ext_filename(fullname))


if switched_on("SSLFAST_SKIP_EXT"):
    print("sslfast: built no extension (SSLFAST_SKIP_EXT=1): pure Python, Triton and the reference", file=sys.stderr)
    extensions = []
else:
    extensions = [Extension(f"sslfast.{name}", sources=[]) for name in ("_C", "_C_cuda", "_host")]

setup(
    packages=[*find_packages(include=["sslfast", "sslfast.*"]), "sslfast.kernels"],
    package_dir={"sslfast.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
