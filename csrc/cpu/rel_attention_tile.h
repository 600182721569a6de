// The steps that both directions share for one query tile: load it, score a block of keys, mask.
#pragma once

#include <limits>

#include "philox.h"
#include "rel_attention_panels.h"
#include "txl/gemm.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// Rows of a score tile are wider than a block, and there is slack before the tile: the position
// product is written with a row stride of one more column, starting `height - 1` columns earlier,
// which puts its column j - i + const at key j. This is the relative shift, at no cost.
constexpr int64_t kScoreLd = leading_dimension(kKeyBlock + kQueryTile + 16);
constexpr int64_t kScoreSlack = kQueryTile + 16;
constexpr int64_t kScoreSize = kScoreSlack + kQueryTile * kScoreLd + kScoreSlack;

// The rows [begin, end) of queries; products compute `height` rows (RelAttentionPlan::tile_height).
struct TileRows {
  int64_t begin, end, height;
  int64_t count() const { return end - begin; }
};

inline TileRows tile_rows(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                          int64_t tile) {
  const int64_t begin = tile * plan.tile_rows;
  const int64_t end = std::min(begin + plan.tile_rows, args.Tq);
  return {begin, end, plan.tile_height(end - begin)};
}

// score = scale · content + pos_scale · position. Products read queries that are multiplied by
// `content` and `position`; a score is a product's element times `score` > 0, so that a masked one,
// -inf, stays so. With a softcap the tile holds tanh(base · product / softcap), and `score` is the
// softcap. `base` is the factor of the two that products leave out: |base| = 1 · scale unless the
// scale is far smaller than pos_scale. If both factors are 0, products are 0. Gradients of k and r
// are sums of products with the multiplied queries, times `gradient`.
template <typename acc_t>
struct Factors {
  acc_t content = 0, position = 0, score = 1, gradient = 0;
  double base = 0;

  explicit Factors(const RelAttentionArgs& args) {
    const auto scale = static_cast<acc_t>(args.scale), pos = static_cast<acc_t>(args.pos_scale);
    // 2^32: products with the multiplied queries stay far from overflow.
    const bool by_scale = std::abs(args.scale) * 4294967296.0 >= std::abs(args.pos_scale);
    base = scale != 0 && (by_scale || pos == 0) ? args.scale : pos != 0 ? args.pos_scale : 0;
    const double sign = args.softcap > 0 || base > 0 ? 1 : -1;
    if (base != 0) {
      content = scale == 0 ? 0 : static_cast<acc_t>(args.scale / base * sign);
      position = pos == 0 ? 0 : static_cast<acc_t>(args.pos_scale / base * sign);
      score = static_cast<acc_t>(std::abs(base));
      gradient = static_cast<acc_t>(base) * static_cast<acc_t>(sign);
    }
    if (args.softcap > 0) score = static_cast<acc_t>(args.softcap);
  }
};

// dst = factor · (x + bias) in rows of `ld` operands, for one tile's rows of one head; zeros after
// the last query.
template <typename T>
void load_query_rows(const T* x, int64_t stride, const Acc<T>* bias, Acc<T> factor, TileRows rows,
                     int64_t D, Operand<T>* dst, int64_t ld) {
  Acc<T> sum[kMaxHeadSize];
  for (int64_t a = 0; a < rows.count(); ++a) {
    convert_row(x + (rows.begin + a) * stride, sum, D);
    for (int64_t d = 0; d < D; ++d) sum[d] = (bias ? sum[d] + bias[d] : sum[d]) * factor;
    convert_row(sum, dst + a * ld, D);
    std::fill(dst + a * ld + D, dst + (a + 1) * ld, Operand<T>(0));
  }
  std::fill(dst + rows.count() * ld, dst + rows.height * ld, Operand<T>(0));
}

// qu = content · (q + r_w_bias), qv = position · (q_pos + r_r_bias).
template <typename T>
void load_queries(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows, Operand<T>* qu,
                  Operand<T>* qv) {
  const Factors<Acc<T>> factors(args);
  const auto* u = static_cast<const Acc<T>*>(args.r_w_bias);
  const auto* v = static_cast<const Acc<T>*>(args.r_r_bias);
  load_query_rows<T>(args.q.head<const T>(b, h), args.q.stride_t, u ? u + h * args.D : nullptr,
                     factors.content, rows, args.D, qu, row_length<T>(args.D));
  load_query_rows<T>(args.q_pos.head<const T>(b, h), args.q_pos.stride_t,
                     v ? v + h * args.Dp : nullptr, factors.position, rows, args.Dp, qv,
                     row_length<T>(args.Dp));
}

