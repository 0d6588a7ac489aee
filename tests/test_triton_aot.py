"""The Triton kernels compiled ahead of time for GPUs that need not be here.

For every row of the configuration tables: the kernel compiles, its shared memory fits, ptxas spills nothing, on Hopper
16-bit products use ``wgmma`` alone, and no multiplication was fused into a subtraction (the kernels rely on that).
"""

from __future__ import annotations

import functools
import importlib
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

# kernel: its module, the table of its tiles ("" for a kernel without products), and the launches to compile, each by
# the arguments that are None in it, and constants. The first launch has most of everything, and presses hardest on the
# registers. What follows a "/" tells kernels apart that are one function by two tables.
KERNELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "nt_xent_forward": ("nt_xent", "FORWARD", {"": ""}),
    "nt_xent_backward": ("nt_xent", "BACKWARD", {"": ""}),
    "nt_xent_merge": ("nt_xent", "", {"": ""}),
    "nt_xent_stats": ("nt_xent", "", {"": ""}),
    "similarity_forward": (
        "similarity_lse",
        "FORWARD",
        {
            "all": "",
            "columns": "Bias RowIds ColIds ColRanges Hardest",
            "rows": "Bias RowIds ColIds ColRanges ColPartial Hardest",
        },
    ),
    "similarity_backward": (
        "similarity_lse_backward",
        "OWNER",
        {
            "dq": "ABias BPositives Sums",
            "dk": "BBias APositives",
            "rows": "BWeights ABias BBias AIds BIds BPositives BRanges Sums",
        },
    ),
    "similarity_weights": ("similarity_lse_backward", "", {"": ""}),
    "similarity_attend": ("similarity_lse_attend", "OWNER", {"all": "", "rows": "Bias RowIds ColIds ColRanges"}),
    "similarity_attend_merge": ("similarity_lse_attend", "", {"": ""}),
    "similarity_logsigmoid": (
        "similarity_logsigmoid",
        "OWNER",
        {"all": "", "loss": "DA Dots", "gradient": "Loss Sums"},
    ),
    "second_moment_gram": (
        "second_moment",
        "GRAM",
        {
            "dual": "B Partial DUAL=1",
            "self": "B Partial DUAL=0",
            "cross": "Partial DUAL=0",
            "split": "B Moments DUAL=1",
        },
    ),
    "second_moment_gram/pair": ("second_moment", "PAIR", {"all": "Partial DUAL=1", "split": "Moments DUAL=1"}),
    "second_moment_product": (
        "second_moment_backward",
        "PRODUCT",
        {"all": "", "primal": "Y YMean YFactor RowTerm"},
    ),
    "second_moment_statistics": ("second_moment_statistics", "", {"": ""}),
    "second_moment_merge": ("second_moment_statistics", "", {"": ""}),
    "second_moment_standardize": ("second_moment_statistics", "", {"": ""}),
    "second_moment_combine": ("second_moment", "", {"": ""}),
    "second_moment_input_gradient": ("second_moment_backward", "", {"": ""}),
    "merge": ("_tiles", "", {"": ""}),
    "block_ranges": ("_tiles", "", {"": ""}),
}
# Compile-time arguments and options of the kernels without products.
SMALL = {
    "nt_xent_merge": ({"BLOCK": 128, "ROWS": 32, "PARTS": 64}, 4),
    "nt_xent_stats": ({"BLOCK": 64}, 1),
    "similarity_weights": ({"BLOCK": 256}, 4),
    "similarity_attend_merge": ({"D": 128, "PARTS": 16, "BLOCK_D": 128}, 4),
    "second_moment_statistics": ({"CROSS": True, "CENTER": True, "ROWS": 32, "COLS": 64, "UPCAST": False}, 4),
    "second_moment_merge": ({"CROSS": True, "CENTER": True, "SCALE": 1, "COLS": 64, "UPCAST": False}, 1),
    "second_moment_standardize": ({"CROSS": True, "ROWS": 32, "COLS": 64, "UPCAST": False}, 4),
    "second_moment_combine": ({"DUAL": True, "SYMMETRIC": True, "PAIR": True, "BLOCK": 32}, 4),
    "second_moment_input_gradient": ({"CENTER": True, "SCALE": 2, "ROWS": 32, "COLS": 64, "UPCAST": False}, 4),
    "merge": ({"ROWS": 32, "PARTS": 64}, 4),
    "block_ranges": ({"BLOCK": 64}, 1),
}


