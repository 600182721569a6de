// rel_attention backward on the CPU, for one instruction set.
//
// A chunk is computed unit by unit, a unit run by run, and a run block by block of keys: all query
// tiles of the run, of all query heads that share the keys, recompute the block's probabilities
// from the saved log-sum-exp, while its packed keys and values and their gradients are in the
// cache. These gradients and the position table's are accumulated transposed, [D, keys], in
// float32. The tiles of probabilities and of score gradients are then right-hand matrices without a
// transposition, and the score gradients, read with the skewed row stride, are those by distance.
// Nothing is atomic: sums to which two chunks contribute go to slots, which `finish` adds in order.
#include <utility>

#include "kernels.h"
#include "rel_attention_bwd_outputs.h"
#include "rel_attention_bwd_rows.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {
namespace {

// Transposes src [rows, n] to dst [n, K], a left-hand matrix whose inner dimension is the tile's
// rows; zeros after the last row.
template <typename operand_t>
void transpose_tile(const operand_t* src, int64_t ld_src, int64_t rows, int64_t n, operand_t* dst,
                    int64_t K) {
  for (int64_t a = 0; a < rows; a += 16) {
    for (int64_t d = 0; d < n; d += 16) {
      transpose_block(src + a * ld_src + d, ld_src, dst + d * K + a, K,
                      std::min<int64_t>(16, rows - a), std::min<int64_t>(16, n - d));
    }
  }
  for (int64_t d = 0; rows < K && d < n; ++d)
    std::fill(dst + d * K + rows, dst + (d + 1) * K, operand_t(0));
}

// dout's tile as operands, and delta_i = Σ_d dout_id · out_id - dlse_i. The gradient of the lse of
// a row without keys is ignored.
template <typename T>
void load_dout(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
               const BwdTile<T>& tile) {
  const int64_t ld = row_length<T>(args.Dv);
  const auto* lse = static_cast<const Acc<T>*>(args.lse) + (b * args.H + h) * args.Tq;
  Acc<T> dout[kMaxHeadSize], out[kMaxHeadSize];
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const int64_t i = tile.rows.begin + a;
    convert_row(grads.dout.head<const T>(b, h) + i * grads.dout.stride_t, dout, args.Dv);
    convert_row(args.out.head<const T>(b, h) + i * args.out.stride_t, out, args.Dv);
    convert_row(dout, tile.dout + a * ld, args.Dv);
    std::fill(tile.dout + a * ld + args.Dv, tile.dout + (a + 1) * ld, Operand<T>(0));
    Acc<T> delta = 0;
    for (int64_t d = 0; d < args.Dv; ++d) delta += dout[d] * out[d];
    const bool dead = lse[i] == -std::numeric_limits<Acc<T>>::infinity();
    if (grads.dlse.data != nullptr && !dead)
      delta -= grads.dlse.head<const Acc<T>>(b, h)[i * grads.dlse.stride_t];
    tile.delta[a] = delta;
  }
  std::fill(tile.dout + tile.rows.count() * ld, tile.dout + tile.rows.height * ld, Operand<T>(0));
}

// dqu += dscores · k, from the packed keys or, if `keys` is not null, from the caller's memory.
template <typename T>
void key_product(const RelAttentionArgs& args, const BwdTile<T>& tile, Block block, int64_t key,
                 const KeyRows<T>* keys, const Operand<T>* dscores, const BwdWorkspace<T>& ws) {
  if constexpr (kReadable<T>) {
    if (keys != nullptr) {
      product_in_place<T>(tile.rows.height, args.D, *keys, block.begin, block.padded, dscores,
                          kScoreLd, ws.stage, tile.dqu, ws.ld_acc);
      return;
    }
  }
  for_each_inner_piece(0, block.padded, [&](int64_t x, int64_t size) {
    gemm(tile.rows.height, args.D, size, dscores + x, kScoreLd,
         operands<T>(ws.k + (key + x) / kRowsPerWord<T> * ws.ld_row), ws.ld_row, tile.dqu,
         ws.ld_acc, /*accumulate=*/true);
  });
}

// The products of a block that read its probabilities and score gradients. Element (a, x) of a
// shifted tile is the score gradient of query a and table column x.
template <typename T>
struct BlockGradients {
  const Operand<T>*probs, *dscores, *dscores_rows, *shifted;
  int64_t ld_probs, ld_shifted;

