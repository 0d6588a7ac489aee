"""Reads Hopper's machine code (SASS): does anything overwrite a register that a running ``wgmma`` still uses?

``wgmma`` (``HGMMA``) runs on after the next instruction has started. From there to the ``WARPGROUP.DEPBAR`` that waits
for its group, two kinds of registers are not free: those of its left factor, where that is in registers and not in
shared memory, and those of its sums. Some versions of ptxas up to 12.9 can reuse the former too early, and the products
are then wrong without a sign; from 13.1 on they are right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

# Instructions whose first register is read, after the predicates that some of them write. What writes memory, uniform
# registers or predicates alone starts with another kind of operand.
READERS = re.compile(r"\w*SETP|FCHK|R2P|BAR|BRX|JMX|RET|CALL|WARPSYNC|NANOSLEEP|SYNCS|UTMA\w*|DEPBAR")
PRODUCT = re.compile(r"[HIQB]GMMA")
LEFT_REGISTERS = 4  # a thread's part of a left factor in registers, whatever the type
LABEL = re.compile(r"`\(([^)]+)\)")
MOST_GROUPS = 8  # committed after a product's own; ptxas never leaves so many running


@dataclass
class Instruction:
    guarded: bool  # it may be skipped: @P0
    name: str  # HGMMA
    suffixes: list[str]  # 64x32x8, F32, TF32
    operands: list[str]

    def __str__(self) -> str:
        return f"{'.'.join((self.name, *self.suffixes))} {', '.join(self.operands)}"


@dataclass
class Program:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the index of the instruction that follows


def parse(listing: str) -> Program:
    """A program from what ``nvdisasm -c`` prints."""
    program = Program()
    for line in listing.splitlines():
        label = re.match(r"\s*([.$\w]+):\s*$", line)
        if label:
            program.labels[label[1]] = len(program.instructions)
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;", line)
        if found:
            guard, opcode, operands = found.groups()
            name, *suffixes = opcode.split(".")
            program.instructions.append(
                Instruction(bool(guard), name, suffixes, [o.strip() for o in operands.split(",")] if operands else [])
            )
    return program


def successors(program: Program) -> list[list[int]]:
    """Of each instruction, the indices of those that may follow: more than can happen where that is hard to say."""
    meets = defaultdict(list)  # where the threads of a barrier register go on
    for instruction in program.instructions:
        if instruction.name == "BSSY":
            meets[instruction.operands[0]] += _targets(program, instruction)
    following = []
    for index, instruction in enumerate(program.instructions):
        if instruction.name in ("BRX", "JMX"):
            raise ValueError(f"cannot tell where {instruction} goes")
        after = _targets(program, instruction)
        if instruction.name == "BSYNC":
            after = after + meets[instruction.operands[0]]
        jumps = instruction.name in ("BRA", "JMP") and len(instruction.operands) == 1
        ends = instruction.name in ("EXIT", "RET", "KILL")
        if (instruction.guarded or not (jumps or ends)) and index + 1 < len(program.instructions):
            after = [index + 1, *after]
        following.append(after)
    return following


def _targets(program: Program, instruction: Instruction) -> list[int]:
    labels = [label for operand in instruction.operands for label in LABEL.findall(operand)]
    return [program.labels[label] for label in labels if program.labels[label] < len(program.instructions)]


def written(instruction: Instruction) -> range:
    """The general registers that an instruction writes."""
    if READERS.fullmatch(instruction.name):
        return range(0)
    operands = (operand for operand in instruction.operands if not re.match(r"!?U?P(\d|T)", operand))
    first = re.match(r"R(\d+)", next(operands, ""))
    if not first:
        return range(0)
    return range(int(first[1]), int(first[1]) + _width(instruction))


def _width(instruction: Instruction) -> int:
    """How many registers make up the result."""
    name, suffixes = instruction.name, instruction.suffixes
    if PRODUCT.fullmatch(name):  # 64x32x8: a row of 32 sums takes four threads
        return int(suffixes[0].split("x")[1]) // (4 if "F16" in suffixes[1:2] else 2)
    if name in ("HMMA", "IMMA", "QMMA"):
        return 2 if "F16" in suffixes[1:2] else 4
    if name == "LDSM":
        return int(next((s for s in suffixes if s in ("2", "4")), "1"))
    if name in ("DADD", "DMUL", "DFMA") or "128" not in suffixes and ("64" in suffixes or "WIDE" in suffixes):
        return 2
    if name == "CS2R":
        return 1 if "32" in suffixes else 2
    return 4 if "128" in suffixes else 1


@dataclass
class Hazards:
    in_registers: int  # products whose left factor is in registers
    found: list[str]


def hazards(listing: str) -> Hazards:
    """Every write to registers of a product that may be running, along all branches."""
    program = parse(listing)
    following = successors(program)
    result = Hazards(0, [])
    for index, product in enumerate(program.instructions):
        if not PRODUCT.fullmatch(product.name):
            continue
        left = re.match(r"R(\d+)", product.operands[1])
        result.in_registers += left is not None
        factor = set(range(int(left[1]), int(left[1]) + LEFT_REGISTERS)) if left else set()
        sums = set(written(product))
        for other in while_running(program, following, index):
            instruction = program.instructions[other]
            # Products run in order, so one may go on with the sums of another.
            busy = factor if PRODUCT.fullmatch(instruction.name) else factor | sums
            both = busy.intersection(written(instruction))
            if both:
                result.found.append(f"{instruction} writes R{min(both)} of {product}")
    return result


def while_running(program: Program, following: list[list[int]], product: int) -> Iterator[int]:
    """The instructions that may be reached before a wait for the product at that index."""
    commits = "gsb0" in program.instructions[product].operands
    seen: set[tuple[int, int]] = set()
    # By index and number of groups committed since; -1 while the product's own is not.
    stack = [(after, 0 if commits else -1) for after in following[product]]
    while stack:
        index, groups = state = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        instruction = program.instructions[index]
        if instruction.name == "WARPGROUP" and instruction.suffixes[0] == "DEPBAR":
            if groups >= int(instruction.operands[-1], 0):  # so many of the newest may go on
                continue
        elif PRODUCT.fullmatch(instruction.name) and "gsb0" in instruction.operands:
            groups = min(groups + 1, MOST_GROUPS)
        yield index
        stack += [(after, groups) for after in following[index]]
