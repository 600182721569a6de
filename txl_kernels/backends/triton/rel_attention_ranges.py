"""Ranges of keys per query, [B, Tq], as the kernels of `rel_attention` read them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from txl_kernels.backends.triton.launching import launch
from txl_kernels.backends.triton.rel_attention_keys import padded_rows

# Queries of one entry of the table: the smallest tile. A larger tile combines entries.
_ENTRY = 16
_ENTRIES = 8  # of a program: padded_rows is a multiple of its queries


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _rel_attention_ranges_kernel(
    p_start,  # [B, Tq], int32 or int64, or None
    p_end,  # the same
    p_query_ranges,  # [B, 2, padded_rows(Tq)], contiguous, int32
    p_tile_ranges,  # [B, 4, padded_rows(Tq) / 16], contiguous, int32
    s_start_b, s_start_i,
    s_end_b, s_end_i,
    Tq, Tk,
    ENTRIES: tl.constexpr,
    ENTRY: tl.constexpr,
):  # fmt: skip
    """One program: ENTRIES · ENTRY queries of one batch row.

    Writes each query's [start, end) within [0, Tk], Tk and 0 where that is empty and in the
    padding; and of each ENTRY queries the smallest start and largest end, the largest start and
    smallest end.
    """
    n_rows = padded_rows(Tq)
    n_blocks = n_rows // (ENTRIES * ENTRY)
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    first_entry = tl.program_id(0) % n_blocks * ENTRIES
    o_entry = first_entry + tl.arange(0, ENTRIES)
    o_i = o_entry[:, None] * ENTRY + tl.arange(0, ENTRY)[None, :]
    exists = o_i < Tq
    start = tl.zeros([ENTRIES, ENTRY], tl.int64)
    end = tl.zeros([ENTRIES, ENTRY], tl.int64) + Tk
    if p_start is not None:
        p_tile = p_start + i_b * s_start_b + o_i.to(tl.int64) * s_start_i
        start = tl.load(p_tile, mask=exists, other=0).to(tl.int64)
    if p_end is not None:
        p_tile = p_end + i_b * s_end_b + o_i.to(tl.int64) * s_end_i
        end = tl.load(p_tile, mask=exists, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), Tk).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), Tk).to(tl.int32)
    is_empty = (start >= end) | ~exists
    start = tl.where(is_empty, Tk, start)
    end = tl.where(is_empty, 0, end)
    p_row = p_query_ranges + i_b * 2 * n_rows + o_i
    tl.store(p_row, start)
    tl.store(p_row + n_rows, end)
    n_entries = n_rows // ENTRY
    p_entry = p_tile_ranges + i_b * 4 * n_entries + o_entry
    tl.store(p_entry, tl.min(start, 1))
    tl.store(p_entry + n_entries, tl.max(end, 1))
    tl.store(p_entry + 2 * n_entries, tl.max(tl.where(exists, start, 0), 1))
    tl.store(p_entry + 3 * n_entries, tl.min(tl.where(exists, end, Tk), 1))


def query_ranges(
    start: Tensor | None, end: Tensor | None, B: int, Tq: int, Tk: int
) -> tuple[Tensor | None, Tensor | None]:
    """Launches the kernel above; returns p_query_ranges and p_tile_ranges.

    `start` and `end` are [B, Tq]; without one of them that side is open, without both there are no
    tables.
    """
    given = end if start is None else start
    if given is None:
        return None, None
    n_rows = padded_rows.fn(Tq)
    rows = given.new_empty(B, 2, n_rows, dtype=torch.int32)
    tiles = given.new_empty(B, 4, n_rows // _ENTRY, dtype=torch.int32)
    n_programs = B * n_rows // (_ENTRIES * _ENTRY)
    if n_programs > 0:
        with torch.cuda.device_of(given):
            launch(
                _rel_attention_ranges_kernel,
                (n_programs,),
                p_start=start,
                p_end=end,
                p_query_ranges=rows,
                p_tile_ranges=tiles,
                s_start_b=None if start is None else start.stride(0),
                s_start_i=None if start is None else start.stride(1),
                s_end_b=None if end is None else end.stride(0),
                s_end_i=None if end is None else end.stride(1),
                Tq=Tq,
                Tk=Tk,
                ENTRIES=_ENTRIES,
                ENTRY=_ENTRY,
            )
    return rows, tiles