def products(kernels: dict[str, Any], dtypes: dict[str, tuple[int, ...]], architecture: int) -> list[list[Any]]:
    """[kernel, launch, architecture, dtype, features, precision] for the kernels with products."""
    return [
        [kernel, launch, architecture, dtype, d, precision]
        for kernel, launches in kernels.items()
        for launch in launches
        for dtype, all_d in dtypes.items()
        for d in all_d
        for precision in (("tf32x3", "tf32") if dtype == "fp32" else ("tf32",))
    ]


def small(architecture: int) -> list[list[Any]]:
    return [[kernel, "", architecture, "fp32", 0, ""] for kernel in SMALL]


WITH_PRODUCTS = {kernel: launches for kernel, (_, table, launches) in KERNELS.items() if table}
NT_XENT = {kernel: launches for kernel, launches in WITH_PRODUCTS.items() if kernel.startswith("nt_xent")}
SECOND = {kernel: launches for kernel, launches in WITH_PRODUCTS.items() if kernel.startswith("second_moment")}
SIMILARITY = {kernel: launches for kernel, launches in WITH_PRODUCTS.items() if kernel not in NT_XENT | SECOND}
HEAVIEST = {kernel: list(launches)[:1] for kernel, launches in SIMILARITY.items()}
LIGHTER = {kernel: list(launches)[1:] for kernel, launches in SIMILARITY.items()}
# second_moment compiles once for any number of features; its tables know small results (0) and large ones (1).
HEAVIEST_SECOND = {kernel: list(launches)[:1] for kernel, launches in SECOND.items()}
LIGHTER_SECOND = {kernel: list(launches)[1:] for kernel, launches in SECOND.items()}
# In every run: the heaviest launches on Hopper, by a narrow and a wide row.
QUICK = [
    *products(NT_XENT | HEAVIEST, {"bf16": (128, 304)}, 90),
    *products(HEAVIEST_SECOND, {"bf16": (0, 1)}, 90),
    *small(90),
]
FULL = [
    case
    for architecture in ARCHITECTURES
    for case in [
        *products(NT_XENT, FEATURES, architecture),
        *products(HEAVIEST, {"bf16": (64, 128, 304), "fp16": (128, 304), "fp32": (32, 304)}, architecture),
        *products(LIGHTER, {"bf16": (128, 304), "fp32": (32, 304)}, architecture),
        *products(HEAVIEST_SECOND, {"bf16": (0, 1), "fp16": (0, 1), "fp32": (0, 1)}, architecture),
        *products(LIGHTER_SECOND, {"bf16": (0, 1), "fp32": (0, 1)}, architecture),
        *small(architecture),
    ]
]
# These subtract no maximum, so a fused multiply-add does no harm: the pairwise sigmoid loss, second moments.
FUSES = {kernel for kernel in KERNELS if kernel == "similarity_logsigmoid" or kernel.startswith("second_moment")}
INTEGERS = {"M", "N", "R", "C", "L", "first_block", "run_length", "band", "runs", "parts", "resume", "splits", "limit"}
INTEGERS |= {"D", "S", "terms", "left8", "right8", "width8", "share", "chunks"}
DATA = {"Z", "Q", "K", "A", "B", "X", "Y", "Left", "Right", "Hat", "Other", "DX"}


