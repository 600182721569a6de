"""Products of 32-bit arguments in the kernels do not overflow."""

from __future__ import annotations

import importlib

import pytest
import torch

from txl_kernels._rel_attention_call import (
    N_DIFFERENTIABLE,
    Numbers,
    OptionalTensors,
    RelAttentionCall,
    Rules,
)
from txl_kernels.backends import triton as package

pytestmark = pytest.mark.skipif(
    not package._is_installed() or package.interprets(), reason="a process interprets or compiles"
)
FAR, BLOCK = 2**28, 128  # elements from one row to the next, rows of the largest tile


def launched(stride):
    """The launches of a call and its backward pass; rows of all tensors are `stride` apart."""
    from tools.gates.shipped import recording

    fwd, bwd = (
        getattr(importlib.import_module(f"{package.__name__}.{name}"), function)
        for name, function in (
            ("rel_attention", "rel_attention_fwd"),
            ("rel_attention_bwd", "rel_attention_bwd"),
        )
    )

    def far(rows):
        tensor = torch.empty(1, dtype=torch.bfloat16, device="meta")
        return tensor.as_strided((1, 1, rows, 64), (0, 0, stride, 1))

    call = RelAttentionCall(
        *(far(40), far(40), far(40), far(80)),
        OptionalTensors(mem_k=far(40), mem_v=far(40)),
        Rules(offset=39, window_right=0),
        Numbers(scale=0.125, pos_scale=0.125),
    )
    needed = [x is not None for x in (*call[:4], *call.optional)[:N_DIFFERENTIABLE]]
    with recording(90) as found:
        out, lse = fwd(*call.arguments())
        bwd(far(40), lse, *call.arguments(), out, lse, needed)
    return found


@pytest.mark.parametrize("stride", [64, FAR])
def test_no_stride_of_rows_overflows_within_a_block(stride):
    for launch in launched(stride):
        for name in launch.kernel.arg_names:
            given = launch.arguments.get(name)
            if name.startswith("s_") and name[-1] in "ijm" and given is not None:
                assert given * BLOCK < 2**31, (launch.kernel.__name__, name, given)
                assert given == 64


def test_adjacent_rows_are_not_copied():
    call = importlib.import_module(f"{package.__name__}.rel_attention_call")
    x = torch.zeros(2, 40, 3, 64).transpose(1, 2)
    assert call.near_rows(x) is x
