// The steps that both directions share for one query tile: load it, score a block of keys, mask.
#pragma once

#include <limits>

#include "arena.h"
#include "operand.h"
#include "pack.h"
#include "txl/gemm.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// Rows of a score tile are wider than a block, and there is slack before the tile: the position
// product is written with a row stride of one more column, starting `height - 1` columns earlier,
// which puts its column j - i + const at key j. This is the relative shift, at no cost.
constexpr int64_t kScoreLd = leading_dimension(kKeyBlock + kQueryTile + 16);
constexpr int64_t kScoreSlack = kQueryTile + 16;
constexpr int64_t kScoreSize = kScoreSlack + kQueryTile * kScoreLd + kScoreSlack;

// The columns of the position table (or of its gradient), transposed: [panel][rows][kPanelLd] with
// kPanel columns in a panel, so that no leading dimension depends on the number of columns.
constexpr int64_t kPanel = 1024, kPanelLd = leading_dimension(kPanel);

template <typename W>
struct TablePanels {
  W* data;
  int64_t rows;

  W* at(int64_t column) const { return data + column / kPanel * rows * kPanelLd + column % kPanel; }
};

template <typename W>
TablePanels<W> take_table(Arena& arena, int64_t rows, const RelAttentionPlan& plan) {
  const int64_t n_panels = round_up(plan.n_columns(), kPanel) / kPanel;
  return {arena.take<W>(n_panels * rows * kPanelLd), rows};
}

// Packs the table's columns of the plan, transposed.
template <typename T>
void pack_table(const TableRows<T>& rows, const RelAttentionPlan& plan, int64_t D,
                Operand<T>* stage, TablePanels<Word<T>> panels) {
  for (int64_t column = 0; column < plan.n_columns(); column += kPanel) {
    const int64_t n = std::min(kPanel, plan.n_columns() - column), e = plan.e_begin + column;
    pack_transposed<T>(rows, e, e + n, D, stage, panels.at(column), kPanelLd);
  }
}

// Calls f(x, size) for consecutive pieces of [begin, begin + n), n a multiple of 16. No piece
// crosses a multiple of kPanel. There are at most three sizes, because ATen keeps machine code for
// every distinct product (see txl/gemm.h).
template <typename F>
void for_each_piece(int64_t largest, int64_t begin, int64_t n, F&& f) {
  for (int64_t x = begin, end = begin + n, size; x < end; x += size) {
    const int64_t room = std::min(end - x, kPanel - x % kPanel);
    size = room >= largest ? largest : room >= 64 ? 64 : 16;
    f(x, size);
  }
}

// Rows [begin, end) of a tile.
struct RowSpan {
  int64_t begin, end;
  int64_t n() const { return end - begin; }
  bool operator==(const RowSpan&) const = default;
};

// Pieces of a product's columns: f(x, size, rows). With AVX2 a piece of 64 columns stays in the
// first-level cache: on an AMD EPYC (family 25 model 1), two threads, [64, 64]·[64, N] runs at 184
// GFLOP/s for N 64 and at 170 for N 256. A piece is divided into halves that need different rows of
// the tile, `rows_of(x, size)`: at the diagonal, a quarter of its product is left out. Wider
// vectors finish a piece of 64 so fast that the call's own time counts.
template <typename R, typename F>
void for_each_column_piece(int64_t begin, int64_t n, [[maybe_unused]] int64_t height,
                           [[maybe_unused]] R&& rows_of, F&& f) {
#if defined(CPU_CAPABILITY_AVX512)
  for_each_piece(256, begin, n, [&](int64_t x, int64_t size) { f(x, size, RowSpan{0, height}); });
#else
  for_each_piece(64, begin, n, [&](int64_t x, int64_t size) {
    if (size < 64) return f(x, size, RowSpan{0, height});
    const RowSpan left = rows_of(x, size / 2), right = rows_of(x + size / 2, size / 2);
    if (left == right) return f(x, size, left);
    f(x, size / 2, left);
    f(x + size / 2, size / 2, right);
  });
#endif
}

// Pieces of a product's inner dimension.
template <typename F>
void for_each_inner_piece(int64_t begin, int64_t n, F&& f) {
  for_each_piece(256, begin, n, f);
}

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

// A score is a tile's element times a positive factor; a masked one, -inf, stays so. The tile holds
// products with queries that have the sign of `scale`, its magnitude being the factor. With a
// softcap the tile holds tanh(scale · product / softcap), and the factor is the softcap. A scale
// that is 0 in the accumulation type cannot be a factor; the products are 0 instead.
template <typename acc_t>
acc_t query_sign(const RelAttentionArgs& args) {
  const auto scale = static_cast<acc_t>(args.scale);
  return scale == 0 ? 0 : args.softcap > 0 || scale > 0 ? 1 : -1;
}
template <typename acc_t>
acc_t score_factor(const RelAttentionArgs& args) {
  const auto scale = static_cast<acc_t>(args.scale);
  if (args.softcap > 0) return static_cast<acc_t>(args.softcap);
  return scale == 0 ? 1 : std::abs(scale);
}

