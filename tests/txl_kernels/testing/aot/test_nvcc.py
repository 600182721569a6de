"""The CUDA kernels of decoding: their machine code does not grow, their time is that of bytes."""

from __future__ import annotations

import functools
import re

import pytest

from txl_kernels.testing.aot import model, nvcc, sass, speed, survey
from txl_kernels.testing.aot.shipped_attention import DECODE
from txl_kernels.testing.asked import ASKED

NVCC = nvcc.compiler()
KERNELS = ["positions", "split", "combine"]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: it cannot compile CUDA here")


@functools.cache
def surveyed():
    return {arch: nvcc.survey(NVCC, arch) for arch in nvcc.ARCHITECTURES}


@pytest.fixture
def decode():
    return surveyed()


@needs_nvcc
@pytest.mark.parametrize("arch", nvcc.ARCHITECTURES)
def test_gates_hold_and_inner_loops_have_not_grown(decode, arch):
    names = [each.binary.launch.name for each in decode[arch]]
    assert names == [f"rel_attention_{kernel}_kernel" for kernel in KERNELS]
    assert [each.failures for each in decode[arch]] == [()] * 3
    table = survey.read_table().get(nvcc.version(NVCC))
    if table is None:
        pytest.skip(f"the table does not hold {nvcc.version(NVCC)}")
    assert [survey.growth_failure(each, table) for each in decode[arch]] == [None] * 3


@needs_nvcc
def test_a_pass_of_the_split_kernel_reads_each_key_and_value_once(decode):
    split = decode[90][1]
    todo = nvcc.Plan(DECODE, speed.H100.n_sm).work()["rel_attention_split_kernel"]
    wide = [i for i in split.binary.code.main_loop() if i.opcode.startswith("LDG.E.128")]
    assert 16 * 32 * nvcc.WARPS * len(wide) == todo.keys * 2 * 2 * DECODE.D
    assert sass.count(split.binary.code.main_loop())["FFMA"] >= todo.keys // nvcc.WARPS * 2 * 2


@needs_nvcc
def test_decoding_is_given_as_a_share_of_the_bandwidth(decode):
    (row,) = model._times(decode[90])
    for ms, rate, gpu in ((row[2], row[3], speed.H100), (row[4], row[5], speed.H200)):
        share = DECODE.least_bytes / gpu.bandwidth / (float(ms) * 1e-3)
        assert int(re.fullmatch(r"(\d+)% of copy", rate)[1]) == pytest.approx(100 * share, abs=2)
        assert 0 < share < 1
    assert row[-1] == str(ASKED["decode/forward"]) == "≥ 70% of copy"


def test_bytes_of_keys_values_and_r_once():
    keys = 32 * 16 * 3800 * 64 * 2
    assert DECODE.least_bytes == 2 * keys + 16 * 3800 * 64 * 2


def test_the_plan_goes_by_the_constants_of_the_source():
    source = "".join(
        (nvcc.CSRC / "cuda" / name).read_text(encoding="utf-8")
        for name in ("rel_attention_decode.cu", "rel_attention_decode.cuh", "launch.cuh")
    )
    for name, value in {
        "kBlocksPerMultiprocessor": nvcc.Plan.BLOCKS_PER_SM,
        "kLeastSplitKeys": nvcc.Plan.LEAST_SPLIT_KEYS,
        "kRows": nvcc.Plan.ROWS,
        "kThreads": 32 * nvcc.WARPS,
    }.items():
        assert f"constexpr int {name} = {value};" in source
    assert f"sizeof(typename L::Part) <= 16 ? {nvcc.Plan.KEYS} : 2;" in source


def test_every_key_and_row_is_in_the_plan():
    plan = nvcc.Plan(DECODE, speed.H100.n_sm)
    assert (plan.n_splits, plan.split_keys, plan.batches_per_block) == (5, 768, 32)
    work = plan.work()
    split, positions = (work[f"rel_attention_{name}_kernel"] for name in ("split", "positions"))
    assert split.passes * split.keys >= DECODE.B * DECODE.H * DECODE.n_keys
    assert positions.passes * positions.keys >= DECODE.B * DECODE.H * DECODE.n_keys
    assert split.programs == DECODE.B * DECODE.H * plan.n_splits
