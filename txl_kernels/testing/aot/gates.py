"""What the machine code of a shipped launch must hold: spills, shared memory, tensor cores."""

from __future__ import annotations

import dataclasses
from typing import Literal

from txl_kernels.testing.aot import sass, ttir
from txl_kernels.testing.aot.build import Binary

# How a kernel's products must run. "hopper": HGMMA on sm_90, HMMA before. "tensor": either.
# "none": not on tensor cores, as tf32 would round float32. "no products": it has none.
Products = Literal["hopper", "tensor", "none", "no products"]

# Versions of Triton whose machine code is held to the gates: the one that tests pin and torch 2.11
# brings, and the one that torch 2.13's CUDA build requires.
TRITON_VERSIONS = ("3.6.0", "3.7.1")

# Bytes of shared memory that one block may ask for.
SHARED_LIMIT = {80: 166912, 90: 232448}
TENSOR_OPCODES = ("HGMMA", "HMMA")


@dataclasses.dataclass(frozen=True)
class Gate:
    """What is asked of a kernel.

    Attributes:
        products: see `Products`.
        shuffles: SHFL in the main loop at most: those of its reductions along a row. The rotation
            of the position scores has none; as a 2-D gather it would have at least 64. None where
            nothing is rotated.
    """

    products: Products
    shuffles: int | None


@dataclasses.dataclass(frozen=True)
class Spill:
    """Bytes per thread that a launch may keep on the stack, and why that was accepted.

    Attributes:
        loop: instructions of the main loop that may move some of them; by default none.
    """

    most: int
    why: str
    loop: int = 0


# The only spills, the larger of the two versions': by kernel, architecture and the parts of a
# launch's name that single it out.
_FLOAT32 = "float32 rows above 64 wide fill the registers in front of the loop, which spills none"
_FEWER_WARPS = "with more warps nothing spills, and the model expects a third more time at least"
_AROUND = "what only the code around the loop needs makes room for the loop, which spills none"
_FLOAT32_GRADIENTS = (
    "float32 tiles of 16 x 16 are the smallest, and wide rows still fill the registers"
)
_NO_SMALLER_TILE = "smaller tiles that spill less, where there are any, take longer by the model"
_ODD = "rows of 41 elements are loaded one by one, with a mask for each"
_MORE_QUERIES = (
    "half as many queries spill less, and k, v and r are read and dr is added to for half as many "
    "pairs: the model expects a sixth to a half more time"
)
_TWICE = (
    "with eight warps nothing spills, and all is multiplied twice: an eighth more time by the model"
)
_TF32 = "float16 gradients are multiplied in TF32, whose operands take twice the registers"
_FWD = "_rel_attention_fwd_kernel"
_DKDV, _DQDR = "_rel_attention_bwd_dkdv_kernel", "_rel_attention_bwd_dqdr_kernel"
SPILLS: dict[tuple[str, int, tuple[str, ...]], Spill] = {
    (_FWD, 80, ("float32", "d128")): Spill(88, _FLOAT32),
    (_FWD, 90, ("float32", "d128")): Spill(112, _FLOAT32),
    (_FWD, 80, ("float32/head_256/",)): Spill(1288, _FLOAT32),
    (_FWD, 90, ("float32/head_256/",)): Spill(1288, _FLOAT32),
    (_FWD, 90, ("bfloat16/train_d128/",)): Spill(40, _FEWER_WARPS, 4),
    (_FWD, 90, ("bfloat16/enwik8_large_eval/",)): Spill(40, _FEWER_WARPS, 4),
    (_DQDR, 90, ("bfloat16/train_d64/",)): Spill(504, _MORE_QUERIES, 104),
    (_DQDR, 80, ("float32/train_d64/",)): Spill(16, _AROUND),
    (_DQDR, 90, ("float32/train_d64/",)): Spill(8, _AROUND),
    (_DKDV, 90, ("bfloat16/train_d128/",)): Spill(176, _FEWER_WARPS, 46),
    (_DQDR, 90, ("bfloat16/train_d128/",)): Spill(304, _TWICE, 56),
    (_DQDR, 80, ("bfloat16/train_d128/",)): Spill(176, _NO_SMALLER_TILE, 18),
    (_DQDR, 80, ("float32/train_d128/",)): Spill(256, _FLOAT32_GRADIENTS, 4),
    (_DQDR, 90, ("float32/train_d128/",)): Spill(328, _FLOAT32_GRADIENTS, 7),
    (_DQDR, 80, ("bfloat16/head_256/",)): Spill(616, _NO_SMALLER_TILE, 144),
    (_DQDR, 80, ("float32/head_256/",)): Spill(2264, _FLOAT32_GRADIENTS, 345),
    (_DQDR, 90, ("float32/head_256/",)): Spill(2200, _FLOAT32_GRADIENTS, 313),
    (_DQDR, 90, ("float16/train_d64/",)): Spill(504, _MORE_QUERIES, 104),
    (_DQDR, 80, ("bfloat16/head_32/",)): Spill(40, _AROUND),
    (_DQDR, 90, ("bfloat16/head_32/",)): Spill(464, _MORE_QUERIES, 114),
    (_DKDV, 80, ("bfloat16/head_41/",)): Spill(416, _ODD, 152),
    (_DQDR, 90, ("bfloat16/head_41/",)): Spill(896, _MORE_QUERIES, 240),
    (_DQDR, 80, ("bfloat16/head_192_values_40/",)): Spill(488, _NO_SMALLER_TILE, 129),
    (_DQDR, 90, ("bfloat16/parakeet_10min/",)): Spill(560, _MORE_QUERIES, 123),
    (_DQDR, 90, ("bfloat16/no_memory/",)): Spill(600, _MORE_QUERIES, 136),
    (_DQDR, 80, ("bfloat16/mask/",)): Spill(56, _AROUND),
    (_DQDR, 90, ("bfloat16/padding/",)): Spill(560, _MORE_QUERIES, 121),
    (_DKDV, 90, ("bfloat16/dropout/",)): Spill(8, _NO_SMALLER_TILE, 2),
    (_DQDR, 80, ("bfloat16/dropout/",)): Spill(112, _NO_SMALLER_TILE, 3),
    (_DQDR, 90, ("bfloat16/clamp/",)): Spill(624, _MORE_QUERIES, 114),
    (_DQDR, 90, ("bfloat16/window/",)): Spill(504, _MORE_QUERIES, 104),
    (_DQDR, 80, ("bfloat16/chunk/",)): Spill(40, _AROUND),
    (_DKDV, 90, ("bfloat16/chunk/",)): Spill(72, _NO_SMALLER_TILE, 19),
    (_DQDR, 90, ("bfloat16/chunk/",)): Spill(856, _MORE_QUERIES, 290),
    (_DQDR, 90, ("bfloat16/softcap/",)): Spill(672, _MORE_QUERIES, 168),
    (_DQDR, 90, ("bfloat16/deterministic/",)): Spill(504, _MORE_QUERIES, 104),
    ("_adaptive_tails_dweight_kernel", 80, ("float16/wt103_large/",)): Spill(24, _TF32),
}


