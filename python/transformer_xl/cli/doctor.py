"""`transformer-xl doctor`: backends, versions and, with --verify, a check of every op."""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformer_xl.training.precision import cpu_flags, processor, uses_bf16
from txl_kernels.backends import BACKENDS, COMPOSED, OPS, native, resolve
from txl_kernels.backends.triton import CHECKED_TRITON_VERSIONS
from txl_kernels.backends.verification import records
from txl_kernels.testing.op_checks import OpCheck, check_ops

PACKAGES = ("txl_kernels", "transformer_xl", "torch")
LIBRARIES = ("torch", "triton", "numpy", "accelerate", "safetensors", "tokenizers")
NOT_INSTALLED = "not installed"
FEATURES = (
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve"),
)
ARM_NOTE = "the native kernels are tested in an emulation only; no speed is claimed"
LEGEND = """\
error: largest error as a share of the error budget; at most 1 passes.
ms: median time of a call. "backward" compares gradients and times both passes.
peer/ours: ratio of the times; above 1 ours is faster. Peers and their ops:"""


def doctor(
    verify: Annotated[
        bool, typer.Option("--verify", help="Also run every op and compare it with float64.")
    ] = False,
) -> None:
    """Show the backend of each op, why not the others, and the installed versions.

    With --verify, check the results of every op on this machine (about a minute). The exit status
    is 1 if a check fails.
    """
    console = Console(emoji=False)
    console.print(_machine())
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        console.print(_backends(device))
    reason = native.unavailable_reason()
    if reason is not None and native.without_command(reason) != reason:
        command = f"This command builds the native kernels: {native.build_command()}"
        console.print(command, markup=False, highlight=False, soft_wrap=True)
    if verify:
        with console.status("Checking every op"):
            checks = [check for device in devices for check in check_ops(device)]
        if not print_checks(console, checks):
            raise typer.Exit(1)


def print_checks(console: Console, checks: Iterable[OpCheck]) -> bool:
    """Print a table per device and backend; return whether all checks passed."""

    def place(check: OpCheck) -> tuple[str, str]:
        return check.device, check.backend

    checks = sorted(checks, key=place)
    for (device, backend), rows in groupby(checks, place):
        console.print(_checks_table(f"{backend} on {device}", list(rows)))
    peers: dict[str, dict[str, None]] = {}  # a peer's ops, each once, in order
    for check in checks:
        peers.setdefault(check.peer, {})[check.op] = None
    lines = [LEGEND, *(f"  {peer}: {'; '.join(ops)}" for peer, ops in peers.items())]
    for device in dict.fromkeys(check.device for check in checks):
        if {check.backend for check in checks if check.device == device} == {"reference"}:
            lines.append(f"No kernel runs on {device} here, so the reference was checked.")
    failures = [check for check in checks if check.failure is not None]
    for check in failures:
        call = f"{check.op}, {check.backend} on {check.device}, {_name(check.dtype)}"
        lines.append(f"FAILED: {call}, {check.direction}: {check.failure}")
    lines.append(f"{len(checks) - len(failures)} of {len(checks)} checks passed.")
    console.print("\n".join(lines), markup=False, highlight=False)
    return not failures


def _checks_table(title: str, checks: Sequence[OpCheck]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("op", "dtype", "direction"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "ms", "peer/ours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for check in checks:
        ratio = "–"
        if check.seconds and check.peer_seconds:
            ratio = f"{check.peer_seconds / check.seconds:.2f}"
        table.add_row(
            check.op,
            _name(check.dtype),
            check.direction,
            _error(check.error),
            "–" if check.seconds is None else f"{check.seconds * 1e3:.2f}",
            ratio,
            "ok" if check.failure is None else "[bold red]FAILED[/]",
        )
    return table


def _error(share: float) -> str:
    if math.isnan(share):
        return "–"
    return f"{share:.2g}" if share > 10 else f"{share:.2f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    if platform.machine() == "aarch64":
        table.add_row("aarch64", ARM_NOTE)
    table.add_row("torch sees", torch.backends.cpu.get_cpu_capability())
    bf16 = "faster here" if uses_bf16("auto", torch.device("cpu")) else "not faster here"
    table.add_row("bf16 autocast", f"{bf16} (cpu)")
    table.add_row("self-tests", f"recorded in {escape(_records())}")
    return table


def _records() -> str:
    """The folder for the records of GPU kernels that passed a self-test."""
    try:
        return str(records.cache_folder())
    except RuntimeError:  # from Path.home()
        return "memory only: there is no home folder"


def _backends(device: str) -> Table:
    """The backend that "auto" uses for float32 on `device`, and why not the others.

    Ops with the same backend and reasons share a row. Functions composed of other ops come last.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for op in OPS:
        answer = partial(resolve, op, device=device, dtype=torch.float32, needs_grad=True)
        used = answer().backend or "none"
        reasons = {name: answer(backend=name).reason for name in BACKENDS if name != used}
        refused = (
            f"{name}: {native.without_command(reason).removesuffix(f' for {op}')}"
            for name, reason in reasons.items()
            if reason is not None
        )
        rows.setdefault((used, "\n".join(refused)), []).append(op)
    for function, parts in COMPOSED.items():
        rows.setdefault((parts, ""), []).append(function)
    table = Table("op", "used", "why not the others", title=f"backends on {device}, float32")
    for answers, ops in rows.items():
        table.add_row("\n".join(ops), *map(escape, answers))
    return table


def _triton_note() -> str:
    """A warning if the machine code of the kernels was not checked with this Triton version."""
    if _version("triton") in (*CHECKED_TRITON_VERSIONS, NOT_INSTALLED):
        return ""
    checked = " and ".join(CHECKED_TRITON_VERSIONS)
    return f" [yellow](the kernels' machine code was checked with {checked}, not this version)[/]"


def _version(name: str) -> str:
    if name == "torch":  # the package's version may lack the suffix, as in +cpu
        return torch.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
