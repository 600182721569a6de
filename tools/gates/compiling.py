"""Compiles recorded launches for processors that this machine need not have."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import triton

from tools.gates import sass
from txl_kernels.backends.triton.launching import Launch


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled launch.

    Attributes:
        code: the machine code.
        shared: bytes per block that the launch allocates.
        tensor_memory: columns of sm_100's tensor memory per block.
        ttir: Triton's IR before it chooses layouts.
        ttgir: the same with layouts.
    """

    code: sass.Code
    shared: int
    tensor_memory: int
    ttir: str
    ttgir: str


def compile_launch(launch: Launch) -> Binary:
    """The launch, compiled for its target; Triton's cache is used."""
    source = triton.compiler.ASTSource(
        launch.kernel, launch.signature, launch.constants, launch.attributes
    )
    compiled = triton.compile(source, target=launch.target, options=dict(vars(launch.options)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (code,) = sass.read(path).values()
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    return Binary(code, shared, tensor_memory or 0, compiled.asm["ttir"], compiled.asm["ttgir"])
