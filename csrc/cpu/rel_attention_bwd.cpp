// rel_attention backward on the CPU, for one instruction set.
//
// A chunk is computed pair by pair, and a pair block by block of keys: all query tiles of the pair
// recompute the block's probabilities from the saved log-sum-exp, while its packed keys and values
// and their gradients are in the cache. These gradients and the position table's are accumulated
// transposed, [D, keys], in float32. The tiles of probabilities and of score gradients are then
// right-hand matrices without a transposition, and the score gradients, read with the skewed row
// stride, are those by distance. Nothing is atomic: sums to which two chunks contribute go to
// slots, which `finish` adds in order.
#include "kernels.h"
#include "philox.h"
#include "rel_attention_bwd_outputs.h"
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

// dout's tile as operands, and delta_i = Σ_d dout_id · out_id.
template <typename T>
void load_dout(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
               const BwdTile<T>& tile) {
  const int64_t ld = row_length<T>(args.Dv);
  Acc<T> dout[256], out[256];
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const int64_t i = tile.rows.begin + a;
    convert_row(grads.dout.head<const T>(b, h) + i * grads.dout.stride_t, dout, args.Dv);
    convert_row(args.out.head<const T>(b, h) + i * args.out.stride_t, out, args.Dv);
    convert_row(dout, tile.dout + a * ld, args.Dv);
    std::fill(tile.dout + a * ld + args.Dv, tile.dout + (a + 1) * ld, Operand<T>(0));
    Acc<T> delta = 0;
    for (int64_t d = 0; d < args.Dv; ++d) delta += dout[d] * out[d];
    tile.delta[a] = delta;
  }
  std::fill(tile.dout + tile.rows.count() * ld, tile.dout + tile.rows.height * ld, Operand<T>(0));
}

// One row's probabilities and score gradients, in place of its scores and probability gradients:
// p = e^(s · factor - lse); ds = p · (dropout(dp) - delta), times the softcap's slope. The product
// is rounded before the subtraction: where one key dominates the row, lse is that key's rounded
// score, and p exactly 1.
template <typename T, typename operand_p, typename operand_s>
void gradient_row(const RelAttentionArgs& args, const Acc<T>* scores, const Acc<T>* dprobs,
                  const Acc<T>* keep, Acc<T> lse, Acc<T> delta, int64_t n, operand_p* probs,
                  operand_s* dscores) {
  using Vec = Vectorized<Acc<T>>;
  const Vec factor_vec(score_factor<Acc<T>>(args)), lse_vec(lse), delta_vec(delta),
      rescale(static_cast<Acc<T>>(1 / (1 - args.dropout_p))), zero(0), one(1), minus_one(-1);
  const bool dropout = args.dropout_p > 0, capped = args.softcap > 0;
  for (int64_t j = 0; j < n; j += Vec::size()) {
    const Vec score = Vec::loadu(scores + j);
    const Vec p = exp_nonpositive(at::vec::clamp_max(score * factor_vec - lse_vec, zero));
    Vec dp = Vec::loadu(dprobs + j), kept = p;
    if (dropout) {
      const Vec factor = Vec::loadu(keep + j) * rescale;
      dp = dp * factor;
      kept = p * factor;
    }
    Vec ds = p * (dp - delta_vec);
    if (capped) {
      const Vec tanh = at::vec::maximum(score, minus_one);  // a masked score is -inf
      ds = ds * (one - tanh * tanh);
    }
    store_operand(probs + j, kept);
    store_operand(dscores + j, ds);
  }
}

// Clears both sides of rows that are read with the skewed stride.
template <typename operand_t>
void clear_gaps(operand_t* tile, int64_t rows, int64_t n, int64_t ld) {
  std::fill(tile - kScoreSlack, tile, operand_t(0));
  for (int64_t a = 0; a < rows; ++a) {
    operand_t* row = tile + a * ld;
    std::fill(row + n, row + std::min(n + kScoreSlack, ld), operand_t(0));
    std::fill(row + std::max(n, ld - kScoreSlack), row + ld, operand_t(0));
  }
  std::fill(tile + rows * ld, tile + rows * ld + kScoreSlack, operand_t(0));
}

