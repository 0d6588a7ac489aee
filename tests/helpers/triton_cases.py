"""Which kernels ``test_triton_aot.py`` compiles, and how: a kernel is one entry of KERNELS."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ARCHITECTURES = (80, 86, 90, 100)


class Case(NamedTuple):
    """One kernel compiled once."""

    kernel: str  # its key in KERNELS
    launch: str
    architecture: int
    dtype: str  # of the inputs
    features: int
    precision: str  # input_precision of tl.dot, which 16-bit inputs ignore

    def __str__(self) -> str:
        return "-".join(map(str, self))


@dataclass(frozen=True)
class Sweep:
    """Numbers of features to compile a kernel for, by dtype.

    ``quick``: of its first launch, on Hopper in every run; ``first``, ``others``: of its first launch and of its other
    ones on every architecture, see :func:`full`. Where the kernel does not know D when it is compiled, the table of its
    tiles has rows for small results and for large ones, and the numbers are 0 and 1.
    """

    quick: dict[str, tuple[int, ...]]
    first: dict[str, tuple[int, ...]]
    others: dict[str, tuple[int, ...]]
    knows_features: bool = True


# Both rows of each dtype in the tables (NARROW in kernels/_configs.py); bfloat16 has whole tiles and float16 a masked
# tail, and so has float32 in its wide row. Other numbers of features change how often a loop runs.
FEATURES = {"bf16": (128, 512), "fp16": (104, 304), "fp32": (32, 304)}
SIMILARITY = Sweep(quick={"bf16": (128, 512)}, first=FEATURES, others={"bf16": (512,), "fp32": (304,)})
# Weights of bands: wide rows first of all, which the narrow ones rarely reach.
BANDS = Sweep(quick={"bf16": (512,)}, first=FEATURES, others={"bf16": (512,), "fp32": (304,)})
SECOND_MOMENT = Sweep(
    quick={"bf16": (0, 1)},
    first={"bf16": (0, 1), "fp16": (0, 1), "fp32": (0, 1)},
    others={"bf16": (1,), "fp32": (1,)},
    knows_features=False,
)


@dataclass(frozen=True)
class Kernel:
    """How a kernel is launched.

    Attributes:
        module: where it is in ``sslfast.kernels``.
        launches: each by the arguments that are None in it, and constants. The first has most of everything, and
            presses hardest on the registers.
        table: ``module.NAME`` of the table of its tiles; "" for a kernel without products.
        sweep: numbers of features, of a kernel with products.
        constants: compile-time arguments of a kernel without products.
        num_warps: of a kernel without products.
        dtypes: of the inputs of a kernel without products.
        exact: it is launched with ``EXACT`` of ``sslfast.kernels._tiles``.
        explicit_fma: multiply-adds are in it nevertheless: log2 is a polynomial of them.
    """

    module: str
    launches: dict[str, str] = field(default_factory=lambda: {"": ""})
    table: str = ""
    sweep: Sweep | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    dtypes: tuple[str, ...] = ("fp32",)
    exact: bool = True
    explicit_fma: bool = False


def kind(flags: str, **numbers: int) -> dict[str, int]:
    """Constants of second_moment's columns for one kind of losses: which flags are set, and SCALE, PENALTY, PHASE."""
    names = ("CROSS", "DUAL", "CENTER", "DISTANCE", "TRANSPOSED", "DX_TRANSPOSED")
    return {**{name: name in flags.split() for name in names}, "UPCAST": False, "CHUNKS": 16, "VIEWS": 2, **numbers}


# By kinds of losses, and by how a launch has its rows: all of a column, or those of one chunk.
COLUMNS = {
    "barlow": ("Partial", kind("CROSS DUAL CENTER", SCALE=1, PENALTY=1, PHASE=0)),
    "vibcreg": ("Partial", kind("DUAL CENTER", SCALE=2, PENALTY=2, PHASE=0)),
    "partial": ("", kind("CROSS CENTER", SCALE=1, PENALTY=1, PHASE=1)),
    "rest": ("", kind("CROSS CENTER", SCALE=1, PENALTY=1, PHASE=2)),
    "spectral": ("Partial", kind("CROSS TRANSPOSED", SCALE=2, PENALTY=3, PHASE=0)),
    "one": ("B Partial", kind("DUAL CENTER", SCALE=0, PENALTY=0, PHASE=0)),
}
APART = "GradOff GradDiagonal GradDistance"  # which the gradient of a loss as a whole has not
GRADIENT = {
    "barlow": (f"Partial {APART}", kind("CROSS DUAL CENTER", SCALE=1, PENALTY=1, PHASE=0)),
    "vibcreg": (f"Partial {APART}", kind("DUAL CENTER DISTANCE", SCALE=2, PENALTY=2, PHASE=0)),
    "sums": ("Partial GradLoss", kind("DUAL CENTER DISTANCE", SCALE=2, PENALTY=0, PHASE=0)),
    "partial": (APART, kind("CROSS CENTER", SCALE=1, PENALTY=1, PHASE=1)),
    "rest": (APART, kind("CENTER DISTANCE", SCALE=2, PENALTY=2, PHASE=2)),
    "spectral": (f"Partial {APART}", kind("CROSS TRANSPOSED DX_TRANSPOSED", SCALE=2, PENALTY=3, PHASE=0)),
    "without sums": (f"Partial {APART}", kind("CROSS DUAL TRANSPOSED DX_TRANSPOSED", SCALE=0, PENALTY=3, PHASE=2)),
}
MOMENT_TILES = {"wide": ("bf16", {"ROWS": 32, "COLS": 64}), "narrow": ("fp32", {"ROWS": 128, "COLS": 16})}

