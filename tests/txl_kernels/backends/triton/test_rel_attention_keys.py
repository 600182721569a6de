"""Which keys, queries and rows of r the Triton kernels read, against the definition by pairs."""

from __future__ import annotations

import math

import pytest
import torch

from txl_kernels._rel_attention_call import (
    Numbers,
    OptionalTensors,
    RelAttentionCall,
    Rules,
)
from txl_kernels.backends import triton as door

triton = pytest.importorskip("triton")
tl = triton.language
keys = pytest.importorskip("txl_kernels.backends.triton.rel_attention_keys")
call_module = pytest.importorskip("txl_kernels.backends.triton.rel_attention_call")

pytestmark = pytest.mark.interpreted
ROWS = COLUMNS = 16
FAR = 2**63 - 1


@pytest.fixture(autouse=True)
def _needs_the_interpreter():
    reason = door.unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(reason)


@triton.jit
def _keys_kernel(
    p_limits, p_numbers, p_seen, begin_i, begin_j,
    p_q_start, p_key_start, p_key_lens, p_query_ranges, p_tile_ranges,
    Tq, Tk, R, left, right, offset, chunk_size, chunk_left, chunk_phase,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All functions for one tile; p_limits holds lo and hi of each query."""
    o_i = begin_i + tl.arange(0, ROWS)
    first, last = keys.key_limits(p_key_start, p_key_lens, 0, Tk)
    lo_shift, hi_shift, first_p, offset = keys.query_geometry(
        p_q_start, 0, left, right, offset, Tq, Tk, R
    )
    b_first, b_last = keys.query_limits(p_query_ranges, 0, begin_i, first, last, Tq, ROWS)
    lo, hi = keys.visible_keys(
        o_i, b_first, b_last, lo_shift, hi_shift, first_p, chunk_size, chunk_left, chunk_phase
    )
    tl.store(p_limits + tl.arange(0, ROWS), lo)
    tl.store(p_limits + ROWS + tl.arange(0, ROWS), hi)
    begin, end, all_begin, all_end = keys.tile_keys(
        p_tile_ranges, 0, begin_i, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase, ROWS,
    )  # fmt: skip
    tl.store(p_numbers, begin)
    tl.store(p_numbers + 1, end)
    tl.store(p_numbers + 2, all_begin)
    tl.store(p_numbers + 3, all_end)
    seen = keys.visible_tile(
        p_query_ranges, 0, begin_i, begin_j, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase, ROWS, COLUMNS,
    )  # fmt: skip
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(p_seen + o, seen.to(tl.int8))
    begin, end = keys.seeing_queries(
        begin_j, begin_j + COLUMNS, first, last, lo_shift, hi_shift, first_p, Tq,
        chunk_size, chunk_left, chunk_phase,
    )  # fmt: skip
    if p_tile_ranges is not None:
        lo, hi = keys.queries_in_range(p_tile_ranges, 0, begin_j, begin_j + COLUMNS, Tq)
        begin, end = tl.maximum(begin, lo), tl.minimum(end, hi)
    tl.store(p_numbers + 4, begin)
    tl.store(p_numbers + 5, end)
    near_begin, near_end = keys.near_keys(0, Tk, begin_i, offset, R, ROWS, COLUMNS)
    tl.store(p_numbers + 6, near_begin)
    tl.store(p_numbers + 7, near_end)
    near_begin, near_end = keys.near_queries(0, Tq, begin_j, offset, R, ROWS, COLUMNS)
    tl.store(p_numbers + 8, near_begin)
    tl.store(p_numbers + 9, near_end)


def pairs(call, Tq, Tk):
    """Which pairs attend and which have a row of r, bool [Tq, Tk] each, from Python's integers."""
    optional, rules = call.optional, call.rules
    start = Tk - Tq
    if optional.q_start is not None:
        start = min(max(int(optional.q_start), -(2**31)), 2**31)

    def limit(tensor, i, default):
        return default if tensor is None else int(tensor.reshape(-1)[i if tensor.dim() == 2 else 0])

    attends = torch.zeros(Tq, Tk, dtype=torch.bool)
    has_row = torch.zeros(Tq, Tk, dtype=torch.bool)
    for i in range(Tq):
        p = i + start
        for j in range(Tk):
            seen = p - rules.window_left <= j <= p + rules.window_right
            seen &= limit(optional.key_start, i, 0) <= j < limit(optional.key_lens, i, Tk)
            if rules.chunk_size:
                size, phase = rules.chunk_size, rules.chunk_phase
                seen &= 0 <= (p + phase) // size - (j + phase) // size <= rules.chunk_left
            attends[i, j] = seen
            has_row[i, j] = 0 <= j - p + Tk - Tq + rules.offset < call.r.shape[2]
    return attends, has_row


RULES = {
    "open": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 4, "window_right": 7},
    "wide_window": {"window_left": 2**31 - 3, "window_right": 2**31},
    "chunk": {"chunk_size": 5, "chunk_left": 1, "chunk_phase": 3},
    "one_chunk": {"chunk_size": 2**62, "chunk_left": 2**40, "chunk_phase": -7},
    "causal_chunk": {"window_right": 0, "chunk_size": 2**31 - 3, "chunk_phase": 2**31 - 4},
}
RANGES = {
    "all": {},
    "per_row": {"key_start": torch.tensor([2]), "key_lens": torch.tensor([FAR])},
    "per_query": {
        "key_start": torch.tensor([[3, -FAR, 9, 0, 30, FAR, 2] * 6]),
        "key_lens": torch.tensor([[8, 15, FAR, 7, 35, 2, -FAR] * 6]),
    },
    "mixed": {
        "key_start": torch.tensor([3]),
        "key_lens": torch.arange(1, 43, dtype=torch.int32)[None],
    },
}


