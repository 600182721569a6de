"""Which rows of the launch table the `rel_attention` kernels use."""

from __future__ import annotations

import torch

from txl_kernels.backends.triton.launch_table import AttentionConfig, find

# Up to this many queries, forward uses the rows of the variant "short".
SHORT = 16


def forward_config(
    device: torch.device,
    head_sizes: tuple[int, int, int],
    dtype: torch.dtype,
    Tq: int,
    has_mask: bool,
    has_dropout: bool,
) -> AttentionConfig:
    """For the forward kernel. `head_sizes` are D, Dv and Dp.

    The extras of a variant are dropout, a dense mask, and rows whose length is no multiple of 16
    elements. Each needs registers for every pair of a query and a key, or for every load.
    """
    n_extras = has_mask + has_dropout + any(size % 16 for size in head_sizes)
    variants = ["short"] if Tq <= SHORT else []
    variants += ("two_extras", "one_extra")[2 - min(n_extras, 2) :]
    return _find("rel_attention_fwd", device, head_sizes, dtype, *variants)


def dkdv_config(
    device: torch.device,
    head_sizes: tuple[int, int, int],
    dtype: torch.dtype,
    has_mask: bool,
    has_dropout: bool,
) -> AttentionConfig:
    """For the backward kernel in which a program owns keys.

    Backward kernels compute tiles [keys, queries]. Tiles of 64 or more keys use HGMMA on sm_90;
    fewer queries leave more registers for the accumulators; with more queries each load of k, v
    and r and each addition to dr serves more pairs.
    """
    variants = ["one_extra"] if has_mask or has_dropout else []
    return _find("rel_attention_bwd_dkdv", device, head_sizes, dtype, *variants)


def dqdr_config(
    device: torch.device,
    head_sizes: tuple[int, int, int],
    dtype: torch.dtype,
    has_mask: bool,
    has_dropout: bool,
) -> AttentionConfig:
    """For the backward kernel in which a program owns queries."""
    variants = ["one_extra"] if has_mask or has_dropout else []
    return _find("rel_attention_bwd_dqdr", device, head_sizes, dtype, *variants)


def block_size(head_size: int) -> int:
    """Columns of a tile that holds one head: a power of 2, at least a tensor core's 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def _find(
    kernel: str,
    device: torch.device,
    head_sizes: tuple[int, int, int],
    dtype: torch.dtype,
    *variants: str,
) -> AttentionConfig:
    head_size = max(64, block_size(max(head_sizes)))
    bits = 8 * dtype.itemsize
    return find(AttentionConfig, kernel, device, variants=variants, bits=bits, head_size=head_size)
