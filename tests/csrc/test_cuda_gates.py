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
        found |= read(path, knobs.nvidia.cuobjdump.path)
    return found


def read(path: Path, cuobjdump: str) -> dict[tuple[str, str], sass.Code]:
    found = {}
    for section in re.split(r"^Fatbin elf code:", disassemble(path, cuobjdump), flags=re.M)[1:]:
        architecture = re.search(r"arch = (\w+)", section)[1]
        for symbol, code in sass.parse_all(section).items():
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
    """The most 16-byte loads that a straight run issues before it needs what one of them loads."""
    best = 0
    for run in straight_runs(code):
        pending: list[set[str]] = []
        for i in run:
            used = set(re.findall(r"\bR\d+\b", i.operands))
            if any(used & loaded for loaded in pending):
                pending = []
            if i.opcode.startswith("LDG.E.128"):
                first = int(re.match(r"R(\d+)", i.operands)[1])
                pending.append({f"R{first + n}" for n in range(4)})
            best = max(best, len(pending))
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


def has_spilled(code: sass.Code) -> bool:
    return code.stack > 0 and bool(FORBIDDEN & set(sass.count(code.instructions)))


def has_few_loads(code: sass.Code) -> bool:
    return loads_in_flight(code) < budgets.budget_of("rel_shift_kernel<>").loads


@pytest.mark.parametrize(
    ("text", "planted", "is_seen"),
    [
        ("__launch_bounds__(kThreads)", "__launch_bounds__(kThreads, 16)", has_spilled),
        ("kBatch = 4;", "kBatch = 1;", has_few_loads),
    ],
    ids=["spill", "one_load_after_the_other"],
)
def test_a_planted_fault_is_seen(text, planted, is_seen, tmp_path):
    knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with triton")
    made, source = tmp_path / "rel_shift.o", tmp_path / "cuda"
    shutil.copytree(ROOT / "csrc" / "cuda", source)
    code = (source / "rel_shift.cu").read_text(encoding="utf-8")
    assert code.count(text) == 1
    (source / "rel_shift.cu").write_text(code.replace(text, planted), encoding="utf-8")
    options = ["-std=c++20", f"-I{ROOT / 'csrc' / 'include'}", "-arch=sm_80"]
    subprocess.run([NVCC, *options, "-c", source / "rel_shift.cu", "-o", made], check=True)
    kernels = read(made, knobs.nvidia.cuobjdump.path)
    assert len(kernels) == 3
    assert all(is_seen(code) for code in kernels.values())


def test_a_kernel_without_a_budget_is_named():
    with pytest.raises(LookupError, match="no budget for rel_new_kernel"):
        budgets.budget_of("rel_new_kernel<float>")