// qu = ±(q + r_w_bias), qv = ±(q + r_r_bias), rows of `ld` operands; zeros after the last query.
template <typename T>
void load_queries(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows, Operand<T>* qu,
                  Operand<T>* qv, int64_t ld) {
  const auto sign = query_sign<Acc<T>>(args);
  const auto* u = static_cast<const Acc<T>*>(args.r_w_bias);
  const auto* v = static_cast<const Acc<T>*>(args.r_r_bias);
  Acc<T> q[256], sum[256];
  auto biased = [&](const Acc<T>* bias, Operand<T>* dst) {
    for (int64_t d = 0; d < args.D; ++d)
      sum[d] = (bias ? q[d] + bias[h * args.D + d] : q[d]) * sign;
    convert_row(sum, dst, args.D);
    std::fill(dst + args.D, dst + ld, Operand<T>(0));
  };
  for (int64_t a = 0; a < rows.count(); ++a) {
    convert_row(args.q.head<const T>(b, h) + (rows.begin + a) * args.q.stride_t, q, args.D);
    biased(u, qu + a * ld);
    biased(v, qv + a * ld);
  }
  std::fill(qu + rows.count() * ld, qu + rows.height * ld, Operand<T>(0));
  std::fill(qv + rows.count() * ld, qv + rows.height * ld, Operand<T>(0));
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

// The part of a block to which a query tile attends; n = 0 if there is none.
inline Block seen_part(const RelAttentionArgs& args, int64_t b, TileRows rows, Block block) {
  const int64_t begin = std::max(block.begin, args.keys_of(b, rows.begin).begin / 16 * 16);
  const int64_t end = std::min(block.begin + block.n, args.keys_of(b, rows.end - 1).end);
  const int64_t n = std::max<int64_t>(0, end - begin);
  return {begin, n, round_up(n, 16)};
}

// The columns of the position table that a tile needs for a block: [first, first + n), counted from
// the plan's first column. Column `origin` belongs to the tile's last row and the block's first
// key. All are multiples of 16.
struct Columns {
  int64_t origin, first, n;
};

// Columns at distances that a window masks are left out: scores there stay unwritten
// until they are masked, and their gradients are 0.
inline Columns block_columns(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                             TileRows rows, Block block) {
  const int64_t origin = block.begin - (rows.begin + rows.height) + args.Tq - plan.e_begin;
  const int64_t end = origin + round_up(block.padded + rows.height - 1, 16);
  const int64_t same = args.Tk() - 1 - plan.e_begin;  // the column of a query's own position
  const int64_t right = args.rule.window_right;
  const int64_t first = std::max(origin, (same - args.rule.window_left) / 16 * 16);
  const int64_t last = std::min(end, round_up(same + right + 1, 16));
  return {origin, first, std::max<int64_t>(0, last - first)};
}

// The halves of a full tile that keys [begin, begin + n) concern: those with a row that attends to
// one of them. Other tiles are not divided.
inline RowSpan attending_rows(const RelAttentionArgs& args, int64_t b, TileRows rows, int64_t begin,
                              int64_t n) {
  constexpr int64_t kHalf = kQueryTile / 2;
  if (rows.count() < kQueryTile) return {0, rows.height};
  auto attends = [&](int64_t first) {
    return args.keys_of(b, first).begin < begin + n &&
           args.keys_of(b, first + kHalf - 1).end > begin;
  };
  const bool upper = attends(rows.begin), lower = attends(rows.begin + kHalf);
  if (upper == lower) return {0, kQueryTile};
  return upper ? RowSpan{0, kHalf} : RowSpan{kHalf, kQueryTile};
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

// scores[a, c] = qu_a · k_c + qv_a · r[c - a + ...]: the position product, written with the shift,
// then the content product on top.
template <typename T>
void score_block(const RelAttentionArgs& args, int64_t b, TileRows rows, Block block,
                 Columns columns, const Operand<T>* qu, const Operand<T>* qv, const Word<T>* k_t,
                 int64_t ld_k, TablePanels<Word<T>> r_t, Acc<T>* scores) {
  const int64_t K = row_length<T>(args.D);
  Acc<T>* shifted = scores - (rows.height - 1);
  for_each_column_piece(
      columns.first, columns.n, rows.height,
      [&](int64_t x, int64_t n) { return shifted_rows(rows, block, columns, x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        gemm(span.n(), size, K, qv + span.begin * K, K, operands<T>(r_t.at(x)), kPanelLd,
             shifted + span.begin * (kScoreLd + 1) + (x - columns.origin), kScoreLd + 1,
             /*accumulate=*/false);
      });
  for_each_column_piece(
      0, block.padded, rows.height,
      [&](int64_t x, int64_t n) { return attending_rows(args, b, rows, block.begin + x, n); },
      [&](int64_t x, int64_t size, RowSpan span) {
        gemm(span.n(), size, K, qu + span.begin * K, K, operands<T>(k_t + x), ld_k,
             scores + span.begin * kScoreLd + x, kScoreLd, /*accumulate=*/true);
      });
}

// tanh(scale · product / softcap).
template <typename acc_t>
void cap_row(const RelAttentionArgs& args, acc_t* scores, int64_t n) {
  using Vec = Vectorized<acc_t>;
  constexpr double kMax = std::numeric_limits<acc_t>::max();
  const Vec factor(static_cast<acc_t>(std::clamp(args.scale / args.softcap, -kMax, kMax)));
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
  for (int64_t a = 0; a < rows.count(); ++a) {
    Acc<T>* row = scores + a * kScoreLd;
    if (args.softcap > 0) cap_row(args, row, block.padded);
    mask_row(args, b, h, rows.begin + a, block, row);
  }
}

// floor(p · 2^32): an element is kept if its Philox word is at least this number.
inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(p * 4294967296.0);
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
