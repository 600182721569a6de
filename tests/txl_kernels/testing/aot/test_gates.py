"""Each gate stops a kernel that was made to break it, and lets a sound one pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from txl_kernels.testing.aot import gates, survey
from txl_kernels.testing.aot.build import build
from txl_kernels.testing.aot.gates import Gate, Spill
from txl_kernels.testing.aot.record import recording


@pytest.fixture
def built(launch_product):
    """A sum of products, compiled."""

    def make(N, dtype, *args, arch=90, **options):
        with recording(arch) as launches:
            launch_product(N, dtype, *args, **options)
        return build(launches[0], arch)

    return make


def found(binary, products, shuffles=0, name="product"):
    return gates.failures(name, binary, Gate(products, shuffles))


def test_sound_kernels_pass(built):
    assert found(built(64, torch.bfloat16), "hopper") == []
    assert found(built(64, torch.bfloat16, arch=80), "hopper") == []
    assert found(built(32, torch.float16), "tensor") == []
    assert found(built(32, torch.float32), "none") == []


def test_products_by_single_warps_fail_where_four_should_share_one(built):
    (failure,) = found(built(32, torch.float16), "hopper")
    assert "not HGMMA" in failure


def test_products_without_tensor_cores_fail(built):
    (failure,) = found(built(32, torch.float32), "tensor")
    assert failure == "no tensor-core instruction in the loop"


def test_float32_on_tensor_cores_fails(built):
    (failure,) = found(built(32, torch.float32, "tf32"), "none")
    assert failure == "tensor-core instructions where there must be none"


def test_a_gather_along_rows_fails_by_its_shuffles(built):
    binary = built(64, torch.bfloat16, gather=True)
    (failure,) = found(binary, "hopper", gates.row_shuffles(64, 4, 90))
    assert "SHFL in the loop, its reductions need 8" in failure


def test_too_much_shared_memory_fails(built):
    binary = built(64, torch.bfloat16)
    greedy = dataclasses.replace(binary, shared=232448 + 16)
    assert "232464 bytes of shared memory, sm_90 has 232448" in found(greedy, "hopper")


def test_spills_fail_unless_named_and_justified(built, monkeypatch):
    binary = built(64, torch.bfloat16)
    spilling = dataclasses.replace(binary, code=dataclasses.replace(binary.code, stack=24))
    (failure,) = found(spilling, "hopper")
    assert failure == "24 bytes per thread are spilled, 0 are justified"
    table = {("_product_kernel", 90, ("train",)): Spill(24, "measured faster than a smaller tile")}
    monkeypatch.setattr(gates, "SPILLS", table)
    assert found(spilling, "hopper", name="op/train_d64") == []
    assert found(spilling, "hopper", name="op/decode") == [failure]


def test_a_spilled_value_that_moves_in_the_loop_fails_unless_counted(built, monkeypatch):
    binary = built(64, torch.bfloat16)
    inside = binary.code.main_loop()[1]
    moved = dataclasses.replace(inside, opcode="LDL", operands="R2, [R1]")
    code = dataclasses.replace(binary.code, instructions=(*binary.code.instructions, moved))
    moving = dataclasses.replace(binary, code=code)
    (failure,) = found(moving, "hopper")
    assert failure == "1 spilled values move in the loop, 0 are justified"
    spill = Spill(24, "measured faster than a smaller tile", loop=1)
    monkeypatch.setattr(gates, "SPILLS", {("_product_kernel", 90, ("train",)): spill})
    assert found(moving, "hopper", name="op/train_d64") == []


def test_every_justified_spill_says_why():
    assert all(spill.why and spill.most > 0 for spill in gates.SPILLS.values())


@pytest.mark.parametrize("spill", gates.SPILLS, ids=lambda key: "-".join(map(str, key)))
def test_no_spill_is_allowed_that_the_table_of_inner_loops_does_not_have(spill):
    """What a kernel no longer spills is no longer justified, in either version of Triton."""
    kernel, arch, parts = spill
    stacks = [
        row["stack"]
        for version in gates.TRITON_VERSIONS
        for name, row in survey.read_table()[version].items()
        if name.split("/")[-2].partition("#")[0] == kernel
        and name.endswith(f"/sm_{arch}")
        and all(part in name for part in parts)
    ]
    assert max(stacks, default=0) == gates.SPILLS[spill].most


def test_shuffles_of_a_rotation_never_fit_into_those_of_reductions():
    """A 2-D gather of a 64 x 64 tile costs 64 in each of four warps."""
    for num_warps in (4, 8):
        for arch in (80, 90):
            assert gates.row_shuffles(64, num_warps, arch) < 64 * 4 // num_warps
