"""The numbers that kernels are given do not overflow where they multiply in 32 bits."""

from __future__ import annotations

import importlib

import pytest
import torch

from txl_kernels.backends import triton as door

pytestmark = pytest.mark.skipif(
    not door._is_installed() or door.interprets(), reason="nothing is launched here"
)
FAR, BLOCK = 2**28, 128  # elements between rows, most rows of a block


def launched(stride):
    """The launches of a call and its backward whose tensors all have rows so far apart."""
    fwd, bwd = (
        getattr(importlib.import_module(f"{door.__name__}.{name}"), function)
        for name, function in (
            ("rel_attention", "rel_attention_fwd"),
            ("rel_attention_bwd", "rel_attention_bwd"),
        )
    )

    def far(rows):
        tensor = torch.empty(1, dtype=torch.bfloat16, device="meta")
        return tensor.as_strided((1, 1, rows, 64), (0, 0, stride, 1))

    tensors = [far(40), far(40), far(40), far(80), None, None, far(40), far(40), *[None] * 6]
    options = (39, True, True, None, None, (0, 0, 0), 0.125, 0.0, 0.0, False)
    needed = [tensor is not None for tensor in (*tensors[:9], None)]
    from tools.gates.shipped import recording

    with recording(90) as found:
        out, lse = fwd(*tensors, *options)
        bwd(far(40), *tensors, *options, out, lse, needed)
    return found


@pytest.mark.parametrize("stride", [64, FAR])
def test_no_stride_of_rows_overflows_within_a_block(stride):
    for launch in launched(stride):
        for name in launch.kernel.arg_names:
            given = launch.arguments.get(name)
            if name.startswith("s_") and name[-1] in "ijm" and given is not None:
                assert given * BLOCK < 2**31, (launch.kernel.__name__, name, given)
                assert given == 64


def test_rows_that_are_near_are_read_where_they_are():
    call = importlib.import_module(f"{door.__name__}.rel_attention_call")
    x = torch.zeros(2, 40, 3, 64).transpose(1, 2)
    assert call.near_rows(x) is x
