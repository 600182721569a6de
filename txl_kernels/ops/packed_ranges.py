"""`packed_ranges`: the keys of each token where one row of the batch holds several documents."""

from __future__ import annotations

import torch
from torch import Tensor

from txl_kernels.ops.checks import check_dtype, check_int, check_tensor
from txl_kernels.transforms import is_jit_tracing

OP = "packed_ranges"


def packed_ranges(cu_seqlens: Tensor, T: int, *, n_memory: int = 0) -> tuple[Tensor, Tensor]:
    """`key_start` and `key_lens` of `rel_attention` for documents packed one after the other.

    Document n is the tokens cu_seqlens[n] ≤ i < cu_seqlens[n+1], and its tokens attend to no other
    document. With `causal=True` the result is that of running each document alone.

    Args:
        cu_seqlens: int32 or int64 [N+1], non-decreasing: where each of N documents begins, and
            where the last one ends. Equal neighbours are an empty document.
        T: tokens in the row, at least 0. Tokens outside all documents attend to no key.
        n_memory: keys of a memory (`mem_k`, `mem_v`) before the tokens, at least 0. They belong to
            the first document, which continues an earlier row; cu_seqlens[0] must then be 0. If
            the first document is empty, no token attends to the memory.

    Returns:
        key_start and key_lens, int32 [1, T], on cu_seqlens' device: token i attends to keys
        key_start[0, i] ≤ j < key_lens[0, i], counted over [memory; tokens]. Both are
        non-decreasing. A batch of B rows needs [B, T]: concatenate the results of its rows.

    Raises:
        TypeError: cu_seqlens is not an integer tensor, or T or n_memory is not an integer.
        ValueError: cu_seqlens has another shape, decreases, or does not begin with 0 although
            there is a memory; T or n_memory is negative.

    The values of cu_seqlens are checked on a CPU only, and not inside compilers. Elsewhere the
    host does not read them, and all ranges are clamped to the tokens.
    """
    check_tensor(OP, "cu_seqlens", cu_seqlens)
    check_dtype(OP, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{OP}: cu_seqlens must have shape [N+1], got {list(cu_seqlens.shape)}")
    T = check_int(OP, "T", T, at_least=0)
    n_memory = check_int(OP, "n_memory", n_memory, at_least=0)
    _check_values(cu_seqlens, n_memory)

    borders = cu_seqlens.contiguous()
    tokens = torch.arange(T, dtype=borders.dtype, device=borders.device)
    document = torch.searchsorted(borders, tokens, right=True) - 1  # -1 before the first one
    last = borders.shape[0] - 1
    # A token outside all documents has an empty range at its nearest border.
    start = borders[document.clamp(min=0)].clamp(0, T)
    end = borders[(document + 1).clamp(max=last)].clamp(0, T)
    is_first = (document == 0) & (last > 0)
    start = torch.where(is_first, start, start + n_memory)
    return start.to(torch.int32)[None], (end + n_memory).to(torch.int32)[None]


def _check_values(cu_seqlens: Tensor, n_memory: int) -> None:
    """Raises ValueError for a wrong table on the CPU."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or is_jit_tracing():
        return
    decreases = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if decreases.numel() > 0:
        n = int(decreases[0])
        first, second = cu_seqlens[n : n + 2].tolist()
        raise ValueError(
            f"{OP}: cu_seqlens must not decrease, got {first} then {second} at index {n + 1}"
        )
    if n_memory > 0 and (first := int(cu_seqlens[0])) != 0:
        raise ValueError(f"{OP}: cu_seqlens must begin with 0 after a memory, got {first}")
