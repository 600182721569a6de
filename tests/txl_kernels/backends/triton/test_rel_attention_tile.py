"""The helpers of a tile, each alone in Triton's interpreter, against its definition in torch."""

from __future__ import annotations

import pytest
import torch

from txl_kernels.backends import triton as door
from txl_kernels.testing import dropout_keep

triton = pytest.importorskip("triton")
tl = triton.language
skew = pytest.importorskip("txl_kernels.backends.triton.rel_attention_skew")
tile = pytest.importorskip("txl_kernels.backends.triton.rel_attention_tile")

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _needs_the_interpreter():
    reason = door.unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(reason)


@triton.jit
def _skew_kernel(p_chunk, p_earlier, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_out = skew.skew(tl.load(p_chunk + o), tl.load(p_earlier + o), ROWS, COLUMNS)
    tl.store(p_out + o, b_out)


@triton.jit
def _skew_transposed_kernel(p_chunk, p_earlier, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    chunk, earlier = tl.load(p_chunk + o), tl.load(p_earlier + o)
    tl.store(p_out + o, skew.skew_transposed(chunk, earlier, ROWS, COLUMNS))


@triton.jit
def _unskew_kernel(p_tile, p_before, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_tile = tl.load(p_tile + o)
    b_out = skew.unskew_transposed(b_tile, tl.load(p_before + o), b_tile, ROWS, COLUMNS)
    tl.store(p_out + o, b_out)


@triton.jit
def _pack_kernel(p_x, p_packed, p_out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_row = tl.arange(0, ROWS)[:, None]
    o = o_row * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    packed = skew.pack_pairs(tl.load(p_x + o), ROWS, COLUMNS)
    tl.store(p_packed + o_row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :], packed)
    tl.store(p_out + o, skew.unpack_pairs(packed, p_x.dtype.element_ty, ROWS, COLUMNS))


@triton.jit
def _keep_kernel(
    p_seed, p_out, threshold, i_bh, begin_i, begin_j, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    o = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    o_i = begin_i + tl.arange(0, ROWS)
    keep = tile.dropout_keep(p_seed, threshold, i_bh, o_i, begin_j, ROWS, COLUMNS)
    tl.store(p_out + o, keep.to(tl.int8))


@triton.jit
def _tanh_kernel(p_x, p_out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(p_out + o, tile.tanh(tl.load(p_x + o)))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 64), (64, 64), (8, 128)])
def test_skew_reads_both_chunks_along_the_diagonals(rows, columns):
    chunk, earlier = torch.randn(2, rows, columns)
    out = torch.empty(rows, columns)
    _skew_kernel[(1,)](chunk, earlier, out, rows, columns)
    x = torch.cat([earlier, chunk], dim=1)
    m = torch.arange(columns) - torch.arange(rows)[:, None] + columns
    assert torch.equal(out, x.gather(1, m))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 16), (64, 64), (128, 8)])
def test_transposed_skew_reads_both_chunks_along_the_diagonals(rows, columns):
    chunk, earlier = torch.randn(2, rows, columns)
    out = torch.empty(rows, columns)
    _skew_transposed_kernel[(1,)](chunk, earlier, out, rows, columns)
    x = torch.cat([earlier, chunk])
    m = torch.arange(rows)[:, None] - torch.arange(columns) + rows
    assert torch.equal(out, x.gather(0, m))


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 16), (64, 64), (128, 8)])
def test_unskew_gathers_all_that_two_blocks_give_to_one_chunk(rows, columns):
    before, after = torch.randn(2, rows, columns)
    out = torch.empty(rows, columns)
    _unskew_kernel[(1,)](after, before, out, rows, columns)
    # Key b of query a is on row b - a of r; the chunk asked for is the one of the block before.
    by_key = torch.cat([before, after])
    b = torch.arange(rows)[:, None] + torch.arange(columns)
    assert torch.equal(out, by_key.gather(0, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_of_16_bits_come_back_as_they_were_packed(dtype):
    x = torch.randn(32, 16).to(dtype)
    packed, out = torch.empty(32, 8, dtype=torch.int32), torch.empty_like(x)
    _pack_kernel[(1,)](x, packed, out, 32, 16)
    assert torch.equal(out, x)
    assert torch.equal(packed, x.view(torch.int32))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_the_contract_keeps_from_any_key_on(seed, p):
    word = torch.tensor(seed)
    due = dropout_keep(word, p, (2, 3, 40, 90))
    threshold = int(p * 2**32)
    threshold -= 2**32 if threshold >= 2**31 else 0
    out = torch.empty(16, 32, dtype=torch.int8)
    for begin_j in (0, 16, 3, 50, 57):
        _keep_kernel[(1,)](word, out, threshold, 4, 24, begin_j, 16, 32)
        assert torch.equal(out.bool(), due[1, 1, 24:40, begin_j : begin_j + 32])


def test_tanh_is_good_to_two_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 2000), torch.logspace(-30, 0, 46), torch.zeros(2)])
    out = torch.empty(2048)
    _tanh_kernel[(1,)](x, out, 2048)
    due = x.double().tanh()
    assert ((out - due).abs() <= 2 * torch.finfo(torch.float32).eps * due.abs()).all()
