"""The kernels of `torch.ops.txl_triton`: each function imports its own at the first call.

With a kernel it imports Triton, which takes seconds.
"""

from __future__ import annotations

from typing import Any


def rel_attention_fwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.rel_attention import rel_attention_fwd as kernel

    return kernel(*args)


def rel_attention_bwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.rel_attention_bwd import rel_attention_bwd as kernel

    return kernel(*args)


def rel_shift_fwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.rel_shift import rel_shift_fwd as kernel

    return kernel(*args)


def rel_shift_bwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.rel_shift import rel_shift_bwd as kernel

    return kernel(*args)


def adaptive_nll_fwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_softmax import adaptive_nll_fwd as kernel

    return kernel(*args)


def adaptive_nll_bwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_softmax import adaptive_nll_bwd as kernel

    return kernel(*args)


def adaptive_loss_fwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_softmax import adaptive_loss_fwd as kernel

    return kernel(*args)


def adaptive_loss_bwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_softmax import adaptive_loss_bwd as kernel

    return kernel(*args)


def adaptive_embedding_fwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_embedding import adaptive_embedding_fwd as kernel

    return kernel(*args)


def adaptive_embedding_bwd(*args: Any) -> Any:
    from txl_kernels.backends.triton.adaptive_embedding import adaptive_embedding_bwd as kernel

    return kernel(*args)
