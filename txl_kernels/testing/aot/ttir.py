"""Reads a kernel's Triton IR for what its compiler is known to compile wrongly.

Triton takes a - b for a multiple of what divides a and the first number of b, in every element,
where b is a range: 64 - [0, 1, 2, …] for multiples of 64. A comparison or division of such a
difference may then be made once for many elements. (AxisInfo.cpp, AddSubOpAxisInfoVisitor; as of
Triton 3.6.) No interpreter sees that.
"""

from __future__ import annotations

import re

_OPERATION = re.compile(r"\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"? ([^:]*) : ")
_SPREADS = {
    *("tt.expand_dims", "tt.broadcast", "tt.reshape", "arith.select", "arith.extsi"),
    *("arith.trunci", "arith.addi", "arith.subi", "arith.muli", "arith.andi"),
    *("arith.maxsi", "arith.minsi"),
}
_MISTAKEN = {"arith.cmpi", "arith.divsi", "arith.remsi", "arith.divui", "arith.remui"}


def descending_comparisons(text: str) -> list[str]:
    """The comparisons and divisions, as lines of the IR, of what descends as a range ascends.

    Within a block of operations, not through the variables that a loop carries.
    """
    ranges: set[str] = set()
    descending: set[str] = set()
    found = []
    for line in text.splitlines():
        operation = _OPERATION.match(line)
        if operation is None or "tensor<" not in line:
            continue
        result, name, operands = operation.groups()
        used = re.findall(r"%[\w#]+", operands)
        if name == "tt.make_range" or ranges.intersection(used):
            ranges.add(result)
        descends = name == "arith.subi" and used[1] in ranges
        if descends or (name in _SPREADS and descending.intersection(used)):
            descending.add(result)
        elif name in _MISTAKEN and descending.intersection(used):
            found.append(line.strip().partition(" loc(")[0])
    return found