// Probabilities and score gradients of a block, in the layouts that its products read.
template <typename T>
void gradient_rows(const RelAttentionArgs& args, int64_t b, int64_t h, const BwdTile<T>& tile,
                   Block block, const BwdWorkspace<T>& ws) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const TileRows rows = tile.rows;
  const auto* lse = static_cast<const Acc<T>*>(args.lse) + (b * args.H + h) * args.Tq + rows.begin;
  const int64_t n = block.padded;
  auto row = [&](int64_t a, auto* probs, auto* dscores) {
    if (args.dropout_p > 0) {
      dropout_keep(args.dropout_seed, b * args.H + h, rows.begin + a, block.begin, n,
                   dropout_threshold(args.dropout_p), ws.keep);
    }
    gradient_row<T>(args, ws.scores + a * kScoreLd, ws.dprobs + a * kScoreLd, ws.keep,
                    lse[a] == kNone ? 0 : lse[a], tile.delta[a], n, probs, dscores);
  };
  if constexpr (kPacked<T>) {
    const int64_t padded_rows = row_length<T>(rows.height);
    auto row_or_zeros = [&](int64_t a, BFloat16* probs, BFloat16* dscores) {
      if (a < rows.count()) {
        row(a, probs, dscores);
      } else {
        std::fill(probs, probs + n, BFloat16(0));
        std::fill(dscores, dscores + n, BFloat16(0));
      }
    };
    for (int64_t a = 0; a < padded_rows; a += 2) {
      BFloat16 *even = ws.dscores + a * kScoreLd, *odd = even + kScoreLd;
      BFloat16 *probs_even = ws.probs_row, *probs_odd = ws.probs_row + kScoreLd;
      row_or_zeros(a, probs_even, even);
      row_or_zeros(a + 1, probs_odd, odd);
      interleave(probs_even, probs_odd, n, ws.probs_pairs + a / 2 * kKeyBlock);
      interleave(even, odd, n, ws.dscores_pairs + a / 2 * kKeyBlock);
    }
    clear_gaps(ws.dscores, padded_rows, n, kScoreLd);
    clear_gaps(ws.shifted_pairs, padded_rows / 2, n, kPairLd);
    for (int64_t a = 0; a < padded_rows; a += 2) {
      const BFloat16* even = ws.dscores + a * kScoreLd;
      interleave(even - 1, even + kScoreLd, n + 1, ws.shifted_pairs + a / 2 * kPairLd - 1);
    }
  } else {
    for (int64_t a = 0; a < rows.count(); ++a) {
      row(a, ws.dprobs + a * kScoreLd, ws.scores + a * kScoreLd);
    }
    for (int64_t a = rows.count(); a < rows.height; ++a) {
      std::fill(ws.dprobs + a * kScoreLd, ws.dprobs + a * kScoreLd + n, Acc<T>(0));
      std::fill(ws.scores + a * kScoreLd, ws.scores + a * kScoreLd + n, Acc<T>(0));
    }
    clear_gaps(ws.scores, rows.height, n, kScoreLd);
  }
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

