"""A launch is noted as Triton's launcher would specialise it, and is not run."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing.aot.build import build
from txl_kernels.testing.aot.record import recording


def record_one(launch, *args, arch=90, **kwargs):
    with recording(arch) as launches:
        launch(*args, **kwargs)
    (found,) = launches
    return found


def divisible(launch):
    """Names of the arguments known to be divisible by 16."""
    names = launch.kernel.arg_names
    return {names[path[0]] for path, known in launch.attributes.items() if known}


def test_grid_constexprs_and_numbers_are_noted(launch_copy):
    found = record_one(launch_copy, 1000, 3)
    assert found.name == "_copy_kernel"
    assert (found.grid, found.n_programs) == ((8, 1, 1), 8)
    assert found.constexprs["BLOCK"] == 128
    assert found.values["n"] == 1000
    assert found.signature["p_x"] == "*fp32"


def test_what_is_divisible_by_16_is_known_to_be(launch_copy):
    assert divisible(record_one(launch_copy, 1000, 3)) == {"p_x", "p_out"}
    assert divisible(record_one(launch_copy, 1024, 48)) == {"p_x", "p_out", "n", "s_x"}


def test_a_number_that_is_1_is_compiled_in(launch_copy):
    assert record_one(launch_copy, 1000, 1).constexprs["s_x"] == 1


def test_misaligned_tensors_are_not_called_divisible(launch_copy):
    x = torch.empty(2000)[1:]
    assert divisible(record_one(launch_copy, 1000, 1, x)) == {"p_out"}


def test_dtypes_are_part_of_the_signature(launch_product):
    found = record_one(launch_product, 64, torch.float16)
    assert (found.signature["p_a"], found.signature["p_out"]) == ("*fp16", "*fp32")


def test_the_launcher_is_as_before_afterwards(launch_copy):
    record_one(launch_copy, 16, 1)
    with pytest.raises(RuntimeError, match="active drivers"):  # no GPU, and no stand-in any more
        launch_copy(16, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_builds_for_both_architectures(launch_copy):
    launch = record_one(launch_copy, 1000, 3)
    for arch in (80, 90):
        binary = build(launch, arch)
        assert binary.code.registers > 0
        assert any(i.base == "EXIT" for i in binary.code.instructions)
