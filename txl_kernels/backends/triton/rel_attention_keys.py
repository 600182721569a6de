"""Which keys a query of `rel_attention` attends to, and which pairs have a row of r.

Functions that forward and backward share; `docs/mathematics.md` derives them. The numbers are from
`rel_attention_call.py`, which limits them so that no 32-bit sum overflows and no negative number is
divided.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INT31 = tl.constexpr(2**31)
# Above every key, and as a 32-bit number far from overflow.
_ABOVE = tl.constexpr(2**30)


@triton.jit
def padded_rows(Tq):
    """Rows per (batch, head) in copies of the queries' data: a multiple of every tile."""
    return (Tq + 127) // 128 * 128


@triton.jit
def _clamped(x, lowest, highest):
    """An int64 number as an int32 in [lowest, highest]."""
    return tl.minimum(tl.maximum(x, lowest), highest).to(tl.int32)


@triton.jit
def key_limits(p_key_start, p_key_lens, i_b, Tk):
    """[first, last): the keys of batch row i_b, clamped to [0, Tk]; empty if first >= last."""
    first = 0
    last = Tk
    if p_key_start is not None:
        first = _clamped(tl.load(p_key_start + i_b).to(tl.int64), 0, Tk)
    if p_key_lens is not None:
        last = _clamped(tl.load(p_key_lens + i_b).to(tl.int64), 0, Tk)
    return first, last


@triton.jit
def query_geometry(p_q_start, i_b, left, right, offset, Tq, Tk, R):
    """Where the queries of batch row i_b are among the keys and in r.

    Returns lo_shift, hi_shift, first_p, offset: query i is at position i + first_p, its window is
    [i + lo_shift, i + hi_shift), and its row of r for key j is j - i + offset. With p_q_start,
    first_p is an int64; the other numbers are clamped where more would exclude or include no
    further key, and would select no other row.
    """
    first_p = Tk - Tq
    lo_shift = first_p - left
    hi_shift = first_p + right + 1
    if p_q_start is not None:
        start = tl.load(p_q_start + i_b).to(tl.int64)
        start = tl.minimum(tl.maximum(start, -_INT31), _INT31)
        lo_shift = _clamped(start - left, -Tq, Tk)
        hi_shift = _clamped(start + right + 1, -Tq, Tk)
        offset = _clamped(first_p - start + offset, -Tk, R + Tq)
        first_p = start
    return lo_shift, hi_shift, first_p, offset


@triton.jit
def visible_keys(
    o_i, first, last, lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase
):
    """[lo, hi) of the keys in [first, last) that query o_i attends to.

    o_i is a number or a block; first and last may be blocks too. For given first and last neither
    lo nor hi decreases with o_i.
    """
    lo = tl.maximum(o_i + lo_shift, first)
    hi = tl.minimum(o_i + hi_shift, last)
    if chunk_size is not None:
        chunk = (tl.cast(first_p, tl.int64) + chunk_phase + o_i) // chunk_size
        chunk_lo = (chunk - chunk_left) * chunk_size - chunk_phase
        chunk_hi = (chunk + 1) * chunk_size - chunk_phase
        lo = tl.minimum(tl.maximum(lo, chunk_lo), _ABOVE).to(tl.int32)
        hi = tl.maximum(tl.minimum(hi, chunk_hi), -_ABOVE).to(tl.int32)
    return lo, hi


@triton.jit
def query_limits(p_query_ranges, i_b, begin_i, first, last, Tq, ROWS: tl.constexpr):
    """[first, last) of each of ROWS queries from begin_i on, as blocks.

    Without p_query_ranges the numbers first and last themselves.
    """
    if p_query_ranges is not None:
        n_rows = padded_rows(Tq)
        p_rows = p_query_ranges + tl.cast(i_b, tl.int64) * 2 * n_rows + begin_i
        p_rows += tl.arange(0, ROWS)
        first = tl.maximum(tl.load(p_rows), first)
        last = tl.minimum(tl.load(p_rows + n_rows), last)
    return first, last


