"""The model agrees with published speeds, and moves the way the machine does."""

from __future__ import annotations

import dataclasses

import pytest

from txl_kernels.testing.aot import sass, speed
from txl_kernels.testing.aot.build import build
from txl_kernels.testing.aot.record import recording

# Non-causal flash attention of the Triton tutorial's kind on an H100, 16k keys, in TFLOP/s: read
# off the charts of "FlashAttention-3" (arXiv 2407.08608) and from reports on newer compilers.
PUBLISHED = {64: (403, 403), 128: (395, 487)}
TILES = {64: (128, 64, 4, 3), 128: (128, 64, 8, 3)}


@pytest.fixture
def flash(launch_flash):
    def make(D, T=16384, tile=None):
        block_q, block_k, num_warps, num_stages = tile or TILES[D]
        with recording(90) as launches:
            launch_flash(D, block_q, block_k, T, num_warps=num_warps, num_stages=num_stages)
        return build(launches[0], 90), 16 * (T // block_q) * (T // block_k)

    return make


@pytest.mark.parametrize("D", [64, 128])
def test_a_flash_kernel_is_as_fast_as_published(flash, D):
    binary, passes = flash(D)
    seconds = speed.estimate(binary, passes, speed.H100).seconds
    rate = 4 * D * 16 * 16384**2 / seconds / 1e12
    least, most = PUBLISHED[D]
    assert 0.85 * least <= rate <= 1.15 * most


def test_time_grows_with_the_work(flash):
    (short, few), (long, many) = flash(64, 8192), flash(64, 16384)
    ratio = speed.estimate(long, many, speed.H100).seconds
    ratio /= speed.estimate(short, few, speed.H100).seconds
    assert 3.5 <= ratio <= 4.1


def test_tensor_clocks_of_a_pass(flash):
    binary, _ = flash(64)
    pipes = speed.pipes(binary.code.main_loop(), binary.num_warps, speed.H100)
    assert pipes.tensor == 2 * 2 * 128 * 64 * 64 / 4096
    assert pipes.exp >= 128 * 64 / 16  # an exponential for each pair, 16 a clock


def test_blocks_that_share_a_multiprocessor_overlap(flash):
    binary, _ = flash(64)
    pipes = speed.pipes(binary.code.main_loop(), binary.num_warps, speed.H100)
    assert pipes.clocks(2, speed.H100) < pipes.clocks(1, speed.H100)


def test_resident_blocks_go_by_the_scarcest(flash):
    binary, _ = flash(64)
    code = dataclasses.replace(binary.code, registers=255)
    assert speed.resident_blocks(dataclasses.replace(binary, code=code), speed.H100) == 2
    assert speed.resident_blocks(dataclasses.replace(binary, shared=200_000), speed.H100) == 1
    assert speed.resident_blocks(dataclasses.replace(binary, shared=240_000), speed.H100) == 0


def test_memory_bounds_what_moves_much(flash):
    binary, passes = flash(64)
    launch = dataclasses.replace(binary.launch, n_bytes=10**12)
    found = speed.estimate(dataclasses.replace(binary, launch=launch), passes, speed.H200)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(10**12 / 4.3e12, rel=1e-3)


def test_more_instructions_take_longer(flash):
    binary, passes = flash(64)
    first = binary.code.main_loop()[0]
    extra = tuple(sass.Instruction(first.address + 1, "FMNMX", "") for _ in range(200))
    longer = dataclasses.replace(
        binary.code,
        instructions=tuple(sorted((*binary.code.instructions, *extra), key=lambda i: i.address)),
    )
    slower = dataclasses.replace(binary, code=longer)
    before = speed.estimate(binary, passes, speed.H100).seconds
    assert speed.estimate(slower, passes, speed.H100).seconds > 1.05 * before
