"""The skew between scores by row of r and scores by key, inside a tile, and its way back.

One gather on a flattened tile: a store to shared memory and a load from it, and no shuffles between
lanes. `docs/mathematics.md` derives it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def core_blocks(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as [COLUMNS / 8, ROWS, 8]."""
    return tl.permute(tl.reshape(tile, [ROWS, COLUMNS // 8, 8]), (1, 0, 2))


@triton.jit
def core_order(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as one row: eight columns of all rows, then the next eight.

    Tensor cores hold tiles in 8 × 8 blocks: in this order shared memory is written without bank
    conflicts and read along a diagonal with at most two lanes on a bank.
    """
    return tl.reshape(core_blocks(tile, ROWS, COLUMNS), [ROWS * COLUMNS])


@triton.jit
def from_core_order(row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `core_order`."""
    blocks = tl.permute(tl.reshape(row, [COLUMNS // 8, ROWS, 8]), (1, 0, 2))
    return tl.reshape(blocks, [ROWS, COLUMNS])


@triton.jit
def skew(chunk, earlier, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scores by key from scores by row of r: out[a, b] = x[a, b - a], x = [earlier | chunk].

    `chunk` holds x's columns [0, COLUMNS), `earlier` those of [-COLUMNS, 0). Needs ROWS ≤ COLUMNS.
    As in `shift_columns`, one gather from both tiles. No tile is chosen by comparing columns with
    COLUMNS - a: Triton takes that difference for a multiple of COLUMNS in every row (the range a
    starts at 0), compares once for all of a thread's columns, and answers wrongly.
    """
    a = tl.arange(0, ROWS)[:, None]
    b = tl.arange(0, COLUMNS)[None, :]
    # Column b - a of x within its eight columns; bit 3 is set where that is in the later eight.
    within = (b & 7) - (a & 7) + 8
    source = (within & 8) * ROWS + (within & 7) + (a & 7) * 8 + (COLUMNS - 8) * ROWS
    source += (b & -8) * ROWS + ((a & 8) * (8 - ROWS) + (a & -16) * (8 - ROWS))
    both = tl.join(core_blocks(earlier, ROWS, COLUMNS), core_blocks(chunk, ROWS, COLUMNS))
    both = tl.reshape(tl.permute(both, (3, 0, 1, 2)), [2 * ROWS * COLUMNS])
    shifted = tl.gather(both, core_order(source, ROWS, COLUMNS), 0)
    return from_core_order(shifted, ROWS, COLUMNS)


@triton.jit
def shift_columns(
    upper, lower, like, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[b, a] = x[b + a, a], x = `upper` over `lower`; with a STEP of -1, x[b - a + ROWS, a].

    One gather from both tiles in `core_order`, eight columns of all 2 · ROWS rows after another:
    where it reads is then linear in a and b, and a thread needs one address or two, where a
    rotation of one tile needs one for each number. `like`, a float tile or None, says in which
    layout the result is wanted, where the compiler would not find out by itself.
    """
    b = tl.arange(0, ROWS)[:, None]
    a = tl.arange(0, COLUMNS)[None, :]
    # A thread's rows differ in some of these bits and not in others: taken apart, the former are
    # constants, which end up within the instructions.
    source = ((b & 7) + (b & 8)) * 8 + ((b & 48) * 8 + (b & -64) * 8)
    source += (a & 7) * (1 + 8 * STEP) + (a & -8) * (2 * ROWS + 8 * STEP)
    if STEP < 0:
        source += ROWS * 8
    if like is not None:
        source += (tl.abs(like) < 0.0).to(tl.int32)  # never, which only the last compiler pass sees
    both = tl.join(core_blocks(upper, ROWS, COLUMNS), core_blocks(lower, ROWS, COLUMNS))
    both = tl.reshape(tl.permute(both, (0, 3, 1, 2)), [2 * ROWS * COLUMNS])
    shifted = tl.gather(both, core_order(source, ROWS, COLUMNS), 0)
    return from_core_order(shifted, ROWS, COLUMNS)


@triton.jit
def skew_transposed(chunk, earlier, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`skew` for tiles [rows of r, queries] and [keys, queries]: out[b, a] = x[b - a, a].

    x is `earlier` over `chunk`. Needs COLUMNS ≤ ROWS.
    """
    return shift_columns(earlier, chunk, None, -1, ROWS, COLUMNS)


@triton.jit
def unskew_transposed(tile, before, like, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse, for gradients: by row of r, all that the chunk before a block's own gets.

    That is from this block (`tile`, [keys, queries]) where key b of query a lies b - a < 0 in its
    own chunk, and from the block before. `like` is as in `shift_columns`.
    """
    return shift_columns(before, tile, like, 1, ROWS, COLUMNS)


@triton.jit
def pack_pairs(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS / 2] that holds a tile of 16-bit floats; any other tile as it is.

    For what a loop carries: the compiler would give each number of 16 bits a register of its own.
    """
    packed = tile
    if tile.dtype.primitive_bitwidth == 16:
        bits = tl.reshape(tile.to(tl.int16, bitcast=True), [ROWS, COLUMNS // 2, 2])
        low, high = tl.split(bits)
        packed = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return packed


@triton.jit
def unpack_pairs(packed, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `pack_pairs`."""
    tile = packed
    if dtype.primitive_bitwidth == 16:
        bits = tl.join(packed.to(tl.int16), (packed >> 16).to(tl.int16))
        tile = tl.reshape(bits, [ROWS, COLUMNS]).to(dtype, bitcast=True)
    return tile
