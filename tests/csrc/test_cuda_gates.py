"""The CUDA kernels as nvcc compiles them for sm_80 and sm_90a, held to the table of budgets."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from txl_kernels.testing.aot import sass
from txl_kernels.testing.aot.build import disassemble

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("sm_80", "sm_90a")
# Memory of one thread, and what makes the order of sums depend on timing.
FORBIDDEN = {"LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"}

pytestmark = [
    pytest.mark.slow_build,
    pytest.mark.skipif(NVCC is None, reason="no nvcc: the CUDA kernels cannot be compiled here"),
]


_SPEC = importlib.util.spec_from_file_location(
    "cuda_budgets", Path(__file__).with_name("cuda_budgets.py")
)
budgets = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(budgets)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    """The build folder of TXL_CUDA=COMPILE_ONLY, and what the compilers printed."""
    pytest.importorskip("pybind11")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if cmake is None:
        pytest.skip("needs cmake")
    folder = tmp_path_factory.mktemp("cuda")
    configure = [
        *(cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DTXL_CUDA=COMPILE_ONLY", f"-DTXL_OUTPUT_DIR={folder}", "-DTXL_WERROR=ON"),
    ]
    subprocess.run(configure, check=True)
    build = [cmake, "--build", folder, "--target", "txl_cuda", "txl_cuda_ops"]
    run = subprocess.run(build, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    return folder, run.stdout + run.stderr


@pytest.fixture(scope="module")
def kernels(compiled) -> dict[tuple[str, str], sass.Code]:
    """Machine code by (architecture, kernel)."""
    knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with triton")
    found = {}
    for path in compiled[0].rglob("*.cu.o"):
        text = disassemble(path, knobs.nvidia.cuobjdump.path)
        for section in re.split(r"^Fatbin elf code:", text, flags=re.M)[1:]:
            architecture = re.search(r"arch = (\w+)", section)[1]
            resources = dict(re.findall(r"Function (\w+):\n\s*(REG.*)", section))
            for body in re.split(r"^\s*Function : ", section, flags=re.M)[1:]:
                symbol = body.split(None, 1)[0]
                code = sass.parse(f"{resources[symbol]}\n{body}")
                found[architecture, demangled(symbol)] = code
    return found


def demangled(symbol: str) -> str:
    run = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def straight_runs(code: sass.Code) -> list[list[sass.Instruction]]:
    """The code cut at every jump, join and barrier."""
    runs, targets = [[]], {i.jump for i in code.instructions}
    for i in code.instructions:
        if i.address in targets:
            runs.append([])
        runs[-1].append(i)
        if i.base in {"BRA", "BSYNC", "EXIT", "BAR"}:
            runs.append([])
    return runs


def loads_in_flight(code: sass.Code) -> int:
    """The most 16-byte loads that a straight run issues before arithmetic on floats begins."""
    best = 0
    for run in straight_runs(code):
        count = 0
        for i in run:
            count = 0 if i.base in {"FFMA", "FADD", "MUFU"} else count
            count += i.opcode.startswith("LDG.E.128")
            best = max(best, count)
    return best


def test_every_kernel_is_there_for_both_architectures(kernels):
    names = {arch: {name for a, name in kernels if a == arch} for arch in ARCHITECTURES}
    assert names["sm_80"] == names["sm_90a"]
    by_kind = [re.search(r"rel_\w+", name)[0] for name in names["sm_80"]]
    # types x head sizes x alignment, x shares of queries; element sizes
    assert by_kind.count("rel_attention_positions_kernel") == 3 * 3 * 2
    assert by_kind.count("rel_attention_split_kernel") == 3 * 3 * 2 * 2
    assert by_kind.count("rel_attention_combine_kernel") == 3
    assert by_kind.count("rel_shift_kernel") == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_shared_memory_are_within_the_budget(kernels, architecture):
    for (arch, name), code in kernels.items():
        if arch != architecture:
            continue
        allowed = budgets.budget_of(name)
        assert code.registers <= allowed.registers, f"{name}: {code.registers} registers"
        blocks = 512 // allowed.registers
        assert code.static_shared * blocks <= budgets.SHARED_BYTES, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_memory_of_a_thread_and_no_atomics(kernels, architecture):
    for (arch, name), code in kernels.items():
        if arch == architecture:
            assert code.stack == 0, f"{name}: {code.stack} bytes of stack"
            assert not FORBIDDEN & set(sass.count(code.instructions)), name


def test_the_assembler_reports_no_spill(compiled):
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled[1])
    assert len(spills) >= 2 * 60
    assert set(spills) == {("0", "0")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_are_16_bytes_and_many_are_in_flight(kernels, architecture):
    for (arch, name), code in kernels.items():
        if arch != architecture:
            continue
        allowed = budgets.budget_of(name)
        assert loads_in_flight(code) >= allowed.loads, f"{name}: {loads_in_flight(code)} in flight"
        stores = sum(i.opcode.startswith("STG.E.128") for i in code.instructions)
        assert stores >= allowed.stores, f"{name}: {stores} stores of 16 bytes"
