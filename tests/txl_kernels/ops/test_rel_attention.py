"""Every backend of rel_attention within the error budget, on every named case and dtype."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.testing import REL_ATTENTION_CASES, check_rel_attention

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@pytest.mark.parametrize("case", REL_ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_output_and_gradients_are_within_the_error_budget(backend, dtype, case, require_backend):
    require_backend(
        "rel_attention", backend, dtype=dtype, D=case.D, Dv=case.Dv, needs_grad=True, uses=case.uses
    )
    check_rel_attention(case, backend, dtype)
