"""Shared by the tests of all backends: error budget, named cases, comparison with float64."""

from __future__ import annotations

from txl_kernels.backends.reference.philox import dropout_keep
from txl_kernels.testing.adaptive_softmax import (
    check_adaptive_embedding,
    check_adaptive_softmax,
)
from txl_kernels.testing.adaptive_softmax_cases import (
    ADAPTIVE_SOFTMAX_CASES,
    AdaptiveSoftmaxCase,
)
from txl_kernels.testing.budget import check_budget, error_over_budget
from txl_kernels.testing.rel_attention import check_rel_attention, check_rel_attention_output
from txl_kernels.testing.rel_attention_cases import REL_ATTENTION_CASES, RelAttentionCase
from txl_kernels.testing.rel_attention_decode_cases import DECODE_CASES

__all__ = [
    "ADAPTIVE_SOFTMAX_CASES",
    "DECODE_CASES",
    "REL_ATTENTION_CASES",
    "AdaptiveSoftmaxCase",
    "RelAttentionCase",
    "check_adaptive_embedding",
    "check_adaptive_softmax",
    "check_budget",
    "check_rel_attention",
    "check_rel_attention_output",
    "dropout_keep",
    "error_over_budget",
]
