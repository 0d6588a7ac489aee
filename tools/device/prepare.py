"""Before the stages: what this machine is, and compiled libraries that work on it.

Prebuilt ones are taken from ``build/device`` (``python -m tools.device.prebuild`` makes them) where ``sslfast`` has
none; where they do not load, or have no code for this GPU, they are built here for it alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .ptxas import CARRIED
from .steps import ROOT, Context, NotRun, Step

LIBRARIES = ("_C", "_C_cuda")
LINK = ROOT / "sslfast" / "kernels"

# What is asked of the libraries, in a process of its own: this one must stay without torch.
PROBE = """
import json, sys, torch, sslfast
from sslfast import _native
import sslfast.kernels
device, cuda = sys.argv[1], sys.argv[1] == "cuda"
found = {"torch": torch.__version__, "cpu": _native.has_cpu, "cuda": _native.has_cuda, "why": _native.why_missing}
if cuda:
    found["name"], found["arch"] = torch.cuda.get_device_name(), "%d.%d" % torch.cuda.get_device_capability()
if cuda and _native.has_cuda:
    try:
        torch.ops.sslfast.l2_normalize(torch.ones(2, 3, device=device), 1e-6).sum().item()
    except Exception as error:
        found["cuda"], found["why"]["_C_cuda"] = False, f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def steps(context: Context) -> list[Step]:
    return [
        Step("machine", lambda: machine(context)),
        Step("link", link),
        Step("libraries", lambda: libraries(context), seconds=420.0),
        Step("versions", lambda: printed([sys.executable, "-m", "sslfast"])),
    ]


def printed(command: list[str]) -> None:
    """Run it with its output in the log."""
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)


def machine(context: Context) -> None:
    if context.rehearse:
        raise NotRun("a rehearsal needs no GPU")
    if shutil.which("nvidia-smi") is None:
        raise NotRun("there is no nvidia-smi")
    printed(["nvidia-smi"])


def is_installed() -> bool:
    """Whether sslfast.kernels is found without a link: it lies beside the package, and an editable install says so."""
    try:
        where = importlib.metadata.distribution("sslfast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    found = json.loads(where or "{}")
    editable: bool = found.get("dir_info", {}).get("editable", False)
    return editable and found.get("url", "").endswith(ROOT.as_posix())


def link() -> str | None:
    """``sslfast/kernels`` → ``kernels``, which installing would map."""
    if LINK.exists() or is_installed():
        return None
    LINK.symlink_to("../kernels", target_is_directory=True)
    return "made the link sslfast/kernels, since sslfast is not installed from here"


def probe(device: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, device], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        print(done.stderr, flush=True)
        raise RuntimeError(f"sslfast cannot be imported: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def taken(names: Sequence[str]) -> list[str]:
    """Copy prebuilt libraries to where sslfast looks for them, unless there are some; returns which."""
    found = []
    for name in names:
        carried, place = CARRIED / f"{name}.so", ROOT / "sslfast" / f"{name}.so"
        if carried.exists() and not place.exists():
            shutil.copyfile(carried, place)
            found.append(name)
    return found


def build(arch: str | None) -> None:
    """In place, for this GPU alone."""
    environment = {**os.environ, **({"TORCH_CUDA_ARCH_LIST": arch, "FORCE_CUDA": "1"} if arch else {})}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=400)


def libraries(context: Context) -> str:
    """Those that are there, carried along, or built now; whatever is missing in the end is an error."""
    needed = ("cpu",) if context.rehearse else ("cpu", "cuda")
    names = taken(LIBRARIES[: len(needed)])
    how = f"took {', '.join(names)} from build/{CARRIED.name}; " if names else ""
    found = probe(context.device)
    if not all(found[name] for name in needed):
        print(f"building, since {found['why']}", flush=True)
        build(found.get("arch"))
        how += "built here; "
        found = probe(context.device)
    if not all(found[name] for name in needed):
        raise RuntimeError(f"a library is missing still: {found['why']}")
    return f"{how}torch {found['torch']}, {found.get('name', 'CPU')} {found.get('arch', '')}".strip()