@triton.jit
def tile_keys(
    p_tile_ranges, i_b, begin_i, first, last, lo_shift, hi_shift, first_p, Tq,
    chunk_size, chunk_left, chunk_phase, ROWS: tl.constexpr,
):  # fmt: skip
    """begin, end, all_begin, all_end of a tile of ROWS queries from begin_i on.

    Each query attends to no key outside [begin, end) and to all of [all_begin, all_end).
    """
    all_first, all_last = first, last
    if p_tile_ranges is not None:
        n_entries = padded_rows(Tq) // 16
        p_entry = p_tile_ranges + tl.cast(i_b, tl.int64) * 4 * n_entries + begin_i // 16
        p_entry += tl.arange(0, ROWS // 16)
        first = tl.maximum(first, tl.min(tl.load(p_entry)))
        last = tl.minimum(last, tl.max(tl.load(p_entry + n_entries)))
        all_first = tl.maximum(all_first, tl.max(tl.load(p_entry + 2 * n_entries)))
        all_last = tl.minimum(all_last, tl.min(tl.load(p_entry + 3 * n_entries)))
    last_i = tl.minimum(begin_i + ROWS, Tq) - 1
    begin, _ = visible_keys(
        begin_i, first, last, lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase
    )
    _, end = visible_keys(
        last_i, first, last, lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase
    )
    all_begin, _ = visible_keys(
        last_i, all_first, all_last, lo_shift, hi_shift, first_p,
        chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip
    _, all_end = visible_keys(
        begin_i, all_first, all_last, lo_shift, hi_shift, first_p,
        chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip
    return begin, end, all_begin, all_end


@triton.jit
def visible_tile(
    p_query_ranges, i_b, begin_i, begin_j, first, last, lo_shift, hi_shift, first_p, Tq,
    chunk_size, chunk_left, chunk_phase, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """bool [queries from begin_i on, keys from begin_j on]: True where the query attends.

    Keys are counted from begin_j, so that no intermediate result stays in registers between blocks.
    """
    first, last = query_limits(p_query_ranges, i_b, begin_i, first, last, Tq, ROWS)
    if chunk_size is not None:
        chunk_phase += begin_j
    lo, hi = visible_keys(
        begin_i - begin_j + tl.arange(0, ROWS), first - begin_j, last - begin_j,
        lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip
    o = tl.arange(0, COLUMNS)[None, :]
    return (o >= lo[:, None]) & (o < hi[:, None])


@triton.jit
def seeing_queries(
    begin_j, end_j, first, last, lo_shift, hi_shift, first_p, Tq,
    chunk_size, chunk_left, chunk_phase,
):  # fmt: skip
    """[lo, hi) of the queries that attend to a key in [begin_j, end_j), within [0, Tq].

    The mirror image of `visible_keys`: queries outside attend to none of these keys; some queries
    inside may attend to none either.
    """
    begin_j = tl.maximum(begin_j, first)
    end_j = tl.minimum(end_j, last)
    lo = begin_j - hi_shift + 1
    hi = end_j - lo_shift
    if chunk_size is not None:
        q_phase = tl.cast(first_p, tl.int64) + chunk_phase
        chunk = (tl.cast(begin_j, tl.int64) + chunk_phase) // chunk_size
        lo = _clamped(tl.maximum(lo, chunk * chunk_size - q_phase), 0, Tq)
        chunk = (tl.cast(end_j, tl.int64) - 1 + chunk_phase) // chunk_size
        after = (chunk + chunk_left + 1) * chunk_size - q_phase
        hi = _clamped(tl.minimum(hi, after), 0, Tq)
    lo = tl.maximum(lo, 0)
    hi = tl.minimum(hi, Tq)
    return lo, tl.where(begin_j < end_j, hi, lo)


@triton.jit
def queries_in_range(p_tile_ranges, i_b, begin_j, end_j, Tq):
    """[lo, hi) of the queries whose own ranges meet [begin_j, end_j), in steps of 16.

    Queries between two of them may have other ranges: exact where both ends of the ranges do not
    decrease.
    """
    n_entries = padded_rows(Tq) // 16
    p_entry = p_tile_ranges + tl.cast(i_b, tl.int64) * 4 * n_entries
    lo, hi = n_entries, tl.full((), 0, tl.int32)
    for begin in range(0, n_entries, 128):
        o = begin + tl.arange(0, 128)
        start = tl.load(p_entry + o, mask=o < n_entries, other=_ABOVE)
        end = tl.load(p_entry + n_entries + o, mask=o < n_entries, other=0)
        meets = (start < end_j) & (end > begin_j)
        lo = tl.minimum(lo, tl.min(tl.where(meets, o, n_entries)))
        hi = tl.maximum(hi, tl.max(tl.where(meets, o + 1, 0)))
    return lo * 16, tl.minimum(hi * 16, Tq)


@triton.jit
def near_keys(begin, end, begin_i, offset, R, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[near_begin, near_end) within [begin, end]: the blocks in which a pair has a row of r.

    Blocks have COLUMNS keys from `begin` on; ROWS queries begin at begin_i.
    """
    lo = begin_i - offset  # the first key with a row, for the first query
    hi = lo + ROWS - 1 + R  # after the last key with a row, for the last query
    near_begin = begin + tl.maximum(lo - begin, 0) // COLUMNS * COLUMNS
    near_end = begin + tl.cdiv(tl.maximum(hi - begin, 0), COLUMNS) * COLUMNS
    return tl.minimum(near_begin, end), tl.minimum(near_end, end)


@triton.jit
def near_queries(begin, end, begin_j, offset, R, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`near_keys` for blocks of ROWS queries from `begin` on and COLUMNS keys from begin_j on."""
    return near_keys(begin, end, begin_j, R - 1 - offset, R, COLUMNS, ROWS)


@triton.jit
def mask_tile(p_mask, s_mi, s_mj, o_i, o_j, Tq, Tk):
    """bool [queries, keys] of the dense mask, False outside it; p_mask points to [b, h, 0, 0].

    Where the memory's length is no multiple of a block, the keys of its first block begin below 0;
    as unsigned numbers they are above Tk. Backward exchanges queries and keys, with their strides
    and counts.
    """
    m_i = o_i.to(tl.uint32, bitcast=True) < Tq
    m_j = o_j.to(tl.uint32, bitcast=True) < Tk
    inside = m_i[:, None] & m_j[None, :]
    p_tile = p_mask + o_i.to(tl.int64)[:, None] * s_mi + o_j.to(tl.int64)[None, :] * s_mj
    return tl.load(p_tile, mask=inside, other=0) != 0