// Elements of a tile's queries of head size D.
template <typename T>
int64_t tile_size(int64_t D) {
  return kQueryTile * round_up(row_length<T>(D), 16);
}

// The keys [begin, begin + n) of one block.
struct Block {
  int64_t begin, n, padded;  // padded: n rounded up to a multiple of 16
};

template <typename F>
void for_each_block(const TileKeys& keys, F&& f) {
  for (int64_t begin = keys.aligned_begin; begin < keys.end; begin += keys.width) {
    const int64_t n = std::min(keys.width, keys.end - begin);
    f(Block{begin, n, round_up(n, 16)});
  }
}

// The key blocks of items [first, stop) of a unit.
inline TileKeys keys_of_items(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                              int64_t first, int64_t stop) {
  int64_t first_tile = plan.n_tiles, last_tile = 0;
  for (int64_t item = first; item < stop; ++item) {
    first_tile = std::min(first_tile, plan.item(item).tile);
    last_tile = std::max(last_tile, plan.item(item).tile);
  }
  return tile_keys(args, plan, b, tile_rows(args, plan, first_tile).begin,
                   tile_rows(args, plan, last_tile).end);
}

// Calls f(begin, end, keys) for each run of items [first, stop) of a unit. With ranges per
// query, the blocks of a run cover the keys of that run's items only; otherwise all runs use the
// same blocks, which cover the keys of all items.
template <typename F>
void for_each_run(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                  int64_t first, int64_t stop, F&& f) {
  TileKeys keys = keys_of_items(args, plan, b, first, stop);
  for (int64_t begin = first, end; begin < stop; begin = end) {
    end = std::min(stop, plan.run_end(begin));
    if (args.key_table != nullptr) keys = keys_of_items(args, plan, b, begin, end);
    f(begin, end, keys);
  }
}

// The part of a block to which a query tile attends; n = 0 if there is none.
inline Block seen_part(const RelAttentionArgs& args, int64_t b, TileRows rows, Block block) {
  const KeyRange keys = args.keys_of_rows(b, rows.begin, rows.end);
  if (keys.begin >= keys.end) return {block.begin, 0, 0};
  const int64_t begin = std::max(block.begin, args.aligned(b, keys.begin));
  const int64_t end = std::min(block.begin + block.n, keys.end);
  const int64_t n = std::max<int64_t>(0, end - begin);
  return {begin, n, round_up(n, 16)};
}

// The columns of the position table that a tile needs for a block: [first, first + n), counted from
// the plan's first column. Column `origin` belongs to the tile's last row and the block's first
// key. All are multiples of 16.
struct Columns {
  int64_t origin, first, n;
};

// Columns at distances that a window masks are left out: scores there stay unwritten until they are
// masked, and their gradients are 0.
inline Columns block_columns(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                             TileRows rows, Block block) {
  const int64_t first_column = args.row_offset(b) - plan.column_begin;  // of j - i = 0
  const int64_t origin = block.begin - (rows.begin + rows.height) + 1 + first_column;
  const int64_t end = origin + round_up(block.padded + rows.height - 1, 16);
  const int64_t same = args.position(b) + first_column;  // of a query's own position
  const int64_t first = std::max(origin, (same - args.rule.window_left) & -16);
  const int64_t last = std::min(end, round_up(same + args.rule.window_right + 1, 16));
  return {origin, first, std::max<int64_t>(0, last - first)};
}

// Whether one of columns [x, x + n) of the position table is a row of `r`. Products skip other
// columns, which are zeros.
inline bool has_rows(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t x,
                     int64_t n) {
  const int64_t row = plan.column_begin + x;
  return args.clamp || (row + n > 0 && row < args.R);
}

