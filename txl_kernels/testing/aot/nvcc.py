"""The CUDA kernels of the decoding benchmark as nvcc compiles them, surveyed as Triton's are."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from txl_kernels.testing.aot import gates, sass, speed
from txl_kernels.testing.aot.build import Binary, disassemble
from txl_kernels.testing.aot.record import Launch
from txl_kernels.testing.aot.shipped import Call, Kernel
from txl_kernels.testing.aot.shipped_attention import DECODE, Attention
from txl_kernels.testing.aot.survey import Surveyed
from txl_kernels.testing.asked import ASKED

CSRC = Path(__file__).resolve().parents[3] / "csrc"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
WARPS = 4  # of every block
NAME = "rel_attention/bfloat16/decode_cuda/forward"

# What one query against aligned bfloat16 rows of 64 runs: compiled alone, it takes a second.
_INSTANCES = """
#include "rel_attention_decode.cuh"
namespace txl::cuda {
template __global__ void rel_attention_positions_kernel<__nv_bfloat16, 64, true>(const DecodeArgs);
template __global__ void rel_attention_split_kernel<__nv_bfloat16, 64, 1, true>(const DecodeArgs);
template __global__ void rel_attention_combine_kernel<__nv_bfloat16>(const DecodeArgs);
}
"""


class Work(NamedTuple):
    """What a kernel runs: programs, passes of all of them through their loop, bytes that it moves
    at least, and keys (or rows of r) that one pass of a block meets; 0 where it meets none."""

    programs: int
    passes: int
    n_bytes: int
    keys: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How `plan_decode` cuts a call, every row of r and every key being seen, r shared by the
    batch; and from it what each kernel runs and moves."""

    attention: Attention
    n_sm: int

    # The constants of the source.
    BLOCKS_PER_SM = 16
    LEAST_SPLIT_KEYS = 64
    ROWS = 8  # of r, in a group of lanes
    GROUPS = 4  # of lanes, in a warp
    KEYS = 4  # that a group has in flight

    @property
    def n_pairs(self) -> int:
        return self.attention.B * self.attention.H

    @property
    def split_keys(self) -> int:
        n_keys, wanted = self.attention.n_keys, self.BLOCKS_PER_SM * self.n_sm
        most = max(1, n_keys // self.LEAST_SPLIT_KEYS)
        splits = min(max(math.ceil(wanted / self.n_pairs), 1), most)
        return math.ceil(math.ceil(n_keys / splits) / 16) * 16

    @property
    def n_splits(self) -> int:
        return math.ceil(self.attention.n_keys / self.split_keys)

    @property
    def batches_per_block(self) -> int:
        B, H = self.attention.B, self.attention.H
        tiles = math.ceil(self.attention.n_keys / (WARPS * self.ROWS * 2))
        parts = math.ceil(self.BLOCKS_PER_SM * self.n_sm // 4 / (tiles * H))
        return math.ceil(B / min(parts, B))

    def work(self) -> dict[str, Work]:
        """By kernel, in order."""
        B, H, D, n_keys = (getattr(self.attention, x) for x in ("B", "H", "D", "n_keys"))
        step = WARPS * self.KEYS * self.GROUPS  # keys that a block meets in one pass
        tiles = math.ceil(n_keys / (WARPS * self.ROWS * self.GROUPS))
        positions = 4 * self.n_pairs * n_keys  # float32
        partial = 4 * self.n_pairs * self.n_splits * (D + 2)
        rows, keys = 2 * H * n_keys * D, 2 * 2 * self.n_pairs * n_keys * D
        blocks = tiles * H * math.ceil(B / self.batches_per_block)
        per_pair = math.ceil(n_keys / self.split_keys) * math.ceil(self.split_keys / step)
        return {
            "rel_attention_positions_kernel": Work(
                blocks, tiles * H * B, rows + positions, WARPS * self.ROWS * self.GROUPS
            ),
            "rel_attention_split_kernel": Work(
                self.n_pairs * self.n_splits,
                self.n_pairs * per_pair,
                keys + positions + partial,
                step,
            ),
            "rel_attention_combine_kernel": Work(
                math.ceil(self.n_pairs / WARPS),
                math.ceil(self.n_pairs / WARPS) * self.n_splits * math.ceil(D / 32),
                partial + 2 * self.n_pairs * D,
            ),
        }


def compiler() -> str | None:
    """Where nvcc is; None where it is not."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def version(nvcc: str) -> str:
    """As the table of inner loops names it, such as "nvcc 13.0"."""
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise ValueError(f"nvcc: it says no release but {said!r}")
    return f"nvcc {found[1]}"


def survey(nvcc: str, arch: int) -> list[Surveyed]:
    """The kernels of decoding compiled for sm_`arch`; none may spill or use atomics of tensors."""
    attention = DECODE
    call = Call(
        NAME,
        lambda: None,
        {},
        modelled=True,
        least_bytes=attention.least_bytes,
        flop={"forward": 6.0 * attention.D * attention.pairs},
        asked={"forward": ASKED["decode/forward"]},
    )
    work = Plan(attention, speed.H100.n_sm).work()
    compiled = _compiled(nvcc, arch)
    found = []
    for name, todo in work.items():
        (code,) = (code for symbol, code in compiled.items() if name in symbol)
        kernel = Kernel(_gate, functools.partial(_passes, todo), part="forward")
        binary = Binary(_launch(name, todo), arch, code, code.static_shared, WARPS)
        full = f"{call.name}/{name}/sm_{arch}"
        failed = tuple(gates.failures(full, binary, _gate(binary.launch, arch)))
        found.append(Surveyed(full, call, kernel, binary, failed, (binary.launch,), 0))
    return found


def _compiled(nvcc: str, arch: int) -> dict[str, sass.Code]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "decode.cu", Path(folder) / "decode.cubin"
        source.write_text(_INSTANCES, encoding="utf-8")
        options = ["-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
        target = [f"-arch={ARCHITECTURES[arch]}", "-cubin", "-o", str(cubin), str(source)]
        subprocess.run([nvcc, *options, *target], check=True, capture_output=True, text=True)
        return sass.parse_all(disassemble(cubin, knobs.nvidia.cuobjdump.path))


def _launch(name: str, todo: Work) -> Launch:
    """Its tile under the names that Triton's kernels give theirs."""
    kernel: Any = SimpleNamespace(__name__=name, arg_names=("BLOCK_Q", "BLOCK_K"))
    options: Any = SimpleNamespace(num_warps=WARPS, num_stages=1)
    tile: dict[tuple[int, ...], Any] = {(0,): 1, (1,): todo.keys} if todo.keys else {}
    return Launch(kernel, {}, tile, {}, options, (todo.programs, 1, 1), {}, todo.n_bytes)


def _passes(todo: Work, _launch: Launch) -> float:
    return float(todo.passes)


def _gate(_launch: Launch, _arch: int) -> gates.Gate:
    return gates.Gate("no products", shuffles=None)