def argument_type(name: str, dtype: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in DATA:
        return f"*{dtype}"
    if name == "eps":
        return "fp32"
    if name == "InRange":
        return "*i32"
    return "*i64" if name.endswith(("Ids", "Positives", "Ranges")) else "*fp32"


def row_of(kernel: str, architecture: int, dtype: str, features: int) -> tuple[int, int, bool]:
    """The row of its table that a case reaches."""
    from sslfast.kernels._nt_xent_configs import NARROW

    size = 4 if dtype == "fp32" else 2
    return architecture, size, features > (0 if kernel in SECOND else NARROW[size])


def table_of(kernel: str) -> dict[tuple[int, int, bool], Any]:
    """The table of its tiles."""
    tables = "nt_xent" if kernel in NT_XENT else "second_moment" if kernel in SECOND else "similarity_lse"
    return getattr(importlib.import_module(f"sslfast.kernels._{tables}_configs"), KERNELS[kernel][1])


def compile_one(
    kernel: str, launch: str, architecture: int, dtype: str, features: int, precision: str
) -> dict[str, Any]:
    """Compile as a launch would: 16-byte aligned pointers, integers not specialised; what ptxas made of it."""
    import triton
    from sslfast.kernels._nt_xent_configs import config_for
    from sslfast.kernels._tiles import EXACT
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, table, launches = KERNELS[kernel]
    prefix = "" if module == "_tiles" else "_"
    name = kernel.partition("/")[0]
    function = getattr(importlib.import_module(f"sslfast.kernels.{module}"), f"{prefix}{name}_kernel")
    options: dict[str, Any] = {} if kernel in FUSES else dict(EXACT)
    if table:
        row = row_of(kernel, architecture, dtype, features)
        config = table_of(kernel)[row] if kernel in SECOND else config_for(table_of(kernel), *row[:2], features)
        constants = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        constants |= {"BLOCK_D": config.block_d} if config.block_d else {}
        constants |= {"PRECISION": precision, "UPCAST": False} | ({} if kernel in SECOND else {"D": features})
        options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    else:
        constants, options["num_warps"] = dict(SMALL[kernel][0]), SMALL[kernel][1]
    given = launches[launch].split()
    constants |= {name: bool(int(value)) for name, _, value in (item.partition("=") for item in given) if value}
    absent = given + (["Factor"] if dtype != "fp16" and kernel in SIMILARITY else [])
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    constants |= {name: None for name in absent if name in function.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(name, dtype)
        if signature[name].startswith("*"):
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

    kernel, _, architecture, dtype, *_ = case
    assert "error" not in result, result["error"]
    assert result["stack"] == 0, f"ptxas spills {result['stack']} bytes: {result}"
    assert result["shared"] <= SHARED_MEMORY[architecture], result
    # log2 is a polynomial of explicit ones in the merging kernels.
    if kernel not in ("nt_xent_merge", "merge", *FUSES):
        assert result["fused"] == 0, f"{result['fused']} fused multiply-adds: {result}"
    if kernel in WITH_PRODUCTS and architecture == 90 and dtype != "fp32":
        assert result["wgmma"] > 0 and result["mma_sync"] == 0, result


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Any]]:
    return compile_all(QUICK)


@functools.cache
def compiled_for(architecture: int) -> dict[str, dict[str, Any]]:
    return compile_all([case for case in FULL if case[2] == architecture])


@pytest.mark.parametrize("case", QUICK, ids=lambda case: "-".join(map(str, case)))
def test_hopper(case: list[Any], quick: dict[str, dict[str, Any]]) -> None:
    check(case, quick[json.dumps(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_every_configuration(case: list[Any]) -> None:
    check(case, compiled_for(case[2])[json.dumps(case)])


def test_every_row_of_the_tables_is_compiled() -> None:
    """A row that a change adds must come under ``test_every_configuration``."""
    from sslfast.kernels import _nt_xent_configs
    from sslfast.kernels._common import INTERPRETER, SHARED_MEMORY
    from sslfast.kernels._tiles import MERGE_ROWS

    for kernel in WITH_PRODUCTS:
        table = table_of(kernel)
        reached = {
            row_of(kernel, architecture, dtype, d) for case, _, architecture, dtype, d, _ in FULL if case == kernel
        }
        assert {row for row in table if row[0] != INTERPRETER} == reached
        assert {row[0] for row in table} == {*SHARED_MEMORY, INTERPRETER}
    forward = _nt_xent_configs.FORWARD.values()
    assert all(config.block_m % config.block_n == config.block_m % MERGE_ROWS == 0 for config in forward)


def test_tiles_of_second_moments_are_squares() -> None:
    """Tiles below the diagonal of a symmetric matrix are left out whole, and those on it hold both sides."""
    from sslfast.kernels._second_moment_configs import GRAM, PAIR
    from sslfast.kernels.second_moment import COMBINE

    for config in (*GRAM.values(), *PAIR.values()):
        assert config.block_m == config.block_n and config.block_m % COMBINE == 0


def test_forward_and_backward_of_similarity_lse_round_alike() -> None:
    from sslfast.kernels._common import INTERPRETER
    from sslfast.kernels._nt_xent_configs import NARROW
    from sslfast.kernels._similarity_lse_configs import FORWARD, OWNER

    for row, forward in FORWARD.items():
        architecture, size, wide = row
        owner = OWNER[row]
        if size == 4 or architecture == INTERPRETER:
            assert forward.block_k == owner.block_k
        if architecture == INTERPRETER:
            assert (forward.block_m, forward.block_n) == (owner.block_m, owner.block_n)
        if not wide:  # one product of all features, whose other factor is the rows of the second product
            assert forward.block_k == owner.block_k == owner.block_d == NARROW[size]


def test_products_of_the_sigmoid_loss_stay_finite() -> None:
    """One logarithm for the product of block_n factors of up to 2."""
    from sslfast.kernels._similarity_lse_configs import OWNER

    assert all(config.block_n <= 64 for config in OWNER.values())


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        try:
            result = compile_one(*case)
        except Exception as error:  # reported by the test of this case
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps({"case": case, **result}), flush=True)
