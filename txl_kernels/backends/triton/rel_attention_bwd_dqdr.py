"""The backward kernel of `rel_attention` for queries: dq, dr and the sums of the head biases."""

from __future__ import annotations

import triton
import triton.language as tl

from txl_kernels.backends.triton.rel_attention_call import UNSPECIALIZED
from txl_kernels.backends.triton.rel_attention_keys import (
    key_limits,
    mask_tile,
    near_keys,
    padded_rows,
    query_geometry,
    tile_keys,
    visible_tile,
)
from txl_kernels.backends.triton.rel_attention_skew import (
    pack_pairs,
    skew_transposed,
    unpack_pairs,
    unskew_transposed,
)
from txl_kernels.backends.triton.rel_attention_tile import (
    dropout_keep,
    exponents,
    key_block,
    load_block,
    load_padded,
    load_position_block,
    load_rows,
    probs_and_dscores,
)


@triton.jit
def _add_chunk(
    b_chunk, b_qv, b_dqv, b_ends, begin_m, p_r, s_r_m, p_dr, R, o_d,
    D: tl.constexpr, CLAMP: tl.constexpr, NEEDS_DQV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds score gradients by row of r, [ROWS from begin_m on, queries], to dqv and to dr.

    With CLAMP, gradients of rows below 0 and above R - 1 are summed for each query, in the first
    and second row of b_ends, and added to dr at the end: within one addition to dr no row occurs
    twice. The sums are products, because sums along columns would need exchanges between lanes.
    """
    if NEEDS_DQV:
        b_r = load_position_block(p_r, s_r_m, begin_m, R, o_d, D, CLAMP, ROWS)
        b_dqv = tl.dot(tl.trans(b_r), b_chunk, b_dqv, input_precision="ieee")
    if p_dr is not None:
        b_dr = tl.dot(b_chunk, b_qv, input_precision="ieee")
        o = tl.arange(0, ROWS)
        m_row = (o >= -begin_m) & (o < R - begin_m)
        p_tile = p_dr + begin_m.to(tl.int64) * D + (o[:, None] * D + o_d[None, :])
        tl.atomic_add(p_tile, b_dr, mask=m_row[:, None] & (o_d < D)[None, :], sem="relaxed")
        if CLAMP:
            if (begin_m < 0) | (begin_m + ROWS > R):
                o_end = tl.arange(0, 16)[:, None]
                below = (o_end == 0) & (o < -begin_m)[None, :]
                above = (o_end == 1) & (o >= R - begin_m)[None, :]
                b_end = tl.where(below | above, 1.0, 0.0).to(b_chunk.dtype)
                b_ends = tl.dot(b_end, b_chunk, b_ends, input_precision="ieee")
    return b_dqv, b_ends


@triton.jit
def _add_clamped(p_row, b_ends, END: tl.constexpr, b_qv, o_d, D: tl.constexpr):
    """Adds Σ_a b_ends[END, a] · b_qv[a] to one row of dr."""
    b_sums = tl.sum(tl.where(tl.arange(0, 16)[:, None] == END, b_ends, 0.0), 0)
    b_row = tl.sum(b_sums[:, None] * b_qv.to(tl.float32), 0)
    tl.atomic_add(p_row + o_d, b_row, mask=o_d < D, sem="relaxed")


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "dqu_scale", "dqv_scale", "first_item", "n_splits"])
def _rel_attention_bwd_dqdr_kernel(
    p_qu,  # [B, H, padded_rows(Tq), BLOCK_D], contiguous: q + r_w_bias with its factor, and 0
    p_qv,  # [B, H, padded_rows(Tq), BLOCK_DP], the same of the position query and r_r_bias
    p_k,  # [B, Hk, Ts, D]
    p_v,  # [B, Hk, Ts, DV]
    p_r,  # [1 or B, 1 or H, R, DP]
    p_mem_k,  # [B, Hk, Tm, D]
    p_mem_v,  # [B, Hk, Tm, DV]
    p_q_start,  # [B]
    p_key_start,  # [B]
    p_key_lens,  # [B]
    p_query_ranges,  # [B, 2, padded_rows(Tq)]
    p_tile_ranges,  # [B, 4, padded_rows(Tq) / 16]
    p_mask,  # [B, H, Tq, Tk]
    p_seed,  # one int64
    p_dout,  # [B, H, Tq, DV]
    p_padded_lse,  # [B, H, padded_rows(Tq)], contiguous, float32; infinite without keys
    p_delta,  # the same
    p_dq,  # [B, H, Tq, D], contiguous; None if not requested, as the four below
    p_dq_pos,  # [B, H, Tq, DP], contiguous
    p_dr,  # [1 or B, 1 or H, splits or 1, R, DP], contiguous, float32, zeros at first
    p_dqu_sums,  # [B, H, tiles, D], contiguous, float32
    p_dqv_sums,  # [B, H, tiles, DP], contiguous, float32
    s_k_b, s_k_h, s_k_j,
    s_v_b, s_v_h, s_v_j,
    s_r_b, s_r_h, s_r_m,
    s_mem_k_b, s_mem_k_h, s_mem_k_j,
    s_mem_v_b, s_mem_v_h, s_mem_v_j,
    s_mask_b, s_mask_h, s_mask_i, s_mask_j,
    s_dout_b, s_dout_h, s_dout_i,
    s_dr_b, s_dr_h, s_dr_s,
    H, Tq, Tm, Tk, R, offset, left, right, chunk_size, chunk_left, chunk_phase,
    scale, dqu_scale, dqv_scale, softcap, threshold, dropout_scale, first_item, n_splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,
    CLAMP: tl.constexpr,
    FAR: tl.constexpr,
    HAS_Q_POS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: one tile of BLOCK_Q queries of a head and all their keys.

    A launch computes the tiles from first_item on. Recomputes probabilities from lse, block by
    block; dq stays in registers. A block's score gradients complete those of the previous chunk of
    rows of r, which are then multiplied once for dq and once for dr; dr is added to memory in
    float32. With FAR, a second loop over blocks without a row of r skips all that. Writes dq and,
    per tile, the column sums of its two parts. The order of additions to dr is fixed if each
    program of a launch has its own split. Each other sum is computed by one program in a fixed
    order.
    """
    NEEDS_DQU: tl.constexpr = (p_dq is not None) or (p_dqu_sums is not None)
    NEEDS_DQV: tl.constexpr = (
        (p_dq is not None and not HAS_Q_POS) or (p_dq_pos is not None) or (p_dqv_sums is not None)
    )
    n_tiles = tl.cdiv(Tq, BLOCK_Q)
    i_split, i_group = tl.program_id(0) % n_splits, tl.program_id(0) // n_splits
    i_item = first_item + i_split
    i_h = (i_group % H).to(tl.int64)
    o_d, o_dp, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DP), tl.arange(0, BLOCK_DV)
    i_b = (i_group // H + i_item // n_tiles).to(tl.int64)
    # With a causal mask the last queries attend to most keys: the longest tiles start first.
    i_tile = n_tiles - 1 - i_item % n_tiles
    begin_i = i_tile * BLOCK_Q
    o_i = begin_i + tl.arange(0, BLOCK_Q)
    i_hk = i_h // GROUP
    p_k_bh = p_k + i_b * s_k_b + i_hk * s_k_h
    p_v_bh = p_v + i_b * s_v_b + i_hk * s_v_h
    p_r_bh = p_r + i_b * s_r_b + i_h * s_r_h
    p_mem_k_bh, p_mem_v_bh, p_mask_bh, p_dr_bh = None, None, None, None
    if p_mem_k is not None:
        p_mem_k_bh = p_mem_k + i_b * s_mem_k_b + i_hk * s_mem_k_h
        p_mem_v_bh = p_mem_v + i_b * s_mem_v_b + i_hk * s_mem_v_h
    if p_mask is not None:
        p_mask_bh = p_mask + i_b * s_mask_b + i_h * s_mask_h
    if p_dr is not None:
        p_dr_bh = p_dr + i_b * s_dr_b + i_h * s_dr_h + i_split.to(tl.int64) * s_dr_s
    i_row = (i_b * H + i_h) * Tq
    o_row = (i_b * H + i_h) * padded_rows(Tq) + begin_i
    b_qu = load_padded(p_qu, o_row, BLOCK_Q, BLOCK_D)
    b_qv = load_padded(p_qv, o_row, BLOCK_Q, BLOCK_DP)
    b_dout = load_rows(p_dout + i_b * s_dout_b + i_h * s_dout_h, o_i, s_dout_i, Tq, o_dv, DV)
    o_row += tl.arange(0, BLOCK_Q)
    b_lse, b_delta = tl.load(p_padded_lse + o_row), tl.load(p_delta + o_row)
    first, last = key_limits(p_key_start, p_key_lens, i_b, Tk)
    lo_shift, hi_shift, first_p, offset = query_geometry(
        p_q_start, i_b, left, right, offset, Tq, Tk, R
    )
    begin, end, all_begin, all_end = tile_keys(
        p_tile_ranges, i_b, begin_i, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase, BLOCK_Q,
    )  # fmt: skip
    # Blocks of keys are aligned to the segment's first key, as in forward.
    begin -= (begin + tl.cdiv(Tm, BLOCK_K) * BLOCK_K - Tm) % BLOCK_K
    near_begin, near_end = begin, end
    if FAR:
        near_begin, near_end = near_keys(begin, end, begin_i, offset, R, BLOCK_Q, BLOCK_K)

    b_dqu = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    b_dqv = tl.zeros([BLOCK_DP, BLOCK_Q], tl.float32)
    b_ends = tl.zeros([16, BLOCK_Q], tl.float32)
    nothing = tl.zeros([BLOCK_K, BLOCK_Q], p_qu.dtype.element_ty)
    packed = pack_pairs(nothing, BLOCK_K, BLOCK_Q)
    begin_m = near_begin - begin_i + offset - BLOCK_K
    has_near = near_begin < near_end if FAR else True
    earlier = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    if has_near:
        b_r = load_position_block(p_r_bh, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
        earlier = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
    like = earlier
    for IS_FAR in tl.static_range(2 if FAR else 1):
        from_j, to_j = near_begin, near_end
        if IS_FAR:  # the blocks before the near ones and those after them
            from_j, to_j = begin, end - (near_end - near_begin)
        for begin_j in tl.range(from_j, to_j, BLOCK_K):
            if IS_FAR:
                begin_j += tl.where(begin_j < near_begin, 0, near_end - near_begin)
            else:
                begin_m = begin_j - begin_i + offset
                b_r = load_position_block(p_r_bh, s_r_m, begin_m, R, o_dp, DP, CLAMP, BLOCK_K)
                chunk = tl.dot(b_r, tl.trans(b_qv), input_precision="ieee")
                b_scores = skew_transposed(chunk, earlier, BLOCK_K, BLOCK_Q)
                earlier = chunk
            p_rows, s_row, low, high = key_block(
                p_k_bh, s_k_j, p_mem_k_bh, s_mem_k_j, begin_j, p_key_start, first, last, Tm
            )
            b_k = load_block(p_rows, s_row, begin_j, low, high, o_d, D, BLOCK_K)
            if IS_FAR:
                b_scores = tl.dot(b_k, tl.trans(b_qu), input_precision="ieee")
            else:
                b_scores = tl.dot(b_k, tl.trans(b_qu), b_scores, input_precision="ieee")
            p_rows, s_row, low, high = key_block(
                p_v_bh, s_v_j, p_mem_v_bh, s_mem_v_j, begin_j, p_key_start, first, last, Tm
            )
            b_v = load_block(p_rows, s_row, begin_j, low, high, o_dv, DV, BLOCK_K)
            b_dprobs = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
            b_exponents, b_tanh = exponents(b_scores, scale, softcap, b_lse)
            if (begin_j < all_begin) | (begin_j + BLOCK_K > all_end):
                seen = visible_tile(
                    p_query_ranges, i_b, begin_i, begin_j, first, last,
                    lo_shift, hi_shift, first_p, Tq,
                    chunk_size, chunk_left, chunk_phase, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
                b_exponents = tl.where(tl.trans(seen), b_exponents, float("-inf"))
            if p_mask is not None:
                o_j = begin_j + tl.arange(0, BLOCK_K)
                seen = mask_tile(p_mask_bh, s_mask_j, s_mask_i, o_j, o_i, Tk, Tq)
                b_exponents = tl.where(seen, b_exponents, float("-inf"))
            keep = None
            if threshold is not None:
                i_bh = (i_b * H + i_h).to(tl.int32)
                keep = dropout_keep(p_seed, threshold, i_bh, o_i, begin_j, BLOCK_Q, BLOCK_K)
                keep = tl.trans(keep)
            _, b_dscores = probs_and_dscores(
                b_exponents, b_tanh, b_dprobs, b_delta, keep, softcap, dropout_scale
            )
            b_dscores = b_dscores.to(b_k.dtype)
            if NEEDS_DQU:
                b_dqu = tl.dot(tl.trans(b_k), b_dscores, b_dqu, input_precision="ieee")
            if not IS_FAR:
                before = unpack_pairs(packed, b_k.dtype, BLOCK_K, BLOCK_Q)
                b_chunk = unskew_transposed(b_dscores, before, like, BLOCK_K, BLOCK_Q)
                packed = pack_pairs(b_dscores, BLOCK_K, BLOCK_Q)
                b_dqv, b_ends = _add_chunk(
                    b_chunk, b_qv, b_dqv, b_ends, begin_m - BLOCK_K,
                    p_r_bh, s_r_m, p_dr_bh, R, o_dp, DP, CLAMP, NEEDS_DQV, BLOCK_K,
                )  # fmt: skip
        if not IS_FAR and has_near:
            # The last block's own chunk, whose rows begin at begin_m.
            before = unpack_pairs(packed, p_qu.dtype.element_ty, BLOCK_K, BLOCK_Q)
            b_chunk = unskew_transposed(nothing, before, like, BLOCK_K, BLOCK_Q)
            b_dqv, b_ends = _add_chunk(
                b_chunk, b_qv, b_dqv, b_ends, begin_m,
                p_r_bh, s_r_m, p_dr_bh, R, o_dp, DP, CLAMP, NEEDS_DQV, BLOCK_K,
            )  # fmt: skip
    if CLAMP and p_dr is not None:
        tl.debug_barrier()
        _add_clamped(p_dr_bh, b_ends, 0, b_qv, o_dp, DP)
        _add_clamped(p_dr_bh + tl.full((), R - 1, tl.int64) * DP, b_ends, 1, b_qv, o_dp, DP)

    b_dqu *= dqu_scale
    b_dqv *= dqv_scale
    if p_dq is not None:
        p_tile = p_dq + (i_row + o_i)[:, None] * D + o_d[None, :]
        inside = (o_i < Tq)[:, None] & (o_d < D)[None, :]
        b_dq = b_dqu if HAS_Q_POS else b_dqu + b_dqv
        tl.store(p_tile, tl.trans(b_dq).to(p_dq.dtype.element_ty), mask=inside)
    if p_dq_pos is not None:
        p_tile = p_dq_pos + (i_row + o_i)[:, None] * DP + o_dp[None, :]
        inside = (o_i < Tq)[:, None] & (o_dp < DP)[None, :]
        tl.store(p_tile, tl.trans(b_dqv).to(p_dq_pos.dtype.element_ty), mask=inside)
    o_sums = (i_b * H + i_h) * n_tiles + i_tile
    if p_dqu_sums is not None:
        tl.store(p_dqu_sums + o_sums * D + o_d, tl.sum(b_dqu, 1), mask=o_d < D)
    if p_dqv_sums is not None:
        tl.store(p_dqv_sums + o_sums * DP + o_dp, tl.sum(b_dqv, 1), mask=o_dp < DP)