// The rows of a full tile that keys [begin, begin + n) concern: the halves with a row that attends
// to one of them, or, if neighbouring queries may have unrelated ranges, the entries of the table
// of key ranges from the first such row to the last; none if there is no such row. Other tiles are
// not divided.
inline RowSpan attending_rows(const RelAttentionArgs& args, int64_t b, TileRows rows, int64_t begin,
                              int64_t n) {
  if (rows.count() < kQueryTile) return {0, rows.height};
  const int64_t step = args.key_table != nullptr ? kRangeRows : kQueryTile / 2;
  auto attends = [&](int64_t first) {
    const KeyRange keys = args.keys_of_rows(b, rows.begin + first, rows.begin + first + step);
    return keys.begin < begin + n && keys.end > begin;
  };
  RowSpan span{0, kQueryTile};
  while (span.begin < kQueryTile && !attends(span.begin)) span.begin += step;
  if (span.begin == kQueryTile)
    return args.key_table != nullptr ? RowSpan{0, 0} : RowSpan{0, kQueryTile};
  while (!attends(span.end - step)) span.end -= step;
  return span;
}

// The halves of a full tile that columns [x, x + n) of the position table concern: those with a row
// in which one of the columns belongs to a key of the block.
inline RowSpan shifted_rows(TileRows rows, Block block, Columns columns, int64_t x, int64_t n) {
  constexpr int64_t kHalf = kQueryTile / 2;
  if (rows.count() < kQueryTile) return {0, rows.height};
  const int64_t column = x - columns.origin;  // column c + kQueryTile - 1 - a belongs to key c
  const bool upper = column + n > kHalf;
  const bool lower = column < block.padded + kHalf - 1;
  return {upper ? 0 : kHalf, lower ? kQueryTile : kHalf};
}

// A packed matrix as products read it.
template <typename T>
const Operand<T>* operands(const Word<T>* words) {
  return reinterpret_cast<const Operand<T>*>(words);
}

// Columns [begin, end) of the position table for which a tile's position product was computed.
struct Computed {
  int64_t begin, end;
  bool any() const { return begin < end; }
};

