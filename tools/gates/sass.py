"""Reads the resources and the opcodes of compiled kernels, as cuobjdump prints them."""

from __future__ import annotations

import collections
import dataclasses
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

_RESOURCES = re.compile(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.M)


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        registers: per thread.
        stack: bytes per thread; these kernels have no arrays there, so they are spilled registers.
        shared: bytes per block that the binary declares.
        opcodes: how often each occurs, modifiers left out.
    """

    registers: int
    stack: int
    shared: int
    opcodes: Mapping[str, int]

    @property
    def tensor_opcodes(self) -> list[str]:
        """The tensor-core opcodes: HMMA, HGMMA on sm_90, UTCHMMA on sm_100 and their relatives."""
        return sorted(name for name in self.opcodes if name.endswith("MMA"))


def read(path: Path) -> dict[tuple[str, str], Code]:
    """The kernels of a binary by (architecture, symbol).

    Raises:
        ValueError: cuobjdump prints no kernel, or a kernel without instructions.
    """
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
    return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(text: str) -> dict[tuple[str, str], Code]:
    """The same, from cuobjdump's output."""
    found = {}
    # An object file has a section for each architecture, a cubin has one without a title.
    for section in re.split(r"^Fatbin elf code:", text, flags=re.M):
        resources = {match[1]: match for match in _RESOURCES.finditer(section)}
        for body in re.split(r"^\s*Function : ", section, flags=re.M)[1:]:
            symbol = body.split(None, 1)[0]
            arch = re.search(r"\b(sm_\w+)", section)
            opcodes = collections.Counter(_OPCODE.findall(body))
            if not opcodes or symbol not in resources or arch is None:
                raise ValueError(f"cuobjdump printed no instructions or resources of {symbol}")
            registers, stack, shared = map(int, resources[symbol].groups()[1:])
            found[arch[1], symbol] = Code(registers, stack, shared, opcodes)
    if not found:
        raise ValueError(f"cuobjdump printed no kernel but {text[:200]!r}")
    return found
