"""Functions of a tile [queries, keys] that forward and backward of `rel_attention` share.

They load rows of keys and of r, and apply softcap and dropout. Which keys a query attends to is in
`rel_attention_keys.py`, the skew in `rel_attention_skew.py`. `docs/mathematics.md` derives both.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_rows, o_row, stride, n_rows, o_d, D: tl.constexpr):
    """[rows, D]: rows o_row of a matrix; 0 outside [0, n_rows) and from column D on."""
    p_tile = p_rows + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    inside = ((o_row >= 0) & (o_row < n_rows))[:, None]
    if o_d.shape[0] > D:
        inside = inside & (o_d < D)[None, :]
    return tl.load(p_tile, mask=inside, other=0.0)


@triton.jit
def load_padded(p_rows, begin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: rows from `begin` on of a contiguous matrix, all of which exist."""
    o_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(p_rows + begin.to(tl.int64) * COLUMNS + o_tile)


@triton.jit
def load_block(p_rows, stride, begin, low, high, o_d, D: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, D]: rows from `begin` on of a matrix; 0 outside [low, high) and from column D on.

    p_rows points to row `low`. For use in loops: most of the 64-bit arithmetic, multiples of 16
    rows included, is the same for all threads.
    """
    o = tl.arange(0, ROWS)
    o_tile = (o & -16).to(tl.int64) * stride + (o & 15) * stride
    p_tile = p_rows + tl.full((), begin - low, tl.int64) * stride + o_tile[:, None] + o_d[None, :]
    # One comparison for both ends: a negative number is large as an unsigned one.
    inside = (o + (begin - low)).to(tl.uint32, bitcast=True) < (high - low).to(
        tl.uint32, bitcast=True
    )
    if o_d.shape[0] > D:
        return tl.load(p_tile, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
    return tl.load(p_tile, mask=inside[:, None], other=0.0)


@triton.jit
def load_position_block(
    p_r, stride, begin, R, o_d, D: tl.constexpr, CLAMP: tl.constexpr, ROWS: tl.constexpr
):
    """[ROWS, D]: rows of r from `begin` on; outside [0, R) 0, or with CLAMP the nearest row."""
    if not CLAMP:
        return load_block(p_r, stride, begin, 0, R, o_d, D, ROWS)
    nearest = tl.minimum(tl.maximum(begin, 0), R - 1)
    o = tl.minimum(tl.maximum(begin + tl.arange(0, ROWS), 0), R - 1) - nearest
    p_tile = p_r + nearest.to(tl.int64) * stride + (o * stride)[:, None] + o_d[None, :]
    return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def biased_queries(b_q, p_bias, i_h, o_d, D: tl.constexpr, factor):
    """factor · (queries [rows, D] + row i_h of a head bias [H, D], or None), in float32.

    Rounded once, to the queries' dtype, for the product that follows.
    """
    b_sum = b_q.to(tl.float32)
    if p_bias is not None:
        b_sum += tl.load(p_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return (b_sum * factor).to(b_q.dtype)


@triton.jit
def key_block(p_segment, s_segment, p_memory, s_memory, begin_j, p_key_start, first, last, Tm):
    """Where a block of keys is in memory; all its keys are of the memory or all of the segment.

    Returns the first arguments of `load_block`: a pointer to the row of key `low`, the rows'
    stride, and [low, high), the keys of that tensor in [first, last). Other keys are never read,
    because they may hold NaN. `first` is above 0 only if there is a p_key_start.
    """
    p_rows, stride, low, high = p_segment, s_segment, Tm, tl.maximum(last, Tm)
    if p_memory is not None:
        in_memory = begin_j < Tm
        p_rows = tl.where(in_memory, p_memory, p_segment)
        stride = tl.where(in_memory, s_memory, s_segment)
        low, high = tl.where(in_memory, 0, Tm), tl.where(in_memory, tl.minimum(last, Tm), high)
    if p_key_start is not None:
        n_absent = tl.maximum(first - low, 0)
        p_rows += n_absent.to(tl.int64) * stride
        low += n_absent
        high = tl.maximum(low, high)
    return p_rows, stride, low, high


@triton.jit
def tanh(x):
    """tanh to about one unit in the last place.

    Near 0, where 1 - 2/(e^2x + 1) loses digits, it is a polynomial.

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
def _words_of_shared_counters(seed, i_bh, o_i, begin_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Philox words of queries o_i and of keys from begin_j on, which is a multiple of 4.

    Each counter gives the words of four keys.
    """
    zero = tl.zeros([1, 1], tl.int32)
    o_counter = begin_j // 4 + tl.arange(0, COLUMNS // 4)[None, :] + tl.zeros_like(o_i)[:, None]
    word0, word1, word2, word3 = tl.philox(seed, o_counter, o_i[:, None], zero + i_bh, zero)
    # [ROWS, counters, 2, 2]: the last index is a word's low bit, the one before it the high.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    return tl.reshape(words, [ROWS, COLUMNS])


@triton.jit
def _words_of_each_key(seed, i_bh, o_i, begin_j, COLUMNS: tl.constexpr):
    """The same from any begin_j: each key computes its counter's four words and uses one."""
    zero = tl.zeros([1, 1], tl.int32)
    o_j = begin_j + tl.arange(0, COLUMNS)[None, :] + tl.zeros_like(o_i)[:, None]
    word0, word1, word2, word3 = tl.philox(seed, o_j // 4, o_i[:, None], zero + i_bh, zero)
    odd = o_j % 2 == 1
    return tl.where(o_j % 4 < 2, tl.where(odd, word1, word0), tl.where(odd, word3, word2))


@triton.jit
def dropout_keep(p_seed, threshold, i_bh, o_i, begin_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: which probabilities of queries o_i and keys from begin_j on are kept.

    Word j mod 4 of Philox4x32-10 with counter (j / 4, i, b · H + h, 0) is at least the threshold,
    ⌊p · 2³²⌋ in the bits of an int32.
    """
    seed = tl.load(p_seed)
    if begin_j % 4 == 0:
        words = _words_of_shared_counters(seed, i_bh, o_i, begin_j, ROWS, COLUMNS)
    else:
        words = _words_of_each_key(seed, i_bh, o_i, begin_j, COLUMNS)
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def capped(b_scores, scale, softcap):
    """tanh(scale · product / softcap). A ratio that overflows would make NaN of a product of 0."""
    ratio = tl.minimum(tl.maximum(scale / softcap, -3.4e38), 3.4e38)
    return tanh(b_scores * ratio)


@triton.jit
def exponents(b_scores, scale, softcap, b_lse):
    """The binary logarithms of the probabilities and, with a softcap, the tanh of the scores.

    Tiles are [keys, queries]. `b_scores` are products; `b_lse` is in natural units, infinite for a
    query without keys. Kernels that call this are launched without fusion of products and sums: a
    score is rounded, as lse was, before lse is subtracted, so that where one key dominates its
    probability is exactly 1. No exponent is positive, even if forward rounded a score differently.
    """
    b_tanh = b_scores
    factor = scale
    if softcap is not None:
        b_tanh = capped(b_scores, scale, softcap)
        factor = softcap
    b_exponents = (b_tanh * factor - b_lse[None, :]) * LOG2_E
    return tl.minimum(b_exponents, 0.0, propagate_nan=tl.PropagateNan.ALL), b_tanh


@triton.jit
def probs_and_dscores(b_exponents, b_tanh, b_dprobs, b_delta, keep, softcap, dropout_scale):
    """The probabilities after dropout and the gradient of scale · score, of a tile [keys, queries].

    Exponents and tanh are results of `exponents`, with exponent -∞ where a key is masked. `keep`
    is a bool tile or None.
    """
    b_probs = tl.exp2(b_exponents)
    b_kept = b_probs
    if keep is not None:
        b_factor = tl.where(keep, dropout_scale, 0.0)
        b_kept = b_probs * b_factor
        b_dprobs = b_dprobs * b_factor
    b_dscores = b_probs * (b_dprobs - b_delta[None, :])
    if softcap is not None:
        b_dscores *= 1.0 - b_tanh * b_tanh
    return b_kept, b_dscores
