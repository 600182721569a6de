"""A static model of speed: from the machine code of a launch to the time it should take.

A model, not a measurement. It counts what one block's loop asks of each pipe of a multiprocessor,
in clocks. Within a block the tensor cores and the arithmetic between two products take turns, as
they depend on each other; blocks that share a multiprocessor hide a part of that, `OVERLAP`.
Bank conflicts, waiting for memory and the order of instructions are not seen.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from txl_kernels.testing.aot import sass
from txl_kernels.testing.aot.build import Binary
from txl_kernels.testing.aot.sass import Instruction


@dataclasses.dataclass(frozen=True)
class Processor:
    """What the model knows of a GPU.

    Attributes:
        clock: Hz that a kernel busy with tensor cores holds, below the boost clock.
        bandwidth: bytes/s that a copy reaches.
        tensor: FLOP per clock and multiprocessor, 16-bit, dense.
        warp_share: what products by single warps (HMMA) reach of `tensor`.
        library: FLOP/s of torch's own products of large 16-bit matrices.
        l2: bytes per clock and multiprocessor.
    """

    name: str
    arch: int
    n_sm: int
    clock: float
    bandwidth: float
    tensor: int = 4096
    warp_share: float = 0.62
    library: float = 7.0e14
    l2: float = 28.0
    registers: int = 65536
    shared: int = 233472
    max_warps: int = 64


# Clocks: 132 SMs at 1.5 GHz make 811 TFLOP/s, where products of large matrices measure 769-798.
H100 = Processor("H100", 90, n_sm=132, clock=1.5e9, bandwidth=3.0e12)
H200 = Processor("H200", 90, n_sm=132, clock=1.5e9, bandwidth=4.3e12)
GPUS = (H100, H200)

LAUNCH_SECONDS = 3e-6
OVERLAP = 0.25  # of what full overlap would save, where two blocks or more share a multiprocessor
BARRIER_CLOCKS = 30
_SCHEDULERS = 4
_SHARED_BYTES = 128  # per clock and multiprocessor
_MUFU_CLOCKS = 8  # 4 lanes of a warp at a time

_FP32 = {"FFMA", "FMUL", "FADD"}
# Spilled registers go the same way.
_SHARED_OPS = {"LDS", "STS", "LDSM", "STSM", "ATOMS", "LDL", "STL"}
_GLOBAL_OPS = {"LDG", "LDGSTS", "STG", "RED", "REDG", "ATOMG"}
_ISSUE_ONLY = {"BAR", "BRA", "NOP", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC"}
_TENSOR_OPS = {"HGMMA", "HMMA"}
_NOT_ALU = _FP32 | _SHARED_OPS | _GLOBAL_OPS | _ISSUE_ONLY | _TENSOR_OPS | {"MUFU", "SHFL", "IMAD"}
_LDSM_BYTES = {"1": 128, "2": 256, "4": 512}


@dataclasses.dataclass(frozen=True)
class Pipes:
    """Clocks of a multiprocessor that some instructions of one block keep each pipe busy.

    `loaded` are bytes between the multiprocessor and L2: those of every instruction.
    """

    tensor: float
    operands: float  # what tensor-core products read from shared memory
    issue: float
    fma: float  # float32 arithmetic, and integer multiply-add at half rate
    alu: float  # other integers, comparisons, selections, conversions: half rate
    exp: float
    shared: float
    barriers: float
    loaded: float

    @property
    def products(self) -> float:
        """Clocks of the tensor cores, their operands from shared memory included."""
        return max(self.tensor, self.operands)

    @property
    def between(self) -> float:
        """Clocks of what happens between two products."""
        busiest = max(self.issue, self.fma, self.alu, self.exp, self.shared)
        return busiest + self.barriers

    def clocks(self, resident: int, processor: Processor) -> float:
        """Clocks of a multiprocessor for one pass of one block, beside `resident - 1` others."""
        apart = self.products + self.between
        together = max(self.tensor, self.operands + self.shared, self.between)
        overlap = OVERLAP if resident > 1 else 0.0
        return max(apart - overlap * (apart - together), self.loaded / processor.l2)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Expected time of a launch.

    Attributes:
        seconds: in total.
        resident: blocks on a multiprocessor at a time.
        bound: what takes longest: "products", "between", "memory" or "launch".
    """

    seconds: float
    resident: int
    bound: str