// The five products of a block that read its probabilities and score gradients; `key`: the block's
// first packed column; `keys`: as in key_product.
template <typename T>
void accumulate_block(const RelAttentionArgs& args, int64_t b, const BwdTile<T>& tile, Block block,
                      Columns columns, int64_t key, const KeyRows<T>* keys,
                      const BwdWorkspace<T>& ws) {
  const int64_t height = tile.rows.height, K = row_length<T>(height), D = args.D;
  // Element (a, x) of a shifted tile is the score gradient of query a and table column x.
  const int64_t shift = height - 1;
  const Operand<T>*probs, *dscores, *dscores_rows, *shifted;
  int64_t ld_probs, ld_shifted;
  if constexpr (kPacked<T>) {
    probs = operands<T>(ws.probs_pairs), dscores = operands<T>(ws.dscores_pairs);
    dscores_rows = ws.dscores, shifted = operands<T>(ws.shifted_pairs - shift);
    ld_probs = kKeyBlock, ld_shifted = kPairLd + 2;
  } else {
    probs = ws.dprobs, dscores = dscores_rows = ws.scores, shifted = ws.scores - shift;
    ld_probs = kScoreLd, ld_shifted = kScoreLd + 1;
  }
  constexpr int64_t kPerWord = kRowsPerWord<T>;
  for_each_column_piece(
      0, block.padded, height,
      [&](int64_t x, int64_t n) { return attending_rows(args, b, tile.rows, block.begin + x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        const int64_t inner = row_length<T>(span.n());
        const int64_t from = span.begin / kPerWord * ld_probs * kPerWord + x * kPerWord;
        gemm(args.Dv, size, inner, tile.dout_t + span.begin, K, probs + from, ld_probs,
             ws.dv_t + key + x, ws.ld_k, /*accumulate=*/true);
        gemm(D, size, inner, tile.qu_t + span.begin, K, dscores + from, ld_probs, ws.dk_t + key + x,
             ws.ld_k, /*accumulate=*/true);
      });
  key_product<T>(args, tile, block, key, keys, dscores_rows, ws);
  for_each_column_piece(
      columns.first, columns.n, height,
      [&](int64_t x, int64_t n) { return shifted_rows(tile.rows, block, columns, x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        const int64_t column = x - columns.origin;
        gemm(D, size, row_length<T>(span.n()), tile.qv_t + span.begin, K,
             shifted + span.begin / kPerWord * ld_shifted * kPerWord + column * kPerWord,
             ld_shifted, ws.dr_t.at(x), kPanelLd, /*accumulate=*/true);
      });
  for_each_inner_piece(columns.first, columns.n, [&](int64_t x, int64_t size) {
    const int64_t column = x - columns.origin;
    gemm(height, D, size, dscores_rows - shift + column, kScoreLd + 1,
         operands<T>(ws.r + x / kPerWord * ws.ld_row), ws.ld_row, tile.dqv, ws.ld_acc,
         /*accumulate=*/true);
  });
}

template <typename T>
void load_tile(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
               const BwdTile<T>& tile, const BwdWorkspace<T>& ws) {
  const int64_t n_rows = tile.rows.count(), K = row_length<T>(tile.rows.height);
  const int64_t ld_q = row_length<T>(args.D), ld_o = row_length<T>(args.Dv);
  load_queries<T>(args, b, h, tile.rows, tile.qu, tile.qv, ld_q);
  load_dout<T>(args, grads, b, h, tile);
  transpose_tile(tile.qu, ld_q, n_rows, args.D, tile.qu_t, K);
  transpose_tile(tile.qv, ld_q, n_rows, args.D, tile.qv_t, K);
  transpose_tile(tile.dout, ld_o, n_rows, args.Dv, tile.dout_t, K);
  std::fill(tile.dqu, tile.dqu + tile.rows.height * ws.ld_acc, Acc<T>(0));
  std::fill(tile.dqv, tile.dqv + tile.rows.height * ws.ld_acc, Acc<T>(0));
}

// One tile against the part of a block to which it attends; `key`: the part's first packed column.
template <typename T>
void bwd_tile(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b, int64_t h,
              const BwdTile<T>& tile, Block part, int64_t key, const KeyRows<T>* keys,
              const BwdWorkspace<T>& ws) {
  const int64_t ld_o = row_length<T>(args.Dv);
  const Columns columns = block_columns(args, plan, tile.rows, part);
  score_block<T>(args, b, tile.rows, part, columns, tile.qu, tile.qv, ws.k_t + key, ws.ld_k, ws.r_t,
                 ws.scores);
  // A piece leaves out rows whose probabilities are 0; their gradients must be finite.
  auto clear = [&](int64_t first, int64_t last, int64_t x, int64_t size) {
    for (int64_t a = first; a < last; ++a)
      std::fill(ws.dprobs + a * kScoreLd + x, ws.dprobs + a * kScoreLd + x + size, Acc<T>(0));
  };
  for_each_column_piece(
      0, part.padded, tile.rows.height,
      [&](int64_t x, int64_t n) { return attending_rows(args, b, tile.rows, part.begin + x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        gemm(span.n(), size, ld_o, tile.dout + span.begin * ld_o, ld_o,
             operands<T>(ws.v_t + key + x), ws.ld_k, ws.dprobs + span.begin * kScoreLd + x,
             kScoreLd, /*accumulate=*/false);
        clear(0, span.begin, x, size);
        clear(span.end, tile.rows.height, x, size);
      });
  finish_scores<T>(args, b, h, tile.rows, part, ws.scores);
  gradient_rows<T>(args, b, h, tile, part, ws);
  accumulate_block<T>(args, b, tile, part, columns, key, keys, ws);
}

// Items [first, last] of one pair: those of its query tiles that belong to this chunk.
template <typename T>
void bwd_pair(const RelAttentionArgs& args, const RelAttentionPlan& plan,
              const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t first,
              int64_t last, int64_t slot, const BwdWorkspace<T>& ws) {
  const int64_t pair = first / plan.n_tiles, b = args.batch_of(pair), h = args.head_of(pair);
  auto tile = [&](int64_t item) {
    return ws.tile(tile_rows(args, plan, item % plan.n_tiles), item - first);
  };
  for (int64_t item = first; item <= last; ++item) load_tile<T>(args, grads, b, h, tile(item), ws);
  std::fill(ws.dbias, ws.dbias + 2 * args.D, Acc<T>(0));

  const KeyRows<T> keys(args, args.mem_k, args.k, b, h), values(args, args.mem_v, args.v, b, h);
  const bool in_place = kReadable<T> && keys.adjacent(args.D);
  const TileKeys seen = tile_keys(args, plan, b, tile(first).rows.begin, tile(last).rows.end);
  clear_other_keys<T>(args, grads, partials, b, h, {seen.aligned_begin, seen.end}, slot, ws);
  for_each_block(seen, [&](Block block) {
    const int64_t end = block.begin + block.padded;
    pack_transposed<T>(keys, block.begin, end, args.D, ws.stage, ws.k_t, ws.ld_k);
    pack_transposed<T>(values, block.begin, end, args.Dv, ws.stage, ws.v_t, ws.ld_k);
    if (!in_place) pack_natural<T>(keys, block.begin, end, args.D, ws.stage, ws.k, ws.ld_row);
    std::fill(ws.dk_t, ws.dk_t + args.D * ws.ld_k, Acc<T>(0));
    std::fill(ws.dv_t, ws.dv_t + args.Dv * ws.ld_k, Acc<T>(0));
    for (int64_t item = first; item <= last; ++item) {
      const Block part = seen_part(args, b, tile(item).rows, block);
      if (part.n == 0) continue;
      bwd_tile<T>(args, plan, b, h, tile(item), part, part.begin - block.begin,
                  in_place ? &keys : nullptr, ws);
    }
    write_keys<T>(args, grads, partials, b, h, block, slot, ws);
  });
  for (int64_t item = first; item <= last; ++item) write_dq<T>(args, grads, b, h, tile(item), ws);
}

template <typename T>
void bwd_chunk(const RelAttentionArgs& args, const RelAttentionPlan& plan,
               const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t chunk,
               char* workspace) {
  Arena arena(workspace);
  const BwdWorkspace<T> ws(args, plan, arena);
  const int64_t start = plan.chunks[static_cast<size_t>(chunk)],
                stop = plan.chunks[static_cast<size_t>(chunk + 1)];
  int64_t group = -1;
  for (int64_t item = start, next; item < stop; item = next) {
    const int64_t pair = item / plan.n_tiles;
    next = std::min(stop, (pair + 1) * plan.n_tiles);
    const bool whole = item == pair * plan.n_tiles && next == (pair + 1) * plan.n_tiles;
    const int64_t slot = whole ? -1 : 2 * chunk + (pair != start / plan.n_tiles);
    if (args.group_of(pair) != group) {
      if (group >= 0) write_table<T>(args, plan, partials, group + chunk, ws);
      group = args.group_of(pair);
      const TableRows<T> table(args, pair);
      pack_table<T>(table, plan, args.D, ws.stage, ws.r_t);
      pack_natural<T>(table, plan.e_begin, plan.e_end, args.D, ws.stage, ws.r, ws.ld_row);
      for_each_panel_row(plan, ws.dr_t, [](Acc<T>* row, int64_t n) { std::fill(row, row + n, 0); });
    }
    bwd_pair<T>(args, plan, grads, partials, item, next - 1, slot, ws);
    std::copy(ws.dbias, ws.dbias + 2 * args.D,
              static_cast<Acc<T>*>(partials.dbias) + (pair + chunk) * 2 * args.D);
  }
  if (group >= 0) write_table<T>(args, plan, partials, group + chunk, ws);
  gemm_release();
}

template <typename T>
int64_t bwd_workspace(const RelAttentionArgs& args, const RelAttentionPlan& plan) {
  Arena arena(nullptr);
  BwdWorkspace<T>(args, plan, arena);
  return arena.used();
}

template <typename T>
constexpr BwdKernels kBwdKernels{bwd_workspace<T>, bwd_chunk<T>, bwd_finish<T>};

}  // namespace

const BwdKernels bwd_kernels[4] = {kBwdKernels<float>, kBwdKernels<double>, kBwdKernels<Half>,
                                   kBwdKernels<BFloat16>};

}  // namespace txl::TXL_ISA