  BlockGradients(const BwdWorkspace<T>& ws, int64_t height) {
    const int64_t shift = height - 1;
    if constexpr (kPacked<T>) {
      probs = operands<T>(ws.probs_pairs), dscores = operands<T>(ws.dscores_pairs);
      dscores_rows = ws.dscores, shifted = operands<T>(ws.shifted_pairs - shift);
      ld_probs = kKeyBlock, ld_shifted = kPairLd + 2;
    } else {
      probs = ws.dprobs, dscores = dscores_rows = ws.scores, shifted = ws.scores - shift;
      ld_probs = kScoreLd, ld_shifted = kScoreLd + 1;
    }
  }
};

// dv, dk and dqu; `column`: the block's first column in the panels of dk and dv; `key`: its first
// packed column; `keys`: as in key_product.
template <typename T>
void accumulate_keys(const RelAttentionArgs& args, int64_t b, const BwdTile<T>& tile, Block block,
                     int64_t column, int64_t key, const KeyRows<T>* keys,
                     const BwdWorkspace<T>& ws) {
  constexpr int64_t kPerWord = kRowsPerWord<T>;
  const int64_t height = tile.rows.height, K = row_length<T>(height);
  const BlockGradients<T> from(ws, height);
  for_each_column_piece(
      column, block.padded, height,
      [&](int64_t x, int64_t n) {
        return attending_rows(args, b, tile.rows, block.begin + x - column, n);
      },
      [&](int64_t x, int64_t size, RowSpan span) {
        if (span.n() == 0) return;
        const int64_t inner = row_length<T>(span.n());
        const int64_t at = (span.begin / kPerWord * from.ld_probs + x - column) * kPerWord;
        gemm(args.Dv, size, inner, tile.dout_t + span.begin, K, from.probs + at, from.ld_probs,
             ws.dv_t.at(x), ws.dv_t.ld, /*accumulate=*/true);
        gemm(args.D, size, inner, tile.qu_t + span.begin, K, from.dscores + at, from.ld_probs,
             ws.dk_t.at(x), ws.dk_t.ld, /*accumulate=*/true);
      });
  key_product<T>(args, tile, block, key, keys, from.dscores_rows, ws);
}

