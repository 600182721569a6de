// rel_attention forward on the CPU for few queries, for one instruction set.
//
// The keys of a unit are divided into blocks. For a block, the kernel multiplies all queries of the
// unit with the rows of `r` and with the keys where the caller has them: each row is loaded once
// for several queries. A query's position scores are written at the shifted index. The softmax of
// a block has a maximum and a sum of its own, and its products with the values are added up in
// float32 (float64). The results of a unit's blocks are merged in their order, so that the bits do
// not depend on the threads that computed them.
#include "few_row_products.h"
#include "kernels.h"
#include "rel_attention_softmax.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {
namespace {

// Columns before and after a row of scores: the position product writes keys that earlier or later
// queries attend to, and up to a group more.
constexpr int64_t kBefore = round_up(kFewQueries, 16), kAfter = kBefore + 16;

// The queries of a unit, numbered query head by query head, as vectors, and their scores.
template <typename T>
struct DecodeWorkspace {
  int64_t n_rows, ld_scores;
  RowVectors<Acc<T>> content, position;
  Operand<T>* operands;
  Acc<T>*qu, *qv, *scores, *edge;
  ScoredRow<Acc<T>>* scored;
  OutputRow<Acc<T>>* outputs;

  DecodeWorkspace(const RelAttentionArgs& args, const FewQueryPlan& plan, Arena& arena)
      : n_rows(args.heads_per_key() * args.Tq),
        ld_scores(kBefore + plan.block_keys + kAfter),
        content(args.D),
        position(args.Dp) {
    operands = arena.take<Operand<T>>(args.Tq * (row_length<T>(args.D) + row_length<T>(args.Dp)));
    qu = arena.take<Acc<T>>(n_rows * content.length());
    qv = arena.take<Acc<T>>(n_rows * position.length());
    scores = arena.take<Acc<T>>(n_rows * ld_scores) + kBefore;
    edge = arena.take<Acc<T>>(n_rows * kSums);
    scored = arena.take<ScoredRow<Acc<T>>>(n_rows);
    outputs = arena.take<OutputRow<Acc<T>>>(n_rows);
  }
  Acc<T>* scores_of(int64_t row) const { return scores + row * ld_scores; }
};

// The results of one block: for each row the largest score, the sum of e^(score - max), and the
// sums of their products with the values, as vectors.
template <typename T>
struct BlockResult {
  Acc<T>*max, *sum, *acc;

