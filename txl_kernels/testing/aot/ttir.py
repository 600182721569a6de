"""Reads a kernel's Triton IR: what its loop moves, and what its compiler compiles wrongly.

Triton takes a - b for a multiple of what divides a and the first number of b, in every element,
where b is a range: 64 - [0, 1, 2, …] for multiples of 64. A comparison or division of such a
difference may then be made once for many elements (AxisInfo.cpp, AddSubOpAxisInfoVisitor; Triton
3.6.0 does so, 3.7.1 does not). No interpreter sees that.
"""

from __future__ import annotations

import math
import re

_OPERATION = re.compile(r"\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"? ([^:]*) : ")
_SPREADS = {
    *("tt.expand_dims", "tt.broadcast", "tt.reshape", "arith.select", "arith.extsi"),
    *("arith.trunci", "arith.addi", "arith.subi", "arith.muli", "arith.andi"),
    *("arith.maxsi", "arith.minsi"),
}
_MOVES = ("ttg.async_copy_global_to_local", "tt.load", "tt.store", "tt.atomic_rmw")
_POINTERS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>")
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


def loop_bytes(text: str) -> int:
    """Bytes that one pass through the loop with most products moves from and to global memory.

    Each element once, which machine code does not tell: there each warp that wants it loads it, of
    which all but the first find it in the cache beside them. What is under a condition is not
    counted. `text` is of the IR that knows layouts; 0 where no loop has products.
    """
    best = (0, 0)
    lines = text.splitlines()
    for n, line in enumerate(lines):
        if " = scf.for " not in line:
            continue
        indent = len(line) - len(line.lstrip())
        ends = (k for k in range(n, len(lines)) if lines[k].startswith(" " * indent + "}"))
        own = [x for x in lines[n + 1 : next(ends)] if re.match(f" {{{indent + 2}}}[^ ]", x)]
        products = sum("dot " in x for x in own)
        n_bytes = 0
        for x in own:
            pointers = _POINTERS.search(x)
            if pointers and any(move in x for move in _MOVES):
                n_bytes += math.prod(map(int, pointers[1].split("x"))) * int(pointers[2]) // 8
        best = max(best, (products, n_bytes))
    return best[1] if best[0] else 0
