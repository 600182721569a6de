"""What must hold for a compiled launch: it fits the processor, and its products are as meant."""

from __future__ import annotations

import re

from tools.gates import ttir
from tools.gates.compiling import Binary
from txl_kernels.backends.triton.launching import Launch

# Bytes of shared memory that one block can use at most, by architecture.
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
# Columns of tensor memory on sm_100.
TENSOR_MEMORY_LIMIT = 512


def failures(launch: Launch, binary: Binary, max_spill: int) -> list[str]:
    """One sentence for each check that fails; `max_spill` is in bytes per thread."""
    arch, found = launch.target.arch, []
    if binary.shared > SHARED_LIMIT[arch]:
        found.append(f"{binary.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    if binary.tensor_memory > TENSOR_MEMORY_LIMIT:
        columns = f"sm_{arch} has {TENSOR_MEMORY_LIMIT}"
        found.append(f"{binary.tensor_memory} columns of tensor memory, {columns}")
    if binary.code.stack > max_spill:
        found.append(f"{binary.code.stack} bytes per thread are spilled, the limit is {max_spill}")
    found += _product_failures(launch, binary)
    for line in ttir.descending_comparisons(binary.ttir):
        found.append(f"Triton compiles a comparison with a descending range wrongly: {line}")
    return found


def spill_limit(launch: Launch) -> int:
    """Bytes per thread that this launch may spill without an entry in the table of spills."""
    is_forward = launch.kernel.__name__ == "_rel_attention_fwd_kernel"
    return 0 if is_forward and _has_16_bits(launch) and launch.arguments["D"] == 64 else 512


def _has_16_bits(launch: Launch) -> bool:
    """Whether a tensor of the launch has elements of 16 bits."""
    return bool(re.search(r"\*(bf16|fp16)", str(list(launch.signature.values()))))


def _product_failures(launch: Launch, binary: Binary) -> list[str]:
    """16-bit products must run on tensor cores, float32 products, which TF32 would round, not."""
    present = binary.code.tensor_opcodes
    if not _has_16_bits(launch):
        return [f"float32 products on tensor cores ({', '.join(present)})"] if present else []
    if " tt.dot " not in binary.ttir:
        return []
    if not present:
        return ["no tensor-core instruction in a kernel of 16-bit products"]
    slow = [line for line in binary.ttgir.splitlines() if " tt.dot " in line and "#blocked" in line]
    return [f"{len(slow)} of the 16-bit products do not run on tensor cores"] if slow else []