  // Null `base`: `used` becomes the number of bytes.
  BlockResult(const RelAttentionArgs& args, char* base, int64_t* used = nullptr) {
    const int64_t n_rows = args.heads_per_key() * args.Tq;
    Arena arena(base);
    max = arena.take<Acc<T>>(n_rows), sum = arena.take<Acc<T>>(n_rows);
    acc = arena.take<Acc<T>>(n_rows * RowVectors<Acc<T>>(args.Dv).length());
    if (used != nullptr) *used = arena.used();
  }
};

// Operands are rounded as those of the backward, whose probabilities must agree with lse.
template <typename T>
void load_rows(const RelAttentionArgs& args, int64_t b, int64_t hk, const DecodeWorkspace<T>& ws) {
  const int64_t ld_u = row_length<T>(args.D), ld_v = row_length<T>(args.Dp);
  Operand<T>*qu = ws.operands, *qv = qu + args.Tq * ld_u;
  auto widen = [](const Operand<T>* src, int64_t D, RowVectors<Acc<T>> vectors, Acc<T>* dst) {
    convert_row(src, dst, D);
    vectors.to_vectors(dst);
  };
  for (int64_t g = 0, row = 0; g < args.heads_per_key(); ++g) {
    load_queries<T>(args, b, hk * args.heads_per_key() + g, {0, args.Tq, args.Tq}, qu, qv);
    for (int64_t i = 0; i < args.Tq; ++i, ++row) {
      widen(qu + i * ld_u, args.D, ws.content, ws.qu + row * ws.content.length());
      widen(qv + i * ld_v, args.Dp, ws.position, ws.qv + row * ws.position.length());
    }
  }
}

// Writes the position scores of `keys` for rows [first, first + n), which read one table.
template <typename T>
void position_scores(const RelAttentionArgs& args, int64_t b, const TableRows<T>& table,
                     KeyRange keys, int64_t first, int64_t n, const DecodeWorkspace<T>& ws) {
  const int64_t offset = args.row_offset(b), n_keys = keys.end - keys.begin;
  const int64_t begin = std::max<int64_t>(0, keys.begin - (args.Tq - 1) + offset);
  const int64_t end = std::min(args.R, keys.end + offset);
  // The key, counted from the first one of the block, to which row m of `r` belongs.
  auto key_of = [&](int64_t row, int64_t m) { return m + row % args.Tq - offset - keys.begin; };
  auto product = [&](int64_t m_begin, int64_t m_end, auto&& scores) {
    for (int64_t row = first; row < first + n; ++row)
      ws.scored[row] = {ws.qv + row * ws.position.length(), scores(row)};
    score_rows<T>(ws.scored + first, n, table, m_begin, m_end, args.Dp, /*accumulate=*/false);
  };
  if (begin < end)
    product(begin, end, [&](int64_t row) { return ws.scores_of(row) + key_of(row, begin); });
  // Keys before the first and after the last row of `r`.
  auto fill = [&](int64_t m, auto&& part) {
    auto is_part = [&](int64_t row) { return part(row).begin < part(row).end; };
    if (!is_part(first) && !is_part(first + n - 1)) return;
    if (args.clamp) product(m, m + 1, [&](int64_t row) { return ws.edge + row * kSums; });
    for (int64_t row = first; row < first + n; ++row) {
      if (!is_part(row)) continue;
      const Acc<T> value = args.clamp ? ws.edge[row * kSums] : Acc<T>(0);
      std::fill(ws.scores_of(row) + part(row).begin, ws.scores_of(row) + part(row).end, value);
    }
  };
  fill(0, [&](int64_t row) { return KeyRange{0, std::clamp<int64_t>(key_of(row, 0), 0, n_keys)}; });
  fill(args.R - 1, [&](int64_t row) {
    return KeyRange{std::clamp<int64_t>(key_of(row, args.R), 0, n_keys), n_keys};
  });
}

template <typename T>
void score_keys(const RelAttentionArgs& args, int64_t b, int64_t hk, KeyRange keys,
                const DecodeWorkspace<T>& ws) {
  const int64_t n_tables = args.tables_per_group(), n = ws.n_rows / n_tables;
  for (int64_t t = 0; t < n_tables; ++t) {
    const TableRows<T> table(args, b, hk * args.heads_per_key() + t);
    position_scores<T>(args, b, table, keys, t * n, n, ws);
  }
  for (int64_t row = 0; row < ws.n_rows; ++row)
    ws.scored[row] = {ws.qu + row * ws.content.length(), ws.scores_of(row)};
  score_rows<T>(ws.scored, ws.n_rows, KeyRows<T>(args, &KeyRun::k, b, hk), keys.begin, keys.end,
                args.D, /*accumulate=*/true);
}

// Replaces the scores of one query by probabilities, and stores their maximum and sum.
template <typename T>
void softmax_row(const RelAttentionArgs& args, int64_t b, int64_t h, int64_t i, Block block,
                 Acc<T>* scores, Acc<T>* max, Acc<T>* sum) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const Factors<Acc<T>> factors(args);
  if (args.softcap > 0) cap_row(factors.base, args.softcap, scores, block.padded);
  mask_row(args, b, h, i, block, scores);
  // The query may attend to keys after the block.
  std::fill(scores + block.n, scores + block.padded, kNone);
  *max = factors.score * row_max(scores, block.padded);
  const Acc<T> shift = *max == kNone ? 0 : *max;
  *sum = exponentiate(scores, factors.score, shift, block.padded, scores);
}