// dr and dqv; pieces of columns without a row of `r` are skipped. `head`: counted from the unit's
// first.
template <typename T>
void accumulate_positions(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t head,
                          const BwdTile<T>& tile, Block block, Columns columns,
                          const BwdWorkspace<T>& ws) {
  constexpr int64_t kPerWord = kRowsPerWord<T>;
  const int64_t height = tile.rows.height, K = row_length<T>(height), D = args.Dp;
  const BlockGradients<T> from(ws, height);
  const Panels<Acc<T>> dr_t = table_of(args, ws.dr_t, ws.dr_t_size, head);
  const Word<T>* r = ws.r + (args.r_per_head ? head * ws.r_size : 0);
  for_each_column_piece(
      columns.first, columns.n, height,
      [&](int64_t x, int64_t n) { return shifted_rows(tile.rows, block, columns, x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        if (!has_rows(args, plan, x, size)) return;
        const int64_t at = span.begin / kPerWord * from.ld_shifted + x - columns.origin;
        gemm(D, size, row_length<T>(span.n()), tile.qv_t + span.begin, K,
             from.shifted + at * kPerWord, from.ld_shifted, dr_t.at(x), dr_t.ld,
             /*accumulate=*/true);
      });
  const Operand<T>* shifted = from.dscores_rows - (height - 1);
  for_each_inner_piece(columns.first, columns.n, [&](int64_t x, int64_t size) {
    if (!has_rows(args, plan, x, size)) return;
    gemm(height, D, size, shifted + x - columns.origin, kScoreLd + 1,
         operands<T>(r + x / kPerWord * ws.ld_r), ws.ld_r, tile.dqv, ws.ld_acc_pos,
         /*accumulate=*/true);
  });
}

template <typename T>
void load_tile(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
               const BwdTile<T>& tile, const BwdWorkspace<T>& ws) {
  const int64_t n_rows = tile.rows.count(), K = row_length<T>(tile.rows.height);
  load_queries<T>(args, b, h, tile.rows, tile.qu, tile.qv);
  load_dout<T>(args, grads, b, h, tile);
  transpose_tile(tile.qu, row_length<T>(args.D), n_rows, args.D, tile.qu_t, K);
  transpose_tile(tile.qv, row_length<T>(args.Dp), n_rows, args.Dp, tile.qv_t, K);
  transpose_tile(tile.dout, row_length<T>(args.Dv), n_rows, args.Dv, tile.dout_t, K);
  std::fill(tile.dqu, tile.dqu + tile.rows.height * ws.ld_acc, Acc<T>(0));
  std::fill(tile.dqv, tile.dqv + tile.rows.height * ws.ld_acc_pos, Acc<T>(0));
}

// One tile against the part of a block to which it attends. `head`: counted from the unit's first;
// `column`, `key`, `keys`: as in accumulate_keys.
template <typename T>
void bwd_tile(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b, int64_t hk,
              int64_t head, const BwdTile<T>& tile, Block part, int64_t column, int64_t key,
              const KeyRows<T>* keys, const BwdWorkspace<T>& ws) {
  const int64_t ld_o = row_length<T>(args.Dv), h = hk * plan.heads + head;
  const Columns columns = block_columns(args, plan, b, tile.rows, part);
  score_block<T>(args, plan, b, tile.rows, part, columns, tile.qu, tile.qv, ws.k_t + key, ws.ld_k,
                 table_of(args, ws.r_t, ws.r_t_size, head), ws.scores);
  // A piece leaves out rows whose probabilities are 0; their gradients must be finite.
  auto clear = [&](int64_t first, int64_t last, int64_t x, int64_t size) {
    for (int64_t a = first; a < last; ++a)
      std::fill(ws.dprobs + a * kScoreLd + x, ws.dprobs + a * kScoreLd + x + size, Acc<T>(0));
  };
  for_each_column_piece(
      0, part.padded, tile.rows.height,
      [&](int64_t x, int64_t n) { return attending_rows(args, b, tile.rows, part.begin + x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        if (span.n() > 0) {
          gemm(span.n(), size, ld_o, tile.dout + span.begin * ld_o, ld_o,
               operands<T>(ws.v_t + key + x), ws.ld_k, ws.dprobs + span.begin * kScoreLd + x,
               kScoreLd, /*accumulate=*/false);
        }
        clear(0, span.begin, x, size);
        clear(span.end, tile.rows.height, x, size);
      });
  finish_scores<T>(args, b, h, tile.rows, part, ws.scores);
  const bool by_column = has_rows(args, plan, columns.first, columns.n);
  gradient_rows<T>(args, b, h, tile, part, by_column, ws);
  accumulate_keys<T>(args, b, tile, part, column, key, keys, ws);
  if (by_column) accumulate_positions<T>(args, plan, head, tile, part, columns, ws);
}

// Items [first, stop) of one unit, counted from the unit's first.
template <typename T>
void bwd_unit(const RelAttentionArgs& args, const RelAttentionPlan& plan,
              const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t unit,
              int64_t first, int64_t stop, int64_t slot, const BwdWorkspace<T>& ws) {
  const int64_t b = args.batch_of(unit), hk = args.key_head_of(unit);
  const KeyRows<T> keys(args, &KeyRun::k, b, hk), values(args, &KeyRun::v, b, hk);
  const bool in_place = kReadable<T> && keys.adjacent(args.D);
  const bool several = plan.has_several_runs();
  KeyGradients<T> sums(args, grads, partials, b, hk, slot, ws);
  if (several) sums.restart(keys_of_items(args, plan, b, first, stop).aligned_begin);
  for_each_run(args, plan, b, first, stop, [&](int64_t begin, int64_t end, TileKeys seen) {
    auto item = [&](int64_t n) { return plan.item(begin + n); };
    auto tile = [&](int64_t n) { return ws.tile(tile_rows(args, plan, item(n).tile), n); };
    const int64_t n_items = end - begin;
    for (int64_t n = 0; n < n_items; ++n)
      load_tile<T>(args, grads, b, hk * plan.heads + item(n).head, tile(n), ws);
    for_each_block(seen, [&](Block block) {
      const int64_t block_end = block.begin + block.padded;
      if (!several) sums.restart(block.begin);
      bool packed = false;
      for (int64_t n = 0; n < n_items; ++n) {
        const Block part = seen_part(args, b, tile(n).rows, block);
        if (part.n == 0) continue;
        if (!std::exchange(packed, true)) {
          pack_transposed<T>(keys, block.begin, block_end, args.D, ws.stage, ws.k_t, ws.ld_k);
          pack_transposed<T>(values, block.begin, block_end, args.Dv, ws.stage, ws.v_t, ws.ld_k);
          if (!in_place)
            pack_natural<T>(keys, block.begin, block_end, args.D, ws.stage, ws.k, ws.ld_row);
        }
        sums.open(part.begin + part.padded);
        bwd_tile<T>(args, plan, b, hk, item(n).head, tile(n), part, sums.column(part.begin),
                    part.begin - block.begin, in_place ? &keys : nullptr, ws);
      }
    });
    for (int64_t n = 0; n < n_items; ++n) {
      const int64_t head = item(n).head;
      write_dq<T>(args, grads, b, hk * plan.heads + head, tile(n), ws,
                  ws.dbias + head * (args.D + args.Dp));
    }
    if (end < stop) sums.close(args.aligned(b, plan.first_key(b, end)));
  });
  sums.close(args.Tk);
}

// Packs the tables of a unit's group and clears their gradients.
template <typename T>
void load_tables(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t unit,
                 const BwdWorkspace<T>& ws) {
  const int64_t begin = plan.packed_begin, end = plan.packed_end, row = plan.column_begin;
  for_each_table<T>(args, unit, [&](int64_t n, const TableRows<T>& table) {
    pack_table<T>(table, plan, args.Dp, ws.stage, table_of(args, ws.r_t, ws.r_t_size, n));
    pack_natural<T>(table, row + begin, row + end, args.Dp, ws.stage,
                    ws.r + n * ws.r_size + begin / kRowsPerWord<T> * ws.ld_r, ws.ld_r);
    table_of(args, ws.dr_t, ws.dr_t_size, n).for_each_row(begin, end, [](Acc<T>* x, int64_t size) {
      std::fill(x, x + size, 0);
    });
  });
}

template <typename T>
void bwd_chunk(const RelAttentionArgs& args, const RelAttentionPlan& plan,
               const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t chunk,
               char* workspace) {
  Arena arena(workspace);
  const BwdWorkspace<T> ws(args, plan, arena);
  const int64_t start = plan.chunks[static_cast<size_t>(chunk)],
                stop = plan.chunks[static_cast<size_t>(chunk + 1)];
  const int64_t n_items = plan.unit_items(), bias_size = ws.bias_size(args);
  int64_t group = -1;
  for (int64_t item = start, next; item < stop; item = next) {
    const int64_t unit = item / n_items, before = unit * n_items;
    next = std::min(stop, before + n_items);
    const bool whole = item == before && next == before + n_items;
    const int64_t slot = whole ? -1 : 2 * chunk + (unit != start / n_items);
    if (args.group_of(unit) != group) {
      if (group >= 0) write_tables<T>(args, plan, partials, group + chunk, ws);
      group = args.group_of(unit);
      load_tables<T>(args, plan, unit, ws);
    }
    std::fill(ws.dbias, ws.dbias + bias_size, Acc<T>(0));
    bwd_unit<T>(args, plan, grads, partials, unit, item - before, next - before, slot, ws);
    std::copy(ws.dbias, ws.dbias + bias_size,
              static_cast<Acc<T>*>(partials.dbias) + (unit + chunk) * bias_size);
  }
  if (group >= 0) write_tables<T>(args, plan, partials, group + chunk, ws);
  gemm_release();
}

template <typename T>
int64_t bwd_workspace(const RelAttentionArgs& args, const RelAttentionPlan& plan) {
  Arena arena(nullptr);
  BwdWorkspace<T>(args, plan, arena);
  return arena.used();
}

template <typename T>
int64_t bwd_item_bytes(const RelAttentionArgs& args) {
  const int64_t D = args.D + args.Dp;
  const auto operands = static_cast<int64_t>(sizeof(Operand<T>)) * 2 *
                        (tile_size<T>(args.D) + tile_size<T>(args.Dp) + tile_size<T>(args.Dv));
  return operands + static_cast<int64_t>(sizeof(Acc<T>)) * kQueryTile * round_up(D + 1, 16);
}

template <typename T>
constexpr BwdKernels kBwdKernels{bwd_item_bytes<T>, bwd_workspace<T>, bwd_chunk<T>, bwd_finish<T>};

}  // namespace

const BwdKernels bwd_kernels[4] = {kBwdKernels<float>, kBwdKernels<double>, kBwdKernels<Half>,
                                   kBwdKernels<BFloat16>};

}  // namespace txl::TXL_ISA
