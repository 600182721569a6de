"""Whether a run computes in bfloat16, and the context in which it does."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

import torch

Autocast = Literal["off", "bf16", "auto"]


def uses_bf16(mode: Autocast, device: torch.device) -> bool:
    """What `mode` means on `device`: "auto" is bf16 where the processor multiplies it faster."""
    if mode != "auto":
        return mode == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16"})


def autocast(mode: Autocast, device: torch.device) -> torch.autocast:
    """The context of every forward pass of a run."""
    enabled = uses_bf16(mode, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def cpu_flags() -> frozenset[str]:
    """The processor's features in Linux's words; empty where /proc does not tell."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())  # x86-64, aarch64


def processor() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