STARTS = (None, 3, -9, 40, 2**31 - 1, FAR, -FAR)


# Each rule with two kinds of ranges, each time with another start.
COMBINATIONS = [
    (rules, list(RANGES)[(n + second) % len(RANGES)], STARTS[(n + second) % len(STARTS)])
    for n, rules in enumerate(RULES)
    for second in (0, 2)
]


@pytest.mark.parametrize(("rules", "ranges", "start"), COMBINATIONS, ids=str)
def test_limits_hold_for_exactly_the_pairs_of_the_definition(rules, ranges, start):
    Tq, Tk = 20, 31
    tensors = {name: x[:, :Tq] if x.dim() == 2 else x for name, x in RANGES[ranges].items()}
    if start is not None:
        tensors["q_start"] = torch.tensor([start])
    x = torch.zeros(1, 1, 1, 8)
    call = RelAttentionCall(
        x.expand(1, 1, Tq, 8),
        *[x.expand(1, 1, Tk, 8)] * 2,
        x.expand(1, 1, 12, 8),
        OptionalTensors(**tensors),
        Rules(**{"offset": Tq - 9, **RULES[rules]}),
        Numbers(1.0, 1.0),
    )
    check_tiles(call, *pairs(call, Tq, Tk))


@pytest.mark.parametrize(
    "factors",
    [
        *((0.3, 0.3), (-0.3, -0.3), (1 / 128, 1.0), (0.09, -1.0), (2.0, 1e-3), (1e-37, 1e37)),
        *((0.0, -0.5), (0.5, 0.0), (0.0, 0.0), (1e-46, 2.0), (2.0, 1e-46), (1e300, 1.0)),
    ],
    ids=str,
)
def test_factors_are_products_and_neither_exceeds_1(factors):
    factor, *parts = call_module.score_factors(*factors)
    assert 0.0 < factor <= 2.0**127
    for part, given in zip(parts, factors, strict=True):
        assert abs(part) <= 1.0
        if given != 1e300:  # infinite in float32
            assert part * factor == pytest.approx(0.0 if abs(given) < 1e-40 else given, rel=1e-15)
    assert parts[0] == 0.0 or math.frexp(parts[0])[0] in (0.5, -0.5)


def check_tiles(call, attends, has_row):
    """Every tile of a call against its pairs."""
    arguments = call_module.kernel_arguments(call)
    given = {name: arguments[name] for name in _keys_kernel.arg_names if name in arguments}
    Tq, Tk = attends.shape
    assert arguments["FAR"] or (has_row | ~attends).all()
    for begin_i in range(0, Tq, ROWS):
        for begin_j in range(0, Tk, COLUMNS):
            limits = torch.empty(2, ROWS, dtype=torch.int32)
            numbers = torch.empty(10, dtype=torch.int32)
            seen = torch.empty(ROWS, COLUMNS, dtype=torch.int8)
            _keys_kernel[(1,)](
                limits, numbers, seen, begin_i, begin_j, **given, ROWS=ROWS, COLUMNS=COLUMNS
            )
            of_tile = slice(begin_i, begin_i + ROWS), slice(begin_j, begin_j + COLUMNS)
            rows, block = attends[begin_i : begin_i + ROWS], attends[of_tile]
            inside = torch.arange(Tk)
            lo, hi = limits[:, : len(rows), None]
            assert torch.equal((inside >= lo) & (inside < hi), rows)
            assert torch.equal(seen.bool()[: block.shape[0], : block.shape[1]], block)
            begin, end, all_begin, all_end, *others = numbers.tolist()
            assert not rows[:, (inside < begin) | (inside >= end)].any()
            assert rows[:, max(all_begin, 0) : max(all_end, 0)].all()
            q_begin, q_end, near_begin, near_end, near_q_begin, near_q_end = others
            columns, i = attends[:, of_tile[1]], torch.arange(Tq)
            assert not columns[(i < q_begin) | (i >= q_end)].any()
            assert q_begin >= 0
            assert q_end <= Tq
            near = has_row[begin_i : begin_i + ROWS]
            assert not near[:, (inside < near_begin) | (inside >= near_end)].any()
            assert (near_end - near_begin) % COLUMNS == 0 or near_end == Tk
            near = has_row[:, of_tile[1]]
            assert not near[(i < near_q_begin) | (i >= near_q_end)].any()
