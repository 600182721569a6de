"""Finds comparisons in Triton's IR that Triton compiles wrongly.

Triton concludes that a - b is, in every element, a multiple of the greatest common divisor of a and
the first number of b, even where b is a range: 64 - [0, 1, 2, …] would be multiples of 64. It may
then compute a comparison or division of such a difference once for many elements (AxisInfo.cpp,
AddSubOpAxisInfoVisitor; Triton 3.6.0 does so). The interpreter does not show this.
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
    """The lines of the IR that compare or divide a value which descends as a range ascends.

    Follows values within a block of operations, not through the variables of a loop.
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
