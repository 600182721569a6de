"""What tests of every backend share: the error budget, the oracle's runs, named cases."""

from __future__ import annotations

from txl_kernels.backends.reference.philox import dropout_keep
from txl_kernels.testing.adaptive_softmax_cases import (
    ADAPTIVE_SOFTMAX_CASES,
    AdaptiveSoftmaxCase,
)
from txl_kernels.testing.budget import check_budget
from txl_kernels.testing.rel_attention import check_rel_attention
from txl_kernels.testing.rel_attention_cases import REL_ATTENTION_CASES, RelAttentionCase

__all__ = [
    "ADAPTIVE_SOFTMAX_CASES",
    "REL_ATTENTION_CASES",
    "AdaptiveSoftmaxCase",
    "RelAttentionCase",
    "check_budget",
    "check_rel_attention",
    "dropout_keep",
]