# What follows a "/" tells kernels apart that are one function by two tables, or by other constants. Kernels that
# subtract no maximum are not exact: a fused multiply-add does no harm in the pairwise sigmoid loss and in second
# moments.
KERNELS = {
    "nt_xent_forward": Kernel(
        "nt_xent",
        launches={"maxima": "BOUNDED=0", "bounded": "BOUNDED=1"},
        table="_configs.NT_XENT_FORWARD",
        sweep=SIMILARITY,
    ),
    "nt_xent_backward": Kernel("nt_xent_backward", table="_configs.NT_XENT_BACKWARD", sweep=SIMILARITY),
    "nt_xent_merge": Kernel("nt_xent", constants={"BLOCK": 128, "ROWS": 32, "PARTS": 64}, explicit_fma=True),
    "nt_xent_stats": Kernel("nt_xent_backward", constants={"BLOCK": 64}, num_warps=1),
    "similarity_forward": Kernel(
        "similarity_lse",
        launches={
            "all": "QNorm KNorm BOUNDED=0",
            "columns": "Bias RowIds ColIds ColRanges Hardest BOUNDED=0",
            "rows": "Bias RowIds ColIds ColRanges ColPartial Hardest BOUNDED=0",
            "bounded": "Bias Hardest BOUNDED=1",
        },
        table="_configs.SIMILARITY_FORWARD",
        sweep=SIMILARITY,
    ),
    "similarity_backward": Kernel(
        "similarity_lse_backward",
        launches={
            "dq": "ABias BPositives Sums",
            "dk": "BBias APositives",
            "rows": "BWeights ABias BBias AIds BIds BPositives BRanges Sums",
        },
        table="_configs.SIMILARITY_OWNER",
        sweep=SIMILARITY,
    ),
    "similarity_weights": Kernel("similarity_bands", constants={"BLOCK": 256}, num_warps=2),
    "similarity_band": Kernel(
        "similarity_bands",
        launches={
            "columns": "Bias RowIds ColIds ColRanges ColSums PAIRS=0",
            "rows": "ColWeights ColInRange Bias RowIds ColIds Positives GradPositive ColRanges ColSums PAIRS=0",
            "pairs": "Bias RowIds ColIds Positives ColRanges ColSums PAIRS=1",
        },
        table="_configs.SIMILARITY_WEIGHTS",
        sweep=BANDS,
    ),
    "similarity_band/ids": Kernel(
        "similarity_bands",
        launches={"all": "PAIRS=0", "rows": "ColWeights ColInRange Bias Positives GradPositive ColSums PAIRS=0"},
        table="_configs.SIMILARITY_FORWARD",
        sweep=BANDS,
    ),
    "similarity_finish": Kernel("similarity_bands", constants={"D": 512, "ROWS": 16, "WIDTH": 128}),
    "similarity_attend": Kernel(
        "similarity_lse_attend",
        launches={"all": "V", "rows": "V Bias RowIds ColIds ColRanges", "values": "RowIds ColIds ColRanges"},
        table="_configs.SIMILARITY_OWNER",
        sweep=SIMILARITY,
    ),
    "prototype_attend_backward": Kernel("prototype_cross_entropy", table="_configs.SIMILARITY_OWNER", sweep=SIMILARITY),
    "similarity_attend_merge": Kernel("similarity_lse_attend", constants={"D": 128, "PARTS": 16, "BLOCK_D": 128}),
    "nearest_neighbours": Kernel(
        "nearest_neighbours",
        launches={
            "several": "Best ITSELF=0",
            "all": "Bias RowIds ColIds ColRanges Keys ITSELF=1",
            "rows": "Bias Keys ITSELF=0",
            "by distance": "RowIds ColIds ColRanges Keys ITSELF=1",
        },
        table="_configs.NEAREST_NEIGHBOURS",
        sweep=SIMILARITY,
    ),
    "neighbour_distance": Kernel("neighbour_distance", constants={"D": 384, "PAIRS": 4, "BLOCK_D": 512}),
    "neighbour_gradient": Kernel(
        "neighbour_distance",
        launches={"": ""},
        constants={"D": 384, "BLOCK_D": 512},
        dtypes=("fp32", "bf16"),
    ),
    "similarity_logsigmoid": Kernel(
        "similarity_logsigmoid",
        launches={"all": "", "loss": "DA Dots", "gradient": "Loss Sums"},
        table="_configs.SIMILARITY_OWNER",
        sweep=SIMILARITY,
        exact=False,
    ),
    "similarity_logsigmoid_band": Kernel(
        "similarity_logsigmoid_bands", table="_configs.SIMILARITY_WEIGHTS", sweep=BANDS, exact=False
    ),
    "gram_anchor": Kernel(
        "gram_anchor",
        launches={
            "clamp": "NEGATIVES=1 SYMMETRIC=1",
            "rows": "NEGATIVES=0 SYMMETRIC=0",
            "loss": "Weights NEGATIVES=2 SYMMETRIC=1",
        },
        table="_configs.GRAM_ANCHOR",
        sweep=BANDS,
        exact=False,
    ),
    "second_moment_gram": Kernel(
        "second_moment_tiles",
        launches={
            "dual": "B SquareSums DUAL=1",
            "self": "B SquareSums DUAL=0",
            "cross": "SquareSums DUAL=0",
            "squares": "B Moments DUAL=0",
        },
        table="_configs.MOMENT_GRAM",
        sweep=SECOND_MOMENT,
        exact=False,
    ),
    "second_moment_product": Kernel(
        "second_moment_tiles",
        launches={"transposed": "TRANSPOSED=1", "plain": "TRANSPOSED=0"},
        table="_configs.MOMENT_PRODUCT",
        sweep=SECOND_MOMENT,
        exact=False,
    ),
    **{
        f"{kernel}/{name} {tile_name}": Kernel(
            module,
            launches={"": absent},
            constants={**kind, **tile},
            num_warps=8,
            dtypes=(dtype,),
            exact=False,
        )
        for kernel, module, kinds in (
            ("second_moment_columns", "second_moment_columns", COLUMNS),
            ("second_moment_gradient", "second_moment_backward", GRADIENT),
        )
        for tile_name, (dtype, tile) in MOMENT_TILES.items()
        for name, (absent, kind) in kinds.items()
    },
    **{
        f"second_moment_off_diagonal/{name}": Kernel(
            "second_moment_off_diagonal",
            launches={"": "Operand Trace" if "squares" in name else ""},
            constants={"VIEWS": 2, "ROWS": 4, "BLOCK": 512, "IN_PLACE": in_place, "RANGED": ranged, **kind},
            dtypes=dtypes,
            exact=False,
        )
        for name, in_place, ranged, dtypes, kind in (
            ("cross dual", False, False, ("bf16",), {"CROSS": True, "DUAL": True}),
            ("cross dual in range", False, True, ("fp16",), {"CROSS": True, "DUAL": True}),
            ("cross in range", False, True, ("fp16",), {"CROSS": True, "DUAL": False}),
            ("pair in range", False, True, ("fp16",), {"CROSS": False, "DUAL": False}),
            ("in place", True, False, ("fp32",), {"CROSS": True, "DUAL": True}),
            ("squares", False, False, ("fp32",), {"CROSS": False, "DUAL": False}),
        )
    },
    "second_moment_totals": Kernel(
        "second_moment_off_diagonal",
        constants={"MATRICES": 2, "DISTANCE": True, "DUAL": True, "PENALTY": 2, "BLOCK": 1024},
        exact=False,
    ),
    "characteristic_sums": Kernel("characteristic_sums", constants={"ROWS": 64, "COLS": 32, "KNOTS": 16}, exact=False),
    "characteristic_gradient": Kernel(
        "characteristic_sums", constants={"ROWS": 64, "COLS": 32, "KNOTS": 16}, exact=False
    ),
    "unit_slices": Kernel("unit_slices", constants={"STREAM": 40960, "BLOCKS": 16, "COLS": 32}, exact=False),
    "merge": Kernel("_tiles", constants={"ROWS": 32, "PARTS": 64}, explicit_fma=True),
    "block_ranges": Kernel("_tiles", constants={"BLOCK": 64}, num_warps=1),
}
WITH_PRODUCTS = {name: kernel for name, kernel in KERNELS.items() if kernel.table}
# Arguments by name. Sizes that are kept from being specialised, and these, are integers; all that is not named here is
# a pointer to float32, or to int64 by the end of its name.
INTEGERS = {"D", "N", "x_stride", "dx_stride", "grad_off_stride", "grad_diagonal_row", "grad_diagonal_column"}
FLOATS = {"eps", "floor", "scale", "step", "off_weight", "distance_weight", "penalty_weight"}
# Of the inputs' type.
DATA = {"Z", "Q", "K", "V", "A", "B", "X", "Y", "Left", "Right", "Hat", "Operand", "GradA", "GradB", "W", "Own", "Out"}
FLOAT64 = {"SquareSums", "ColumnSums"}
INT64 = {"Best", "Keys", "Index", "Order", "Starts"}
INT32 = {"InRange", "RowInRange", "ColInRange"}


