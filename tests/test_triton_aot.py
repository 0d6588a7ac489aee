"""The Triton kernels compiled ahead of time for GPUs that need not be here.

For every row of the configuration tables: the kernel compiles, its shared memory fits, ptxas spills nothing, on Hopper
16-bit products use ``wgmma`` alone, and no multiplication was fused into a subtraction (the kernels rely on that).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# Features that reach both halves of the tables (NARROW in kernels/_nt_xent_configs.py), whole and with a masked tail.
FEATURES = {"bf16": (8, 64, 104, 128, 304), "fp16": (128, 304), "fp32": (32, 56, 304)}
ARCHITECTURES = (80, 86, 90, 100)


def products(dtypes: dict[str, tuple[int, ...]], architecture: int) -> list[list[Any]]:
    """[kernel, architecture, dtype, features, precision] for the two kernels with products."""
    return [
        [kernel, architecture, dtype, d, precision]
        for kernel in ("forward", "backward")
        for dtype, all_d in dtypes.items()
        for d in all_d
        for precision in (("tf32x3", "tf32") if dtype == "fp32" else ("tf32",))
    ]


QUICK = [*products({"bf16": (128, 304)}, 90), ["merge", 90, "fp32", 0, ""], ["stats", 90, "fp32", 0, ""]]
FULL = [
    case
    for architecture in ARCHITECTURES
    for case in [
        *products(FEATURES, architecture),
        ["merge", architecture, "fp32", 0, ""],
        ["stats", architecture, "fp32", 0, ""],
    ]
]


def compile_one(kernel: str, architecture: int, dtype: str, features: int, precision: str) -> dict[str, Any]:
    """Compile as a launch would: 16-byte aligned pointers, integers not specialised; what ptxas made of it."""
    import triton
    from sslfast.kernels import nt_xent
    from sslfast.kernels._nt_xent_configs import BACKWARD, FORWARD, config_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(nt_xent, f"_nt_xent_{kernel}_kernel")
    size = 4 if dtype == "fp32" else 2
    options = dict(nt_xent.EXACT)
    if kernel in ("forward", "backward"):
        table = FORWARD if kernel == "forward" else BACKWARD
        config = config_for(table, architecture, size, features)
        constants = {"D": features, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"BLOCK_D": config.block_d} if kernel == "backward" else {}
        constants |= {"PRECISION": precision, "UPCAST": False}
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    elif kernel == "merge":
        constants = {"BLOCK": 128, "ROWS": nt_xent.MERGE_ROWS, "PARTS": 64}
    else:
        constants = {"BLOCK": 64}
        options["num_warps"] = 1
    integers = {"M", "first_block", "run_length", "band", "runs"}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in integers:
            signature[name] = "i32"
        else:
            signature[name] = {"Z": f"*{dtype}", "InRange": "*i32"}.get(name, "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = built.asm["ptx"]
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma_sync": ptx.count("mma.sync"),
        "fused": len(re.findall(r"\bfma\.rn(\.ftz)?\.f32", ptx)),
    }


def compile_all(cases: list[list[Any]]) -> dict[str, dict[str, Any]]:
    """One process without the interpreter compiles all cases; result by ``json.dumps(case)``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    return {json.dumps(line["case"]): line for line in lines}


def check(case: list[Any], result: dict[str, Any]) -> None:
    from sslfast.kernels._common import SHARED_MEMORY

    kernel, architecture, dtype, *_ = case
    assert "error" not in result, result["error"]
    assert result["stack"] == 0, f"ptxas spills {result['stack']} bytes: {result}"
    assert result["shared"] <= SHARED_MEMORY[architecture], result
    if kernel != "merge":  # log2 is a polynomial of explicit ones there
        assert result["fused"] == 0, f"{result['fused']} fused multiply-adds: {result}"
    if kernel in ("forward", "backward") and architecture == 90 and dtype != "fp32":
        assert result["wgmma"] > 0 and result["mma_sync"] == 0, result


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Any]]:
    return compile_all(QUICK)


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, Any]]:
    return compile_all(FULL)


@pytest.mark.parametrize("case", QUICK, ids=lambda case: "-".join(map(str, case)))
def test_hopper(case: list[Any], quick: dict[str, dict[str, Any]]) -> None:
    check(case, quick[json.dumps(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_every_configuration(case: list[Any], full: dict[str, dict[str, Any]]) -> None:
    check(case, full[json.dumps(case)])


def test_every_row_of_the_tables_is_compiled() -> None:
    """A row that a change adds must come under ``test_every_configuration``."""
    from sslfast.kernels._common import INTERPRETER, SHARED_MEMORY
    from sslfast.kernels._nt_xent_configs import BACKWARD, FORWARD, NARROW
    from sslfast.kernels.nt_xent import MERGE_ROWS

    sizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    for kernel, table in (("forward", FORWARD), ("backward", BACKWARD)):
        reached = {
            (architecture, sizes[dtype], d > NARROW[sizes[dtype]])
            for name, architecture, dtype, d, _ in FULL
            if name == kernel
        }
        assert {row for row in table if row[0] != INTERPRETER} == reached
        assert {row[0] for row in table} == {*SHARED_MEMORY, INTERPRETER}
    assert all(config.block_m % config.block_n == config.block_m % MERGE_ROWS == 0 for config in FORWARD.values())


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        try:
            result = compile_one(*case)
        except Exception as error:  # reported by the test of this case
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"case": case, **result}), flush=True)