def pipes(instructions: Iterable[Instruction], num_warps: int, processor: Processor) -> Pipes:
    """What `instructions`, run once by each of a block's warps, ask of the pipes."""
    code = list(instructions)
    flop = {
        kind: sass.tensor_flop((i for i in code if i.base == kind), num_warps)
        for kind in _TENSOR_OPS
    }
    n = sass.count(code)
    per_scheduler = num_warps / _SCHEDULERS
    fp32 = sum(n.get(opcode, 0) for opcode in _FP32)
    uniform = sum(times for opcode, times in n.items() if _is_uniform(opcode))
    alu = sum(times for opcode, times in n.items() if opcode not in _NOT_ALU) - uniform
    shared = sum(_bytes(i) for i in code if i.base in _SHARED_OPS) + 128 * n.get("SHFL", 0)
    return Pipes(
        tensor=flop["HGMMA"] / processor.tensor
        + flop["HMMA"] / (processor.tensor * processor.warp_share),
        operands=sum(_operand_bytes(i) for i in code) * (num_warps // 4) / _SHARED_BYTES,
        issue=len(code) * per_scheduler,
        fma=(fp32 + 2 * n.get("IMAD", 0)) * per_scheduler,
        alu=2 * alu * per_scheduler,
        exp=_MUFU_CLOCKS * n.get("MUFU", 0) * per_scheduler,
        shared=shared * num_warps / _SHARED_BYTES,
        barriers=BARRIER_CLOCKS * n.get("BAR", 0),
        loaded=sum(_bytes(i) for i in code if i.base in _GLOBAL_OPS) * num_warps,
    )


def loop_pipes(binary: Binary, processor: Processor) -> Pipes:
    """What a pass through the main loop asks of the pipes, as a rule.

    Bytes are the IR's where there is one: a number that many threads want is read from L2 once.
    """
    found = pipes(sass.steady(binary.code.main_loop()), binary.num_warps, processor)
    return dataclasses.replace(found, loaded=binary.loop_bytes or found.loaded)


def resident_blocks(binary: Binary, processor: Processor) -> int:
    """Blocks that fit on a multiprocessor by registers, shared memory and warps; 0: none does."""
    registers = 8 * math.ceil(binary.code.registers / 8) * 32 * binary.num_warps
    shared = binary.shared + 1024  # of which the system keeps 1 KiB per block
    return min(
        processor.registers // registers,
        processor.shared // shared,
        processor.max_warps // binary.num_warps,
        32,
    )


def passes_for(binary: Binary, flop: float) -> float:
    """Passes through the main loop that make so many FLOP of tensor-core products; 0 if none."""
    per_pass = sass.tensor_flop(binary.code.main_loop(), binary.num_warps)
    return flop / per_pass if per_pass else 0.0


def estimate(binary: Binary, passes: float, processor: Processor) -> Estimate:
    """The time of a whole launch; `passes` are those through the main loop, over all blocks.

    Each tensor that it is given is read or written at least once.
    """
    loop = binary.code.main_loop()
    inside = loop_pipes(binary, processor)
    in_loop = {i.address for i in loop}
    around = pipes(
        (i for i in binary.code.instructions if i.address not in in_loop),
        binary.num_warps,
        processor,
    )
    n_programs = binary.launch.n_programs
    resident = max(resident_blocks(binary, processor), 1)
    clocks = passes * inside.clocks(resident, processor)
    clocks += n_programs * around.clocks(resident, processor)
    waves = n_programs / (processor.n_sm * resident)
    # Where there are few waves, the last one leaves multiprocessors idle.
    idle = math.ceil(waves) / waves if waves < 8 else 1.0
    busy = clocks * idle / (processor.n_sm * processor.clock)
    memory = binary.launch.n_bytes / processor.bandwidth
    seconds = LAUNCH_SECONDS + max(busy, memory)
    if max(busy, memory) < LAUNCH_SECONDS:
        bound = "launch"
    elif memory > busy:
        bound = "memory"
    else:
        bound = "products" if inside.products > inside.between else "between"
    return Estimate(seconds, resident, bound)


def _is_uniform(opcode: str) -> bool:
    """Whether the uniform datapath runs it, beside the others."""
    return opcode.startswith("U") or opcode in {"R2UR", "S2UR"}


def _bytes(i: Instruction) -> int:
    """Bytes that a warp moves with one load or store."""
    if i.base in {"LDSM", "STSM"}:
        found = re.search(r"M88\.(\d)$|M88\.(\d)\.", i.opcode)
        return _LDSM_BYTES[next(filter(None, found.groups()))] if found else 128
    for width in (128, 64):
        if re.search(rf"\.{width}(?:\.|$)", i.opcode):
            return 32 * width // 8
    if re.search(r"\.[US]16(?:\.|$)|\.F16|\.BF16", i.opcode) and ".F16x" not in i.opcode:
        return 64
    return 128


def _operand_bytes(i: Instruction) -> int:
    """Bytes of shared memory that a product by four warps reads; other products read registers."""
    if i.base != "HGMMA" or i.tile is None:
        return 0
    m, n, k = i.tile
    size = 4 if ".TF32" in i.opcode else 2
    first = re.match(r"R\w+, (R\d+|gdesc)", i.operands)
    a_in_registers = first is not None and first[1] != "gdesc"
    return size * k * (n if a_in_registers else m + n)
