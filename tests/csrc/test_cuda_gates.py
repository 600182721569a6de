"""The checks of the CUDA kernels' machine code hold, and each of them finds a planted fault.

Here for sm_80; `make gates` builds for the other architectures.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import subprocess

import pytest

from tools.gates import cuda
from tools.gates.sass import Code

needs_nvcc = pytest.mark.skipif(cuda.nvcc() is None, reason="needs nvcc")
GOOD = Code(registers=64, stack=0, shared=1024, opcodes={"FFMA": 8})


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    return cuda.build(tmp_path_factory.mktemp("cuda"), ["80"])


@pytest.mark.slow_build
@needs_nvcc
def test_all_kernels_are_compiled_and_pass(kernels):
    assert {arch for arch, _ in kernels} == {"sm_80"}
    counts = collections.Counter(re.search(r"rel_\w+", name)[0] for _, name in kernels)
    assert counts == {
        "rel_attention_positions_kernel": 3 * 4 * 2,  # types, head sizes, alignments
        "rel_attention_split_kernel": 3 * 3 * 2 * 2,  # also one or four queries of a warp
        "rel_attention_combine_kernel": 3,
        "rel_shift_kernel": 3,  # element sizes
    }
    found = [text for (_, name), code in kernels.items() for text in cuda.failures(name, code)]
    assert not found, "\n".join(found)


@pytest.mark.slow_build
@needs_nvcc
def test_a_planted_spill_is_found(tmp_path):
    pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    folder = shutil.copytree(cuda.ROOT / "csrc" / "cuda", tmp_path / "cuda")
    source = folder / "rel_shift.cu"
    text = source.read_text(encoding="utf-8")
    bounds = "__launch_bounds__(kThreads)"
    assert text.count(bounds) == 1
    source.write_text(text.replace(bounds, "__launch_bounds__(kThreads, 16)"), encoding="utf-8")
    options = ["-std=c++20", f"-I{cuda.ROOT / 'csrc' / 'include'}", "-arch=sm_80"]
    built = tmp_path / "rel_shift.o"
    subprocess.run([cuda.nvcc(), *options, "-c", source, "-o", built], check=True)
    kernels = cuda.read(built)
    assert len(kernels) == 3
    for (_, name), code in kernels.items():
        spill, memory = cuda.failures(name, code)
        assert "bytes per thread are spilled" in spill
        assert "LDL, STL" in memory


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"registers": 81}, "81 registers, the limit is 80"),
        ({"shared": 20_000}, "20000 bytes of shared memory in each of 6 blocks"),
        ({"opcodes": {"FFMA": 8, "RED": 1}}, ": RED"),
    ],
    ids=["registers", "shared_memory", "atomics"],
)
def test_planted_faults_are_found(change, expected):
    assert cuda.failures("rel_shift_kernel<int>", GOOD) == []
    (found,) = cuda.failures("rel_shift_kernel<int>", dataclasses.replace(GOOD, **change))
    assert expected in found


def test_a_kernel_without_a_limit_is_an_error():
    with pytest.raises(LookupError, match="rel_new_kernel<float>"):
        cuda.failures("rel_new_kernel<float>", GOOD)