template <typename T>
void decode_block(const RelAttentionArgs& args, const FewQueryPlan& plan, int64_t unit,
                  int64_t block, char* workspace, char* result_memory) {
  const int64_t b = args.batch_of(unit), hk = args.key_head_of(unit);
  const BlockResult<T> result(args, result_memory);
  const KeyRange keys = plan.keys_of(args, b, block);
  const int64_t n_rows = args.heads_per_key() * args.Tq;
  if (keys.begin >= keys.end) {
    std::fill(result.sum, result.sum + n_rows, Acc<T>(0));
    return;
  }
  Arena arena(workspace);
  const DecodeWorkspace<T> ws(args, plan, arena);
  load_rows<T>(args, b, hk, ws);
  score_keys<T>(args, b, hk, keys, ws);
  const int64_t n = keys.end - keys.begin, length = RowVectors<Acc<T>>(args.Dv).length();
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t h = hk * args.heads_per_key() + row / args.Tq;
    softmax_row<T>(args, b, h, row % args.Tq, {keys.begin, n, round_up(n, 16)}, ws.scores_of(row),
                   result.max + row, result.sum + row);
    ws.outputs[row] = {ws.scores_of(row), result.acc + row * length};
  }
  std::fill(result.acc, result.acc + n_rows * length, Acc<T>(0));
  add_products<T>(ws.outputs, n_rows, KeyRows<T>(args, &KeyRun::v, b, hk), keys.begin, keys.end,
                  args.Dv);
}

// Merges the results of a unit's blocks, `size` bytes each, and writes its outputs.
template <typename T>
void merge_blocks(const RelAttentionArgs& args, const FewQueryPlan& plan, int64_t unit,
                  char* results, int64_t size) {
  const RowVectors<Acc<T>> vectors(args.Dv);
  const int64_t length = vectors.length();
  alignas(64) Acc<T> acc[kMaxHeadSize + RowVectors<Acc<T>>::kSize];
  for (int64_t row = 0; row < args.heads_per_key() * args.Tq; ++row) {
    auto for_each = [&](auto&& f) {
      for (int64_t n = 0; n < plan.n_blocks; ++n) {
        const BlockResult<T> result(args, results + n * size);
        if (result.sum[row] != 0) f(result.max[row], result.sum[row], result.acc + row * length);
      }
    };
    Acc<T> max = -std::numeric_limits<Acc<T>>::infinity(), sum = 0;
    for_each([&](Acc<T> block_max, Acc<T>, const Acc<T>*) { max = std::max(max, block_max); });
    std::fill(acc, acc + length, Acc<T>(0));
    for_each([&](Acc<T> block_max, Acc<T> block_sum, const Acc<T>* products) {
      const Acc<T> weight = std::exp(block_max - max);
      sum += weight * block_sum;
      for (int64_t d = 0; d < length; ++d) acc[d] += weight * products[d];
    });
    vectors.from_vectors(acc);
    const int64_t h = args.key_head_of(unit) * args.heads_per_key() + row / args.Tq;
    write_query<T>(args, args.batch_of(unit), h, row % args.Tq, max, sum, acc);
  }
}

template <typename T>
int64_t decode_workspace(const RelAttentionArgs& args, const FewQueryPlan& plan) {
  Arena arena(nullptr);
  DecodeWorkspace<T>(args, plan, arena);
  return arena.used();
}

template <typename T>
int64_t decode_result_size(const RelAttentionArgs& args) {
  int64_t used;
  BlockResult<T>(args, nullptr, &used);
  return used;
}

template <typename T>
constexpr FewQueryKernels kDecodeKernels{decode_workspace<T>, decode_result_size<T>,
                                         decode_block<T>, merge_blocks<T>};

}  // namespace

const FewQueryKernels few_query_kernels[4] = {kDecodeKernels<float>, kDecodeKernels<double>,
                                              kDecodeKernels<Half>, kDecodeKernels<BFloat16>};

}  // namespace txl::TXL_ISA
