"""Fused kernels of Transformer-XL: functions on tensors, each with interchangeable backends."""

from __future__ import annotations

from txl_kernels.backends import Resolution, resolve
from txl_kernels.errors import BackendUnavailableError
from txl_kernels.ops.adaptive_embedding import adaptive_embedding
from txl_kernels.ops.adaptive_sample import adaptive_sample
from txl_kernels.ops.adaptive_softmax import (
    adaptive_log_prob,
    adaptive_loss,
    adaptive_nll,
    adaptive_topk,
)
from txl_kernels.ops.banded_attention import banded_attention, banded_is_faster
from txl_kernels.ops.few_row_linear import few_row_linear
from txl_kernels.ops.merge_attention import merge_attention, with_sink
from txl_kernels.ops.packed_ranges import packed_ranges
from txl_kernels.ops.rel_attention import rel_attention, rel_attention_with_lse
from txl_kernels.ops.rel_shift import rel_shift
from txl_kernels.ops.warmup import verify, warmup

__all__ = [
    "BackendUnavailableError",
    "Resolution",
    "adaptive_embedding",
    "adaptive_log_prob",
    "adaptive_loss",
    "adaptive_nll",
    "adaptive_sample",
    "adaptive_topk",
    "banded_attention",
    "banded_is_faster",
    "few_row_linear",
    "merge_attention",
    "packed_ranges",
    "rel_attention",
    "rel_attention_with_lse",
    "rel_shift",
    "resolve",
    "verify",
    "warmup",
    "with_sink",
]