def failures(name: str, binary: Binary, gate: Gate) -> list[str]:
    """One sentence for each thing that does not hold; empty where all does."""
    found = []
    counts = sass.count(binary.code.main_loop())
    allowed, allowed_moves = allowed_spill(name, binary)
    if binary.code.stack > allowed:
        found.append(f"{binary.code.stack} bytes per thread are spilled, {allowed} are justified")
    moves = counts.get("LDL", 0) + counts.get("STL", 0)
    if moves > allowed_moves:
        found.append(f"{moves} spilled values move in the loop, {allowed_moves} are justified")
    if binary.shared > SHARED_LIMIT[binary.arch]:
        limit = SHARED_LIMIT[binary.arch]
        found.append(f"{binary.shared} bytes of shared memory, sm_{binary.arch} has {limit}")
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
    if gate.shuffles is not None and counts.get("SHFL", 0) > gate.shuffles:
        found.append(f"{counts['SHFL']} SHFL in the loop, its reductions need {gate.shuffles}")
    for line in ttir.descending_comparisons(binary.ir):
        found.append(f"Triton compiles this wrongly, the operand descends with a range: {line}")
    return found


def allowed_spill(name: str, binary: Binary) -> tuple[int, int]:
    """Bytes per thread, and LDL and STL in the loop, that `SPILLS` allows this launch."""
    return max(
        (
            (spill.most, spill.loop)
            for (kernel, arch, parts), spill in SPILLS.items()
            if kernel == binary.launch.name
            and arch == binary.arch
            and all(part in name for part in parts)
        ),
        default=(0, 0),
    )


def row_shuffles(block_rows: int, num_warps: int, arch: int, reductions: int = 2) -> int:
    """SHFL that `reductions` along the rows of a tile may cost.

    In the layout of a product's result a row lies in four lanes (two steps), and a thread holds 2
    rows of each 16 of its warp. Where two warps share a row a step more joins the halves; without
    HGMMA (before sm_90, or under 64 rows) each of them then holds twice the rows.
    """
    shuffles = 2 * reductions * max(2 * block_rows // (16 * num_warps), 2)
    if arch < 90 or block_rows < 64:
        return 2 * shuffles + 2 * reductions
    return shuffles + 2 * reductions * (16 * num_warps > block_rows)