// The position product, written with the shift: scores[a, c] = qv_a · r[c - a + ...]. Pieces of
// columns without a row of `r` are skipped.
template <typename T>
Computed position_product(const RelAttentionArgs& args, const RelAttentionPlan& plan, TileRows rows,
                          Block block, Columns columns, const Operand<T>* qv, Panels<Word<T>> r_t,
                          Acc<T>* scores) {
  const int64_t K = row_length<T>(args.Dp);
  Acc<T>* shifted = scores - (rows.height - 1);
  Computed computed{columns.first + columns.n, columns.first};
  for_each_column_piece(
      columns.first, columns.n, rows.height,
      [&](int64_t x, int64_t n) { return shifted_rows(rows, block, columns, x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        if (!has_rows(args, plan, x, size)) return;
        computed = {std::min(computed.begin, x), std::max(computed.end, x + size)};
        gemm(span.n(), size, K, qv + span.begin * K, K, operands<T>(r_t.at(x)), r_t.ld,
             shifted + span.begin * (kScoreLd + 1) + (x - columns.origin), kScoreLd + 1,
             /*accumulate=*/false);
      });
  return computed;
}

// Clears the scores of keys [x, x + n) to which no computed column of the position table belongs.
template <typename acc_t>
void clear_other_scores(Computed computed, Columns columns, RowSpan span, int64_t height, int64_t x,
                        int64_t n, acc_t* scores) {
  for (int64_t a = span.begin; a < span.end; ++a) {
    const int64_t first = columns.origin + height - 1 - a;  // the column of key 0
    const int64_t begin = std::clamp(computed.begin - first, x, x + n);
    const int64_t end = std::clamp(computed.end - first, begin, x + n);
    acc_t* row = scores + a * kScoreLd;
    std::fill(row + x, row + begin, acc_t(0));
    std::fill(row + end, row + x + n, acc_t(0));
  }
}

// The products of a tile's scores: the position product, then the content product on top.
template <typename T>
void score_block(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                 TileRows rows, Block block, Columns columns, const Operand<T>* qu,
                 const Operand<T>* qv, const Word<T>* k_t, int64_t ld_k, Panels<Word<T>> r_t,
                 Acc<T>* scores) {
  const int64_t K = row_length<T>(args.D);
  const Computed computed = position_product<T>(args, plan, rows, block, columns, qv, r_t, scores);
  for_each_column_piece(
      0, block.padded, rows.height,
      [&](int64_t x, int64_t n) { return attending_rows(args, b, rows, block.begin + x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        if (span.n() == 0) return;
        // The columns of these keys.
        const int64_t first = columns.origin + x, last = first + size + rows.height - 1;
        const bool accumulate = computed.any() && first < computed.end && last > computed.begin;
        if (accumulate && (std::max(first, columns.first) < computed.begin ||
                           std::min(last, columns.first + columns.n) > computed.end))
          clear_other_scores(computed, columns, span, rows.height, x, size, scores);
        gemm(span.n(), size, K, qu + span.begin * K, K, operands<T>(k_t + x), ld_k,
             scores + span.begin * kScoreLd + x, kScoreLd, accumulate);
      });
}

// tanh(base · product / softcap).
template <typename acc_t>
void cap_row(double base, double softcap, acc_t* scores, int64_t n) {
  using Vec = Vectorized<acc_t>;
  constexpr double kMax = std::numeric_limits<acc_t>::max();
  const Vec factor(static_cast<acc_t>(std::clamp(base / softcap, -kMax, kMax)));
  for (int64_t j = 0; j < n; j += Vec::size()) {
    (Vec::loadu(scores + j) * factor).tanh().store(scores + j);
  }
}

// -inf where query i of (b, h) does not attend to a key of the block, and in the padding after it.
template <typename acc_t>
void mask_row(const RelAttentionArgs& args, int64_t b, int64_t h, int64_t i, Block block,
              acc_t* scores) {
  constexpr acc_t kMasked = -std::numeric_limits<acc_t>::infinity();
  const KeyRange keys = args.keys_of(b, i);
  const int64_t begin = std::clamp<int64_t>(keys.begin - block.begin, 0, block.padded);
  const int64_t end = std::clamp<int64_t>(keys.end - block.begin, begin, block.padded);
  std::fill(scores, scores + begin, kMasked);
  std::fill(scores + end, scores + block.padded, kMasked);
  if (args.mask.data == nullptr) return;
  const bool* attend = args.mask.head<const bool>(b, h) + i * args.mask.stride_t;
  for (int64_t c = begin; c < end; ++c) {
    if (!attend[(block.begin + c) * args.mask_stride_key]) scores[c] = kMasked;
  }
}

// Caps and masks the scores of one tile and block.
template <typename T>
void finish_scores(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows, Block block,
                   Acc<T>* scores) {
  const double base = Factors<Acc<T>>(args).base;
  for (int64_t a = 0; a < rows.count(); ++a) {
    Acc<T>* row = scores + a * kScoreLd;
    if (args.softcap > 0) cap_row(base, args.softcap, row, block.padded);
    mask_row(args, b, h, rows.begin + a, block, row);
  }
}

// floor(p · 2^32): an element is kept if its Philox word is at least this number.
inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(p * 4294967296.0);
}

// Row i's dropout factors, 0 or 1, of the block's keys. `keep` has room for kKeyBlock + 16 of them.
template <typename acc_t>
const acc_t* block_keep(const RelAttentionArgs& args, int64_t b, int64_t h, int64_t i, Block block,
                        acc_t* keep) {
  const int64_t before = block.begin & 15;  // a counter belongs to four aligned keys
  dropout_keep(args.dropout_seed, b * args.H + h, i, block.begin - before, block.padded + before,
               dropout_threshold(args.dropout_p), keep);
  return keep + before;
}

// C += A[:, x - begin] · rows[x] over x in [begin, begin + n), n a multiple of 16. Runs of at least
// 16 rows are read from the caller's memory, other rows through `stage`, a matrix [16, N].
template <typename T>
void product_in_place(int64_t M, int64_t N, const KeyRows<T>& rows, int64_t begin, int64_t n,
                      const T* A, int64_t lda, T* stage, T* C, int64_t ldc) {
  for (int64_t x = 0, done; x < n; x += done) {
    const RowRun<T> run = rows.from(begin + x);
    done = std::min(run.n, n - x) / 16 * 16;
    if (done == 0) {
      stage_rows<T>(rows, begin + x, N, stage, N);
      gemm(M, N, 16, A + x, lda, stage, N, C, ldc, /*accumulate=*/true);
      done = 16;
    } else if (run.first != nullptr) {
      for_each_inner_piece(0, done, [&](int64_t y, int64_t size) {
        gemm(M, N, size, A + x + y, lda, run.first + y * run.stride, run.stride, C, ldc,
             /*accumulate=*/true);
      });
    }
  }
}

}  // namespace txl::TXL_ISA
