"""Reads a kernel's machine code: resources, opcodes, and the loop that does the work."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)\s*([^;]*);", re.M
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_TILE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WARP_TILE = re.compile(r"(?:HMMA|IMMA)\.(\d+)(?=\.|$)")
# Shapes of one warp's product as the opcode abbreviates them: m, n, k.
_ADDITIONS = {"RED", "REDG", "ATOMG"}
_WARP_TILES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4), "884": (8, 8, 4)}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its address, opcode with modifiers, and operands as text."""

    address: int
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def jump(self) -> int | None:
        """Where a branch goes, None for others."""
        if self.base != "BRA":
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else None

    @property
    def tile(self) -> tuple[int, int, int] | None:
        """m, n, k of a tensor-core product, by one warp (HMMA) or by four (HGMMA)."""
        if found := _TILE.match(self.opcode):
            return (int(found[1]), int(found[2]), int(found[3]))
        if found := _WARP_TILE.match(self.opcode):
            return _WARP_TILES[found[1]]
        return None


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's instructions in order, and what it asks of a processor.

    Attributes:
        registers: per thread.
        stack: bytes per thread: what was spilled.
        static_shared: bytes per block that the binary itself declares.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    stack: int
    static_shared: int

    def loops(self) -> list[tuple[Instruction, ...]]:
        """Bodies of the innermost loops: from a backward branch's target to the branch."""
        spans = {
            (i.jump, i.address)
            for i in self.instructions
            if i.jump is not None and i.jump < i.address
        }
        innermost = [
            span
            for span in sorted(spans)
            if not any(other != span and _holds(span, other) for other in spans)
        ]
        return [
            tuple(i for i in self.instructions if first <= i.address <= last)
            for first, last in innermost
        ]

    def main_loop(self) -> tuple[Instruction, ...]:
        """The loop that does the work: the most tensor-core arithmetic, then the most arithmetic
        of any kind, then the shortest; the whole kernel where there is no loop, or where the
        tensor cores work outside of loops alone: each program then makes one pass."""
        loop = max(self.loops(), key=_work, default=self.instructions)
        if tensor_flop(self.instructions, 4) and not tensor_flop(loop, 4):
            return self.instructions
        return loop


def steady(loop: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """What a pass through the loop runs as a rule: forward branches over code without tensor-core
    products are taken, since such code is for the few tiles at a border. Not those over atomic
    additions, which are for the lanes that have something to add."""
    skipped: set[int] = set()
    last = loop[-1].address if loop else 0
    for i in loop:
        if i.jump is not None and i.address < i.jump <= last and i.address not in skipped:
            over = [o for o in loop if i.address < o.address < i.jump]
            if not any(o.tile is not None or o.base in _ADDITIONS for o in over):
                skipped.update(o.address for o in over)
    return tuple(i for i in loop if i.address not in skipped)


def parse(text: str) -> Code:
    """The output of `cuobjdump -res-usage -sass` on one kernel.

    Raises:
        ValueError: no instructions, or no resources in it.
    """
    resources = _RESOURCES.search(text)
    found = [
        Instruction(int(address, 16), opcode, operands.strip())
        for address, opcode, operands in _INSTRUCTION.findall(text)
    ]
    if resources is None or not found:
        raise ValueError(f"sass: cuobjdump printed no kernel but {text[:200]!r}")
    registers, stack, shared, _local = map(int, resources.groups())
    return Code(tuple(found), registers, stack, shared)


def parse_all(text: str) -> dict[str, Code]:
    """The same output on a file of several kernels for one architecture, by symbol.

    Raises:
        ValueError: a kernel without instructions.
    """
    resources = dict(re.findall(r"Function (\w+):\n\s*(REG.*)", text))
    found = {}
    for body in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        symbol = body.split(None, 1)[0]
        found[symbol] = parse(f"{resources[symbol]}\n{body}")
    return found


def count(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How often each opcode occurs, modifiers left out."""
    return dict(collections.Counter(i.base for i in instructions))


def tensor_flop(instructions: Iterable[Instruction], num_warps: int) -> int:
    """FLOP of the tensor-core products, by a whole block of `num_warps` warps."""
    total = 0
    for i in instructions:
        if i.tile is not None:
            m, n, k = i.tile
            total += 2 * m * n * k * (num_warps // 4 if i.base == "HGMMA" else num_warps)
    return total


def _work(loop: Sequence[Instruction]) -> tuple[int, int, int]:
    counts = count(loop)
    return (
        tensor_flop(loop, num_warps=4),
        sum(counts.get(opcode, 0) for opcode in ("FFMA", "FMUL", "FADD", "MUFU", "DFMA")),
        -len(loop),
    )


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
