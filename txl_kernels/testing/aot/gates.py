"""What the machine code of a shipped launch must hold: spills, shared memory, tensor cores."""

from __future__ import annotations

import dataclasses
from typing import Literal

from txl_kernels.testing.aot import sass
from txl_kernels.testing.aot.build import Binary

# How a kernel's products must run. "hopper": HGMMA on sm_90, HMMA before. "tensor": either.
# "none": not on tensor cores, as tf32 would round float32. "no products": it has none.
Products = Literal["hopper", "tensor", "none", "no products"]

# Bytes of shared memory that one block may ask for.
SHARED_LIMIT = {80: 166912, 90: 232448}
TENSOR_OPCODES = ("HGMMA", "HMMA")


@dataclasses.dataclass(frozen=True)
class Gate:
    """What is asked of a kernel.

    Attributes:
        products: see `Products`.
        shuffles: SHFL in the main loop at most: those of its reductions along a row. The rotation
            of the position scores has none; as a 2-D gather it would have at least 64.
    """

    products: Products
    shuffles: int


@dataclasses.dataclass(frozen=True)
class Spill:
    """Bytes per thread that a launch may keep on the stack, and why that was accepted."""

    most: int
    why: str


# The only spills: by kernel, architecture and the parts of a launch's name that single it out.
SPILLS: dict[tuple[str, int, tuple[str, ...]], Spill] = {}


def failures(name: str, binary: Binary, gate: Gate) -> list[str]:
    """One sentence for each thing that does not hold; empty where all does."""
    found = []
    allowed = allowed_spill(name, binary)
    if binary.code.stack > allowed:
        found.append(f"{binary.code.stack} bytes per thread are spilled, {allowed} are justified")
    if binary.shared > SHARED_LIMIT[binary.arch]:
        limit = SHARED_LIMIT[binary.arch]
        found.append(f"{binary.shared} bytes of shared memory, sm_{binary.arch} has {limit}")
    counts = sass.count(binary.code.main_loop())
    present = [opcode for opcode in TENSOR_OPCODES if counts.get(opcode)]
    anywhere = sass.count(binary.code.instructions)
    if gate.products == "hopper" and binary.arch >= 90:
        if present != ["HGMMA"]:
            found.append(
                f"products in the loop run as {present or 'no'} tensor instructions, not HGMMA"
            )
    elif gate.products in ("hopper", "tensor"):
        if not present:
            found.append("no tensor-core instruction in the loop")
    elif any(anywhere.get(opcode) for opcode in TENSOR_OPCODES):
        found.append("tensor-core instructions where there must be none")
    if counts.get("SHFL", 0) > gate.shuffles:
        found.append(f"{counts['SHFL']} SHFL in the loop, its reductions need {gate.shuffles}")
    return found


def allowed_spill(name: str, binary: Binary) -> int:
    """Bytes per thread that `SPILLS` allows this launch."""
    return max(
        (
            spill.most
            for (kernel, arch, parts), spill in SPILLS.items()
            if kernel == binary.launch.name
            and arch == binary.arch
            and all(part in name for part in parts)
        ),
        default=0,
    )


def row_shuffles(block_rows: int, num_warps: int, reductions: int = 2) -> int:
    """SHFL that `reductions` along the rows of a tile cost: in the layout of a product's result a
    row lies in four lanes (two steps), and a thread holds 2 rows of each 16 of its warp."""
    rows_per_thread = max(2 * block_rows // (16 * num_warps), 2)
    return 2 * reductions * rows_per_thread
