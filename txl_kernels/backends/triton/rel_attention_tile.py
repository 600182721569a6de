"""What forward and backward of `rel_attention` share inside a tile of [queries, keys].

Which keys a query sees, rows of keys and of r from memory, the skew between scores by row of r and
scores by key, softcap, dropout. `docs/mathematics.md` derives them; numbers come from
`rel_attention_call.py`, which sees to it that nothing here overflows or divides below 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_limits(p_key_start, p_key_lens, i_b, Tk):
    """[first, last): the keys that batch row i_b has, whatever the lengths say: within [0, Tk]."""
    first = 0
    last = Tk
    if p_key_start is not None:
        start = tl.load(p_key_start + i_b).to(tl.int64)
        first = tl.minimum(tl.maximum(start, 0), Tk).to(tl.int32)
    if p_key_lens is not None:
        length = tl.load(p_key_lens + i_b).to(tl.int64)
        last = tl.minimum(tl.maximum(length, 0), Tk).to(tl.int32)
    return first, last


@triton.jit
def visible_keys(o_i, first, last, Tq, Tk, left, right, chunk_size, chunk_left, chunk_phase):
    """[lo, hi) of the keys that query o_i sees; o_i is a number or a block.

    Both never decrease with o_i, so a tile sees nothing outside [lo(first query), hi(last query))
    and every query of it sees all of [lo(last query), hi(first query)).
    """
    p = o_i + (Tk - Tq)
    lo = tl.maximum(p - left, first)
    hi = tl.minimum(p + right + 1, last)
    if chunk_size is not None:
        chunk = (p + chunk_phase).to(tl.int64) // chunk_size
        lo = tl.maximum(lo, (chunk - chunk_left) * chunk_size - chunk_phase).to(tl.int32)
        hi = tl.minimum(hi, (chunk + 1) * chunk_size - chunk_phase).to(tl.int32)
    return lo, hi


@triton.jit
def seeing_queries(
    begin_j, end_j, first, last, Tq, Tk, left, right, chunk_size, chunk_left, chunk_phase
):
    """[lo, hi) of the queries that see some key in [begin_j, end_j), within [0, Tq].

    The mirror image of `visible_keys`: queries outside see none of these keys, and inside too some
    may not.
    """
    begin_j = tl.maximum(begin_j, first)
    end_j = tl.minimum(end_j, last)
    lo = begin_j - right
    hi = end_j + left
    if chunk_size is not None:
        chunk = (begin_j + chunk_phase).to(tl.int64) // chunk_size
        lo = tl.maximum(lo, chunk * chunk_size - chunk_phase).to(tl.int32)
        chunk = (end_j - 1 + chunk_phase).to(tl.int64) // chunk_size
        after = (chunk + chunk_left + 1) * chunk_size - chunk_phase
        hi = tl.minimum(hi, after).to(tl.int32)
    lo = tl.maximum(lo - (Tk - Tq), 0)
    hi = tl.minimum(hi - (Tk - Tq), Tq)
    return lo, tl.where(begin_j < end_j, hi, lo)


@triton.jit
def mask_tile(p_mask, s_mi, s_mj, o_i, o_j, Tq, Tk):
    """bool [queries, keys] of the dense mask, False outside it; p_mask stands at [b, h, 0, 0]."""
    inside = (o_i < Tq)[:, None] & (o_j < Tk)[None, :]
    p_tile = p_mask + o_i.to(tl.int64)[:, None] * s_mi + o_j.to(tl.int64)[None, :] * s_mj
    return tl.load(p_tile, mask=inside, other=0) != 0


@triton.jit
def load_rows(p_rows, o_row, stride, n_rows, o_d, D: tl.constexpr):
    """[rows, D]: rows o_row of a matrix, 0 outside [0, n_rows) and from column D on."""
    p_tile = p_rows + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    inside = ((o_row >= 0) & (o_row < n_rows))[:, None]
    if D < o_d.shape[0]:
        inside = inside & (o_d < D)[None, :]
    return tl.load(p_tile, mask=inside, other=0.0)


@triton.jit
def load_keys(p_segment, stride, p_memory, memory_stride, o_j, Tm, Tk, o_d, D: tl.constexpr):
    """[keys, D]: rows o_j ≥ 0 of [memory; segment], each read where it is; 0 from Tk on."""
    if p_memory is not None:
        p_row = tl.where(
            o_j < Tm,
            p_memory + o_j.to(tl.int64) * memory_stride,
            p_segment + (o_j - Tm).to(tl.int64) * stride,
        )
    else:
        p_row = p_segment + o_j.to(tl.int64) * stride
    inside = (o_j < Tk)[:, None]
    if D < o_d.shape[0]:
        inside = inside & (o_d < D)[None, :]
    return tl.load(p_row[:, None] + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def load_positions(p_r, stride, o_m, R, o_d, D: tl.constexpr, CLAMP: tl.constexpr):
    """[rows, D]: rows o_m of r; outside [0, R) 0, or with CLAMP the nearest row."""
    if CLAMP:
        o_m = tl.minimum(tl.maximum(o_m, 0), R - 1)
    return load_rows(p_r, o_m, stride, R, o_d, D)


@triton.jit
def load_lse_and_delta(p_lse, p_delta, o_i, Tq):
    """What backward has of its queries; lse is ∞ where a query is not there or sees no key.

    With such a one every probability comes out as 0, and never as NaN.
    """
    b_lse = tl.load(p_lse + o_i, mask=o_i < Tq, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse, tl.load(p_delta + o_i, mask=o_i < Tq, other=0.0)


@triton.jit
def biased_queries(b_q, p_bias, i_h, o_d, D: tl.constexpr, sign):
    """sign · (queries [rows, D] + row i_h of a head bias [H, D], or None), added in float32.

    Rounded to the queries' dtype for the product that follows.
    """
    b_sum = b_q.to(tl.float32)
    if p_bias is not None:
        b_sum += tl.load(p_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return (b_sum * sign).to(b_q.dtype)


@triton.jit
def core_order(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as one row, 8 × 8 block after block: the order in which tensor cores hold it.

    Shared memory in this order is written and read without bank conflicts.
    """
    blocks = tl.reshape(tile, [ROWS // 8, 8, COLUMNS // 8, 8])
    return tl.reshape(tl.permute(blocks, (0, 2, 1, 3)), [ROWS * COLUMNS])


@triton.jit
def from_core_order(row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `core_order`."""
    blocks = tl.reshape(row, [ROWS // 8, COLUMNS // 8, 8, 8])
    return tl.reshape(tl.permute(blocks, (0, 2, 1, 3)), [ROWS, COLUMNS])


@triton.jit
def rotate_rows(tile, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[a, c] = tile[a, (c + STEP · a) mod COLUMNS]; STEP is 1 or -1, COLUMNS a power of 2.

    One gather on the flattened tile: a store to shared memory and a load from it. A gather on the
    tile itself would shuffle between lanes and spill.
    """
    a = tl.arange(0, ROWS)[:, None]
    c = (tl.arange(0, COLUMNS)[None, :] + STEP * a) & (COLUMNS - 1)
    source = (a // 8 * (COLUMNS // 8) + c // 8) * 64 + a % 8 * 8 + c % 8
    rotated = tl.gather(core_order(tile, ROWS, COLUMNS), core_order(source, ROWS, COLUMNS), 0)
    return from_core_order(rotated, ROWS, COLUMNS)


@triton.jit
def is_earlier(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [a, c]: where row a wants column c of the chunk of r before the current one.

    Key b of row a wants distance b - a: column b - a of the current chunk, or, where that is
    negative, column b - a + COLUMNS of the chunk before. Needs ROWS ≤ COLUMNS.
    """
    return tl.arange(0, COLUMNS)[None, :] >= COLUMNS - tl.arange(0, ROWS)[:, None]


@triton.jit
def skew(chunk, earlier, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scores by key from scores by row of r: out[a, b] = x[a, b - a], x = [earlier | chunk].

    `chunk` holds x's columns [0, COLUMNS), `earlier` those of [-COLUMNS, 0). Each chunk serves
    twice: for a block of keys and, as `earlier`, for the next. Chosen before they are rotated: the
    other way round the choice would stand in another layout than the products.
    """
    chosen = tl.where(is_earlier(ROWS, COLUMNS), earlier, chunk)
    return rotate_rows(chosen, -1, ROWS, COLUMNS)


@triton.jit
def unskew(tile, pending, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse, for gradients: what a block of keys [queries, keys] adds by row of r.

    Returns the chunk before the current one, complete with this block, and what is pending until
    the next: the current chunk's part, in the columns where `is_earlier` is False.
    """
    rotated = rotate_rows(tile, 1, ROWS, COLUMNS)
    return tl.where(is_earlier(ROWS, COLUMNS), rotated, pending), rotated


@triton.jit
def skew_transposed(chunk, earlier, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`skew` for tiles [rows of r or keys, queries]: out[b, a] = x[b - a, a], x = earlier over chunk.

    Needs COLUMNS ≤ ROWS. The same order in shared memory, for the accumulators lie the same way.
    """
    a = tl.arange(0, COLUMNS)[None, :]
    b = tl.arange(0, ROWS)[:, None]
    chosen = tl.where(b >= ROWS - a, earlier, chunk)
    x = (b - a) & (ROWS - 1)
    source = (x // 8 * (COLUMNS // 8) + a // 8) * 64 + x % 8 * 8 + a % 8
    rotated = tl.gather(core_order(chosen, ROWS, COLUMNS), core_order(source, ROWS, COLUMNS), 0)
    return from_core_order(rotated, ROWS, COLUMNS)


@triton.jit
def probs_and_dscores(
    b_scores, b_dprobs, b_lse, b_delta, seen, keep, scale, softcap, dropout_scale
):
    """The probabilities that met v, and the gradient of scale · score, of a tile in any orientation.

    b_scores are plain products; lse (∞ for a row without keys) and delta are broadcastable. `seen`
    and `keep` are bool tiles or None.
    """
    if softcap is not None:
        b_tanh = tanh(b_scores * (scale / softcap))
        b_exponent = b_tanh * softcap - b_lse
    else:
        b_exponent = b_scores * scale - b_lse
    # The difference first, then log₂e: rounding lse · log₂e would err as much as all else.
    b_probs = tl.exp2(b_exponent * 1.4426950408889634)
    if seen is not None:
        b_probs = tl.where(seen, b_probs, 0.0)
    b_kept = b_probs
    if keep is not None:
        b_factor = tl.where(keep, dropout_scale, 0.0)
        b_kept = b_probs * b_factor
        b_dprobs = b_dprobs * b_factor
    b_dscores = b_probs * (b_dprobs - b_delta)
    if softcap is not None:
        b_dscores *= 1.0 - b_tanh * b_tanh
    return b_kept, b_dscores


@triton.jit
def tanh(x):
    """To about one unit in the last place: a polynomial near 0, where 1 - 2/(e^2x + 1) cancels.

    Source of the coefficients: S. Moshier, Cephes, tanhf.
    """
    y = tl.minimum(tl.abs(x), 10.0)
    far = 1.0 - 2.0 / (tl.exp2(y * 2.8853900817779268) + 1.0)  # 2 · log₂e
    z = y * y
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = (near * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * y + y
    b_tanh = tl.where(y < 0.625, near, far)
    return tl.where(x < 0, -b_tanh, b_tanh)


@triton.jit
def dropout_keep(
    p_seed, threshold, i_bh, o_i, begin_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """bool [ROWS, COLUMNS]: which probabilities of queries o_i and keys from begin_j on are kept.

    Word j mod 4 of Philox4x32-10 with counter (j / 4, i, b · H + h, 0) is at least the threshold,
    ⌊p · 2³²⌋ in the bits of an int32. begin_j is a multiple of 4: four neighbouring keys share a
    counter.
    """
    o_block = begin_j // 4 + tl.arange(0, COLUMNS // 4)
    counter = tl.zeros([ROWS, COLUMNS // 4], tl.int32) + o_block[None, :]
    zero = tl.zeros([1, 1], tl.int32)
    word0, word1, word2, word3 = tl.philox(
        tl.load(p_seed), counter, o_i[:, None], zero + i_bh, zero
    )
    # [ROWS, blocks, 2, 2]: the last index counts odd words, the one before it pairs.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = tl.reshape(words, [ROWS, COLUMNS])
    return words >= threshold.to(tl.uint32, bitcast=True)
