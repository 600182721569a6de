"""`transformer-xl doctor`."""

from __future__ import annotations

import importlib
import platform
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformer_xl.training.precision import cpu_flags, processor, uses_bf16
from txl_kernels.backends import BACKENDS, OPS, native, resolve
from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS

PACKAGES = ("txl_kernels", "transformer_xl", "torch")
LIBRARIES = ("torch", "triton", "numpy", "accelerate", "safetensors", "tokenizers")
NOT_INSTALLED = "not installed"
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def doctor() -> None:
    """Show which backend each op would use here, why not the others, and the installed versions."""
    console = Console(emoji=False)
    console.print(_machine())
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        console.print(_backends(device))
    if native.unavailable_reason() is not None:
        command = f"This command builds the native kernels: {native.build_command()}"
        console.print(command, markup=False, highlight=False, soft_wrap=True)


def _machine() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in PACKAGES:
        module = importlib.import_module(name)
        table.add_row(name, escape(f"imported from {Path(str(module.__file__)).parent}"))
    table.add_row("python", platform.python_version())
    for name in LIBRARIES:
        table.add_row(name, _version(name) + (_triton_note() if name == "triton" else ""))
    flags = cpu_flags()
    table.add_row("processor", f"{processor()}, {torch.get_num_threads()} threads")
    table.add_row("features", ", ".join(name for name in FEATURES if name in flags) or "unknown")
    table.add_row("torch sees", torch.backends.cpu.get_cpu_capability())
    bf16 = "faster here" if uses_bf16("auto", torch.device("cpu")) else "not faster here"
    table.add_row("bf16 autocast", f"{bf16} (cpu)")
    return table


def _backends(device: str) -> Table:
    """The backend that "auto" uses for float32 on `device`, and why not the others.

    Ops with the same answers share a row.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for op in OPS:
        ask = partial(resolve, op, device=device, dtype=torch.float32, needs_grad=True)
        used = ask().backend or "none"
        reasons = {name: ask(backend=name).reason for name in BACKENDS if name != used}
        refused = (
            f"{name}: {reason.removesuffix(f' for {op}')}"
            for name, reason in reasons.items()
            if reason is not None
        )
        rows.setdefault((used, "\n".join(refused)), []).append(op)
    table = Table("op", "used", "why not the others", title=f"backends on {device}, float32")
    for answers, ops in rows.items():
        table.add_row("\n".join(ops), *map(escape, answers))
    return table


def _triton_note() -> str:
    """A warning if the gates of the kernels' machine code were not checked with this Triton."""
    if _version("triton") in (*CHECKED_TRITON_VERSIONS, NOT_INSTALLED):
        return ""
    gated = " and ".join(CHECKED_TRITON_VERSIONS)
    return f" [yellow](the kernels' machine code is checked for {gated}, not for this one)[/]"


def _version(name: str) -> str:
    if name == "torch":  # the package's version may lack the suffix, as in +cpu
        return torch.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
