"""The machine of a run: its processor, its allocator, its rates of products of matrices."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path

import torch

from benchmarks import device as gpu
from benchmarks.measure import sample, stopwatch
from txl_kernels.backends import native

TILES = ((64, 512, 64), (128, 512, 64), (64, 1024, 64), (128, 128, 512), (64, 512, 128))
TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")

# The routines that can compute the products of a case; the fastest is its limit.
_TILE_KINDS = {
    torch.float32: ("brgemm_f32", "sgemm"),
    torch.bfloat16: ("brgemm_bf16", "brgemm_f32", "sgemm"),
}


@dataclasses.dataclass(frozen=True)
class Processor:
    """From /proc/cpuinfo; `name` contains family and model, which virtual machines do not hide."""

    name: str
    features: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclasses.dataclass(frozen=True)
class Limit:
    """The best rate of this machine, and the routine that reaches it.

    Attributes:
        kind: a routine of products of tiles, or "read".
        rate: GFLOP/s; GB/s for "read".
    """

    kind: str
    rate: float


def processor() -> Processor:
    """The processor of this machine."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.M))
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']} model {fields['model']})"
    flags = fields.get("flags", "").split()
    return Processor(name, tuple(flag for flag in TELLING_FLAGS if flag in flags))


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """GFLOP/s of torch's product of two square matrices."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2e-9 * size**3 / sample(stopwatch(lambda: a @ b), min_seconds=0.2)


def allocator() -> str:
    """The variables that change the C library's allocator, empty if there are none."""
    settings = sorted(os.environ.items())
    return " ".join(f"{name}={value}" for name, value in settings if name.startswith("MALLOC_"))


def tile_rates(kinds: tuple[str, ...], seconds: float = 0.1) -> dict[str, float]:
    """Best GFLOP/s over `TILES` of cached products, by kind; those that cannot run are absent.

    Kinds: "brgemm_f32", "brgemm_bf16", "sgemm"; all threads work. Empty without the native part.
    """
    if native.unavailable_reason() is not None:
        return {}
    probe = torch.ops.txl_native.probe_gemm
    best = {kind: max(probe(kind, *tile, seconds) for tile in TILES) for kind in kinds}
    return {kind: rate for kind, rate in best.items() if rate > 0}


def limit(dtype: torch.dtype, seconds: float = 0.1, device: str = "cpu") -> Limit | None:
    """The rate that products of `dtype` reach at this moment; None without the native part."""
    if device != "cpu":
        return Limit("matmul", gpu.matmul_rate(torch.device(device), dtype) / 1e9)
    rates = tile_rates(_TILE_KINDS[dtype], seconds)
    return max((Limit(*item) for item in rates.items()), key=lambda x: x.rate, default=None)


def read_limit(n_bytes: int = 2**30) -> Limit:
    """The bandwidth of reading memory: a sum of float32 numbers on all threads, the best of 5."""
    numbers = torch.ones(n_bytes // 4)
    timed = stopwatch(numbers.sum)
    return Limit("read", n_bytes / min(timed() for _ in range(5)) / 1e9)


def describe(device: str = "cpu") -> dict[str, object]:
    """The machine and its rates in GFLOP/s, for the record of a run."""
    here = processor()
    if device != "cpu":
        return {
            "processor": torch.cuda.get_device_name(),
            "features": (f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}",),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "native": native.unavailable_reason() or "built and loaded",
            "matmul_float32": gpu.matmul_rate(torch.device(device), torch.float32) / 1e9,
            "matmul_bfloat16": gpu.matmul_rate(torch.device(device), torch.bfloat16) / 1e9,
            "tiles": {},
        }
    return {
        "processor": here.name,
        "allocator": allocator(),
        "features": here.features,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.unavailable_reason() or "built and loaded",
        "matmul_float32": matmul_rate(torch.float32),
        "matmul_bfloat16": matmul_rate(torch.bfloat16),
        "tiles": tile_rates(("sgemm", "brgemm_f32", "brgemm_bf16")),
    }