def argument_type(function: Any, name: str, dtype: str) -> str:
    """What a launch of the ``@triton.jit`` function passes."""
    if name in FLOATS:
        return "fp32"
    if name in INTEGERS or name in function.do_not_specialize:
        return "i32"
    if name in DATA:
        return f"*{dtype}"
    if name in INT32:
        return "*i32"
    if name in FLOAT64:
        return "*fp64"
    return "*i64" if name in INT64 or name.endswith(("Ids", "Positives", "Ranges", "Step")) else "*fp32"


def table_of(kernel: str) -> dict[tuple[int, int, bool], Any]:
    """The table of its tiles."""
    module, _, table = KERNELS[kernel].table.partition(".")
    return getattr(importlib.import_module(f"sslfast.kernels.{module}"), table)


def row_of(case: Case) -> tuple[int, int, bool]:
    """The row of its kernel's table that a case reaches."""
    from sslfast.kernels._configs import NARROW

    size = 4 if case.dtype == "fp32" else 2
    threshold = NARROW[size] if KERNELS[case.kernel].sweep.knows_features else 0
    return case.architecture, size, case.features > threshold


def _products(
    kernel: str,
    launches: list[str],
    sizes: dict[str, tuple[int, ...]],
    architecture: int,
    precisions: tuple[str, ...] = ("tf32x3",),
) -> list[Case]:
    return [
        Case(kernel, launch, architecture, dtype, features, precision)
        for launch in launches
        for dtype, all_features in sizes.items()
        for features in all_features
        for precision in (precisions if dtype == "fp32" else ("tf32",))
    ]


