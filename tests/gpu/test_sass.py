"""The reader of machine code, on listings with and without an overwritten register."""

from __future__ import annotations

import pytest

from sass import hazards, parse, written

WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR36], R24, gsb0"  # sums in R24 to R39, left factor in R40 to R43


def listing(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends with a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/              {line} ;"
        for i, line in enumerate(lines)
    )


HAZARDS = {
    "left factor": (PRODUCT, "MOV R43, R1", WAIT),
    "sums": (PRODUCT, "FADD R39, R1, R2", WAIT),
    "guarded": (PRODUCT, "@P0 MOV R43, R1", WAIT),
    "second of a pair": (PRODUCT, "CS2R R42, SRZ", WAIT),
    "last of four": (PRODUCT, "LDG.E.128 R37, desc[UR16][R2.64]", WAIT),
    "matrix from shared memory": (PRODUCT, "LDSM.16.M88.4 R37, [R2]", WAIT),
    "after a predicate": (PRODUCT, "SHFL.BFLY PT, R40, R1, 0x1, 0x1f", WAIT),
    "across the loop's back edge": (
        ".L_x_0:",
        "IMAD.WIDE R42, R1, 0x4, R2",
        WAIT,
        PRODUCT,
        "@P0 BRA `(.L_x_0)",
        WAIT,
    ),
    "on one branch": (PRODUCT, "@!P0 BRA `(.L_x_1)", WAIT, "EXIT", ".L_x_1:", "MOV R41, R1", WAIT),
    "on a branch by a uniform predicate": (PRODUCT, "BRA UP0, `(.L_x_1)", WAIT, "EXIT", ".L_x_1:", "MOV R41, R1", WAIT),
    "where threads meet again": (
        "BSSY B0, `(.L_x_1)",
        PRODUCT,
        "BSYNC B0",
        "EXIT",
        ".L_x_1:",
        "MOV R41, R1",
        WAIT,
    ),
    "in a function": (
        PRODUCT,
        "CALL.REL.NOINC `($divide)",
        WAIT,
        "EXIT",
        "$divide:",
        "MOV R40, R1",
        "RET.REL.NODEC R2",
    ),
    "its group is not the one waited for": (
        PRODUCT.replace("R40", "R44"),
        PRODUCT,
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "MOV R40, R1",
        WAIT,
    ),
    "its group is not closed": (PRODUCT.replace(", gsb0", ""), WAIT, "MOV R40, R1"),
    "by the sums of another product": (PRODUCT, PRODUCT.replace("R24", "R40").replace("R40, g", "R80, g"), WAIT),
}
CLEAN = {
    "after the wait": (PRODUCT, WAIT, "MOV R40, R1"),
    "before the product": ("MOV R40, R1", PRODUCT, WAIT),
    "next to the registers": (PRODUCT, "MOV R44, R1", "CS2R R22, SRZ", "LDG.E.128 R20, desc[UR16][R2.64]", WAIT),
    "only read": (PRODUCT, "STS.128 [R40], R40", "ISETP.GE.AND P0, PT, R40, R41, PT", "STG.E [R2.64], R42", WAIT),
    "into uniform registers": (PRODUCT, "R2UR UR40, R40", "ULDC.64 UR40, c[0x0][0x208]", WAIT),
    "a branch that is never reached": (PRODUCT, "BRA `(.L_x_1)", "MOV R40, R1", ".L_x_1:", WAIT),
    "the sums go on": (PRODUCT, PRODUCT, WAIT),
    "an older group": (PRODUCT, PRODUCT.replace("R40", "R44"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R40, R1", WAIT),
    "both factors in shared memory": ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR36], R24, gsb0", "MOV R40, R1", WAIT),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_an_overwritten_register_is_found(name: str) -> None:
    result = hazards(listing(*HAZARDS[name]))
    assert len(result.found) == 1 and result.in_registers >= 1, result


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_where_nothing_is_overwritten(name: str) -> None:
    result = hazards(listing(*CLEAN[name]))
    assert result.found == [] and (result.in_registers > 0) == ("R40, gdesc" in CLEAN[name][0] + CLEAN[name][1])


@pytest.mark.parametrize(
    "line, registers",
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", range(24, 88)),
        ("HGMMA.64x128x16.F16 R24, gdesc[UR4], R24", range(24, 56)),
        ("HMMA.16816.F32.BF16 R8, R12, R16, R8", range(8, 12)),
        ("IMAD.WIDE.U32 R6, R95, 0x4, R6", range(6, 8)),
        ("LDG.E.LTC128B R6, desc[UR16][R2.64]", range(6, 7)),
        ("LDG.E.64 R6, desc[UR16][R2.64]", range(6, 8)),
        ("CS2R.32 R6, SR_CLOCKLO", range(6, 7)),
        ("IADD3 R6, P1, R2, R3, RZ", range(6, 7)),
        ("IADD3 RZ, P1, R2, R3, RZ", range(0)),
        ("LDGSTS.E.BYPASS.128 [R5], desc[UR16][R2.64]", range(0)),
        ("FSETP.GT.AND P1, PT, R5, R6, PT", range(0)),
        ("EXIT", range(0)),
    ],
)
def test_registers_that_are_written(line: str, registers: range) -> None:
    (instruction,) = parse(listing(line)).instructions
    assert written(instruction) == registers


def test_a_jump_to_an_address_in_a_register_is_refused() -> None:
    with pytest.raises(ValueError, match="BRX R2"):
        hazards(listing(PRODUCT, "BRX R2 -0x10", WAIT))
