// What both directions do with one query tile: load it, score a block of keys, mask the scores.
#pragma once

#include <limits>

#include "arena.h"
#include "operand.h"
#include "pack.h"
#include "txl/gemm.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// Rows of a score tile are wider than a block, and the tile has slack in front: the position
// product is written through a row stride of one more column and from `rows - 1` columns earlier,
// which puts its column j - i + const at key j. That is the relative shift, and it costs nothing.
constexpr int64_t kScoreLd = leading_dimension(kKeyBlock + kQueryTile + 16);
constexpr int64_t kScoreSlack = kQueryTile + 16;
constexpr int64_t kScoreSize = kScoreSlack + kQueryTile * kScoreLd + kScoreSlack;

struct TileRows {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

inline TileRows tile_rows(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                          int64_t tile) {
  const int64_t begin = tile * plan.tile_rows;
  return {begin, std::min(begin + plan.tile_rows, args.Tq)};
}

// A score tile holds plain products, of queries that carry the sign of `scale`; its magnitude, in
// units of log2 e so that probabilities are powers of two, enters with the exponent: one rounding
// for both. With a softcap the tile holds capped scores in those units already.
inline double query_sign(const RelAttentionArgs& args) {
  return args.softcap > 0 || args.scale > 0 ? 1 : args.scale < 0 ? -1 : 0;
}
inline double exponent_factor(const RelAttentionArgs& args) {
  return args.softcap > 0 || args.scale == 0 ? 1 : std::abs(args.scale) * kLog2e;
}

// qu = ±(q + r_w_bias), qv = ±(q + r_r_bias), rows of `ld` operands.
template <typename T>
void load_queries(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows, Operand<T>* qu,
                  Operand<T>* qv, int64_t ld) {
  const auto sign = static_cast<Acc<T>>(query_sign(args));
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
}

// One block of keys [begin, begin + n) against one query tile.
struct Block {
  int64_t begin, n, padded;  // padded: n rounded up to whole vectors
};

template <typename F>
void for_each_block(const TileKeys& keys, F&& f) {
  for (int64_t begin = keys.aligned_begin; begin < keys.end; begin += keys.width) {
    const int64_t n = std::min(keys.width, keys.end - begin);
    f(Block{begin, n, round_up(n, 16)});
  }
}

// The part of a block that a query tile sees; n = 0 where it sees none.
inline Block seen_part(const RelAttentionArgs& args, int64_t b, TileRows rows, Block block) {
  const int64_t begin = std::max(block.begin, args.keys_of(b, rows.begin).begin / 16 * 16);
  const int64_t end = std::min(block.begin + block.n, args.keys_of(b, rows.end - 1).end);
  const int64_t n = std::max<int64_t>(0, end - begin);
  return {begin, n, round_up(n, 16)};
}

// The columns of the position table under a block: [first, first + n), relative to the plan's.
struct Columns {
  int64_t first, n;
};

inline Columns block_columns(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                             TileRows rows, Block block) {
  return {block.begin - rows.end + args.Tq - plan.e_begin, round_up(block.n + rows.count(), 16)};
}

// scores[a, c] = qu_a · k_c + qv_a · r[c - a + ...] : two products, the first through the skew.
template <typename T>
void score_block(TileRows rows, Block block, Columns columns, int64_t D, const Operand<T>* qu,
                 const Operand<T>* qv, const Word<T>* k_t, int64_t ld_k, const Word<T>* r_t,
                 int64_t ld_r, Acc<T>* scores) {
  const int64_t K = row_length<T>(D);
  gemm(rows.count(), columns.n, K, qv, K, reinterpret_cast<const Operand<T>*>(r_t + columns.first),
       ld_r, scores - (rows.count() - 1), kScoreLd + 1, /*accumulate=*/false);
  gemm(rows.count(), block.padded, K, qu, K, reinterpret_cast<const Operand<T>*>(k_t), ld_k, scores,
       kScoreLd, /*accumulate=*/true);
}

// softcap · tanh(scale · product / softcap), in units of log2 e.
template <typename acc_t>
void cap_row(const RelAttentionArgs& args, acc_t* scores, int64_t n) {
  using Vec = Vectorized<acc_t>;
  const Vec inner(static_cast<acc_t>(args.scale / args.softcap));
  const Vec outer(static_cast<acc_t>(args.softcap * kLog2e));
  for (int64_t j = 0; j < n; j += Vec::size()) {
    ((Vec::loadu(scores + j) * inner).tanh() * outer).store(scores + j);
  }
}

// -inf where query i of (b, h) does not see a key of the block, and in the padding behind it.
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

// Scores of one tile and block, ready for the softmax.
template <typename T>
void finish_scores(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows, Block block,
                   Acc<T>* scores) {
  for (int64_t a = 0; a < rows.count(); ++a) {
    Acc<T>* row = scores + a * kScoreLd;
    if (args.softcap > 0) cap_row(args, row, block.padded);
    mask_row(args, b, h, rows.begin + a, block, row);
  }
}

// floor(p · 2^32): Philox words from it on are kept.
inline uint64_t dropout_threshold(double p) {
  return static_cast<uint64_t>(p * 4294967296.0);
}

// C (+)= A[:, x - begin] · rows[x] over x in [begin, end): the right-hand rows where the caller
// keeps them, memory and segment one after the other.
template <typename T>
void product_in_place(int64_t M, int64_t N, const KeyRows<T>& rows, int64_t begin, int64_t end,
                      const T* A, int64_t lda, T* C, int64_t ldc, bool accumulate) {
  int64_t x = std::max(begin, rows.valid.begin);
  const int64_t stop = std::min(end, rows.valid.end);
  while (x < stop) {
    const RowRun<T> run = rows.from(x);
    const int64_t n = std::min(run.n, stop - x);
    gemm(M, N, n, A + (x - begin), lda, run.first, run.stride, C, ldc, accumulate);
    accumulate = true;
    x += n;
  }
}

}  // namespace txl::TXL_ISA