def _plain(kernel: str, architecture: int) -> list[Case]:
    return [Case(kernel, "", architecture, dtype, 0, "") for dtype in KERNELS[kernel].dtypes]


def quick(every_launch: bool) -> list[Case]:
    """On Hopper, by a narrow and a wide row."""
    cases = []
    for name, kernel in KERNELS.items():
        launches = list(kernel.launches)[: None if every_launch else 1]
        cases += _products(name, launches, kernel.sweep.quick, 90) if kernel.sweep else _plain(name, 90)
    return cases


def full(architecture: int) -> list[Case]:
    """Every kernel in every dtype by every row of its table, without a case that would prove what another one proves.

    - The first launch has most of everything: it alone is compiled in every dtype and by every row. The other launches,
      which leave arguments out, take bfloat16 and float32 by their wide rows, and on Hopper what ``quick`` has.
    - Three products of TF32 contain one, and need more registers. One alone is compiled on Hopper, where each ``wgmma``
      is looked at.
    - 8.6 has the instructions of 8.0, and tables of its own: the first launch by every row.
    - Without products it is the same code everywhere: compiled for the oldest, for the newest, and in the quick tests
      for Hopper.
    """
    cases = []
    for name, kernel in KERNELS.items():
        if kernel.sweep:
            first, *others = kernel.launches
            precisions = ("tf32x3", "tf32") if architecture == 90 else ("tf32x3",)
            cases += _products(name, [first], kernel.sweep.first, architecture, precisions)
            if architecture != 86:
                cases += _products(name, others, kernel.sweep.others, architecture)
        elif architecture in (80, 100):
            cases += _plain(name, architecture)
    cases += [case for case in EVERY_LAUNCH if case.architecture == architecture]
    return [case for case in dict.fromkeys(cases) if case not in QUICK]


# In every run of the tests, in every run under another Triton, and beside the former in every full run.
QUICK, EVERY_LAUNCH = quick(every_launch=False), quick(every_launch=True)
FULL = [case for architecture in ARCHITECTURES for case in full(architecture)]
