"""Compiles recorded launches ahead of time, for a processor that need not be there."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from pathlib import Path

from txl_kernels.testing.aot import sass, ttir
from txl_kernels.testing.aot.record import Launch


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled launch. `shared` is in bytes per block, its dynamic part included.

    Where Triton compiled it, `ir` is Triton's, and `loop_bytes` is what a pass moves (`ttir`)."""

    launch: Launch
    arch: int
    code: sass.Code
    shared: int
    num_warps: int
    ir: str = ""
    loop_bytes: int = 0


def build(launch: Launch, arch: int) -> Binary:
    """The launch compiled for sm_`arch`; Triton's cache is used.

    Raises:
        RuntimeError: this process interprets Triton kernels, so it cannot compile them.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        raise RuntimeError("aot: unset TRITON_INTERPRET; a process interprets or compiles")
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options.__dict__))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        text = disassemble(path, knobs.nvidia.cuobjdump.path)
    code = sass.parse(text)
    shared = max(compiled.metadata.shared, code.static_shared)
    moved = ttir.loop_bytes(compiled.asm["ttgir"])
    num_warps = compiled.metadata.num_warps
    return Binary(launch, arch, code, shared, num_warps, compiled.asm["ttir"], moved)


def disassemble(path: Path, cuobjdump: str) -> str:
    """Resources and machine code of a binary, as text."""
    command = [cuobjdump, "-res-usage", "-sass", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
