"""Fixtures of the native tests: the CUDA kernels emulated on the CPU, and instruction sets."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from txl_kernels._rel_attention_call import UNLIMITED, OptionalTensors, Options
from txl_kernels.backends.head_size import MAX_HEAD_SIZE
from txl_kernels.ops.rel_attention_calls import prepare

CSRC = Path(__file__).parents[2] / "csrc"
EMULATION = Path(__file__).parent / "cuda_emulation"
SCALARS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
FLAGS = (
    *("-std=c++20", "-g1", "-pthread", "-mf16c", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    f"-DTXL_MAX_HEAD_SIZE={MAX_HEAD_SIZE}",
)


class Emulation:
    """The CUDA kernels as a program on the CPU; `folder` receives its inputs and results."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.folder = folder

    def run(self, numbers: Mapping[str, float], tensors: Mapping[str, Tensor]) -> bytes:
        """Runs the program and returns the bytes of its results.

        Raises:
            subprocess.CalledProcessError: a sanitizer found an error; `stderr` has its report.
        """
        problem, results = self.folder / "problem", self.folder / "results"
        with problem.open("wb") as file:
            for name, number in numbers.items():
                file.write(f"number {name} {float(number)!r}\n".encode())
            for name, tensor in tensors.items():
                memory = bytes_of(tensor)
                strides = " ".join(map(str, strides_of(tensor)))
                file.write(f"tensor {name} {len(memory)} {strides}\n".encode() + memory)
        command = [*without_randomisation(), self.program, problem, results]
        options = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        subprocess.run(command, env=options, check=True, capture_output=True, text=True)
        return results.read_bytes()

    def attend(self, **call: Any) -> tuple[Tensor, Tensor]:
        """Returns the output and lse of `rel_attention` for its own arguments."""
        q, k, v, r = (call.pop(name) for name in ("q", "k", "v", "r"))
        given = {name: call.pop(name) for name in OptionalTensors._fields if name in call}
        options = Options(**call, backend="reference")
        prepared = prepare("rel_attention", q, k, v, r, OptionalTensors(**given), None, options)
        *_, optional, rules, factors = prepared.call
        tensors = {"q_pos": q, "q": q, "k": k, "v": v, "r": r}
        tensors |= {name: x for name, x in optional._asdict().items() if x is not None}
        (B, H, Tq, D), (_, Hk, Ts, Dv) = q.shape, v.shape
        Tm = tensors["mem_k"].shape[2] if "mem_k" in tensors else 0
        numbers = {"B": B, "H": H, "Hk": Hk, "Tq": Tq, "Tm": Tm, "Ts": Ts, "D": D, "Dv": Dv}
        numbers |= {"R": r.shape[2], "Dp": r.shape[3], **factors._asdict()}
        numbers |= {"offset": rules.offset, "clamp": rules.clamp}
        numbers |= {f"rule.{name}": n for name, n in rules._asdict().items() if n != UNLIMITED}
        numbers |= {"dtype": SCALARS[q.dtype], "bytes": q.element_size()}
        numbers["float_biases"] = given.get("r_w_bias", q).dtype == torch.float32
        if "mask" in tensors:
            numbers["mask_stride_key"] = tensors["mask"].stride(3)
        positions = [tensors.get(name) for name in ("q_start", "key_start", "key_lens")]
        numbers["is_wide"] = any(x is not None and x.dtype == torch.int64 for x in positions)
        results = self.run(numbers, tensors)
        n_out = B * H * Tq * Dv * q.element_size()
        out = torch.frombuffer(bytearray(results[:n_out]), dtype=q.dtype)
        lse = torch.frombuffer(bytearray(results[n_out:]), dtype=torch.float32)
        return out.view(B, H, Tq, Dv), lse.view(B, H, Tq)


@pytest.fixture
def require_instruction_set() -> Callable[[str], None]:
    """Skips the test if the processor lacks an instruction set (a name of ATEN_CPU_CAPABILITY)."""

    def require(capability: str) -> None:
        # Not ATen's own capability, which the same variable may limit.
        supported = {
            "default": True,
            "avx2": torch.cpu._is_avx2_supported(),
            "avx512": torch.cpu._is_avx512_supported(),
        }
        if not supported[capability]:
            pytest.skip(f"this processor has no {capability}")

    return require


@functools.cache
def without_randomisation() -> tuple[str, ...]:
    """The prefix of commands that run without address randomisation, or nothing if not permitted.

    With randomised addresses some Linux kernels leave no room for the thread sanitizer's shadow.
    """
    prefix = ("setarch", "-R")
    if shutil.which(prefix[0]) is None:
        return ()
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else ()


def bytes_of(tensor: Tensor) -> bytes:
    """The memory from a tensor's first element to its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    span = tensor.detach().as_strided((last + 1 if tensor.numel() else 0,), (1,))
    return bytes(span.view(torch.uint8).numpy())


def strides_of(tensor: Tensor) -> Sequence[int]:
    """The first three strides in elements, 0 along dimensions of size 1, as the ATen bindings pass
    them."""
    shape, stride = tensor.shape, tensor.stride()
    kept = [s if n > 1 else 0 for n, s in zip(shape, stride, strict=True)]
    return [*kept, 0, 0, 0][:3]


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a folder once for all processes of pytest-xdist, and returns it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder of this test run

    def build(name: str, make: Callable[[Path], None]) -> Path:
        folder, complete = root / name, root / f"{name}.complete"
        with FileLock(root / f"{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def emulation_build(build_once: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of the emulation's objects and program, for sanitizer "thread" or "address"."""

    def build(sanitizer: str) -> Path:
        if shutil.which("g++") is None:
            pytest.skip("the emulation of the CUDA kernels needs g++")
        sources = [*(CSRC / "cuda").glob("*.cu"), EMULATION / "run.cpp"]
        return build_once(f"emulation-{sanitizer}", lambda x: compile_into(x, sources, sanitizer))

    return build


def compile_into(
    folder: Path, sources: Sequence[Path], sanitizer: str, optimisation: str = "-O1"
) -> None:
    """Compiles `sources` and links them with the other objects in `folder`: the program `run`."""
    includes = [f"-I{EMULATION}", f"-I{CSRC / 'include'}"]
    compiler = ["g++", *FLAGS, optimisation, f"-fsanitize={sanitizer}"]
    subprocess.run([*compiler, *includes, "-x", "c++", "-c", *sources], cwd=folder, check=True)
    subprocess.run([*compiler, *folder.glob("*.o"), "-o", folder / "run"], check=True)


@pytest.fixture(scope="session")
def emulations(
    emulation_build: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Emulation]:
    """Returns the emulation of the kernels in `csrc/cuda` under a sanitizer."""
    folder = tmp_path_factory.mktemp("emulation")
    return lambda sanitizer: Emulation(emulation_build(sanitizer) / "run", folder)


@pytest.fixture
def altered_emulation(
    emulation_build: Callable[[str], Path], tmp_path: Path
) -> Callable[[Path, str], Emulation]:
    """Returns the emulation with one altered `.cu` file instead of the file of that name."""

    def build(source: Path, sanitizer: str) -> Emulation:
        folder = tmp_path / "emulation"
        shutil.copytree(emulation_build(sanitizer), folder, ignore=shutil.ignore_patterns("run"))
        # One call of the kernels costs less than their optimisation.
        compile_into(folder, [source], sanitizer, "-O0")
        return Emulation(folder / "run", folder)

    return build


@pytest.fixture
def csrc() -> Path:
    return CSRC
