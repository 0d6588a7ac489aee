"""Compiles the Triton kernels ahead of time, for GPUs that need not be here.

In a process of its own, without the interpreter: it reads a list of cases from standard input and writes a line of JSON
for each.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sass import hazards
from triton_cases import KERNELS, Case, argument_type, row_of, table_of


def compile_all(cases: list[Case], triton: Path | None = None) -> dict[Case, dict[str, Any]]:
    """What became of each case, see :func:`compile_one`; ``{"error": ...}`` where it did not compile.

    Args:
        triton: a folder that holds another Triton than the installed one.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, __file__]
    child = subprocess.run(
        command, input=json.dumps(cases), capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return {Case(*line.pop("case")): line for line in lines}


def compile_one(case: Case) -> dict[str, Any]:
    """Compile as a launch would: 16-byte aligned pointers, integers not specialised; what ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(case)
    built = triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=options)
    ptx = built.asm["ptx"]
    usage = run_tool("cuobjdump", "--dump-resource-usage", built.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "triton": triton.__version__,
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma_sync": ptx.count("mma.sync"),
        "depths": sorted({int(k) for k in re.findall(r"mma(?:_async)?\.sync\.aligned\.m\d+n\d+k(\d+)", ptx)}),
        "fused": len(re.findall(r"\bfma\.rn(\.ftz)?\.f32", ptx)),
        "contracted": contracted_shuffles(ptx),
        # Left factors in registers follow the sums.
        "overwritten": hazards(run_tool("nvdisasm", "-c", built.asm["cubin"])).found
        if re.search(r"wgmma\.mma_async[^;]*\},\s*\{", ptx)
        else None,
    }


def contracted_shuffles(ptx: str) -> list[str]:
    """Multiply-adds by which two lanes that add up the same numbers may come to hold different sums.

    In a butterfly each lane adds what another one has to what it has itself. If that is a product, the addition may
    become one with it, and round once here and twice there. ``x·y + (x + y)`` is the same number both ways round.
    """
    instructions = [
        (op, re.split(r",\s*", operands))
        for op, operands in re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.]*)\s+([^;]*);", ptx, flags=re.MULTILINE)
    ]
    made = {operands[0].partition("|")[0]: (op, operands) for op, operands in instructions}

    def maker(register: str) -> tuple[str, list[str]]:
        op, operands = made.get(register, ("", []))
        return maker(operands[1]) if op == "mov.b32" and operands[1] in made else (op, operands)

    found = []
    for op, operands in instructions:
        ops = [maker(register)[0] for register in operands[1:]]
        if not any(other.startswith("shfl.") for other in ops):
            continue
        if re.match(r"fma\..*f32", op):
            x, y, z = operands[1:]
            added, terms = maker(z)
            contracted = not (added.startswith("add.") and {*terms[1:]} == {x, y})
        else:
            contracted = re.match(r"(add|sub)\..*f32", op) is not None and any(o.startswith("mul.") for o in ops)
        if contracted:
            found.append(f"{op} {', '.join(operands)}")
    return found


def source_of(case: Case) -> tuple[Any, dict[str, Any]]:
    """The kernel with the types and constants of a launch, and its options."""
    from triton.compiler import ASTSource

    from sslfast.kernels._configs import config_for
    from sslfast.kernels._tiles import EXACT

    kernel = KERNELS[case.kernel]
    name = case.kernel.partition("/")[0]
    module = importlib.import_module(f"sslfast.kernels.{kernel.module}")
    function = getattr(module, f"_{name}_kernel", None) or getattr(module, f"{name}_kernel")
    options: dict[str, Any] = dict(EXACT) if kernel.exact else {}
    if kernel.sweep:
        row = row_of(case)
        known = kernel.sweep.knows_features
        config = config_for(table_of(case.kernel), *row[:2], case.features) if known else table_of(case.kernel)[row]
        constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"BLOCK_D": config.block_d} if config.block_d else {}
        constants |= {"PRECISION": case.precision, "UPCAST": False} | ({"D": case.features} if known else {})
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    else:
        constants, options["num_warps"] = dict(kernel.constants), kernel.num_warps
    given = kernel.launches[case.launch].split()
    constants |= {name: bool(int(value)) for name, _, value in (item.partition("=") for item in given) if value}
    # Only float16 similarities can leave their range, and have a factor.
    absent = given + (["Factor"] if case.dtype != "fp16" and case.kernel.startswith("similarity") else [])
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    constants |= {name: None for name in absent if name in function.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(function, name, case.dtype)
        if signature[name].startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes), options


def run_tool(tool: str, option: str, cubin: bytes) -> str:
    """What one of the CUDA tools in Triton's wheel prints about a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for line in json.load(sys.stdin):
        try:
            result = compile_one(Case(*line))
        except Exception as error:  # reported by the test of this case
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"case": line, **result}), flush=True)
