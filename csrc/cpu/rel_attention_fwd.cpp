// rel_attention forward on the CPU, for one instruction set.
//
// A chunk is computed pair by pair, and a pair block by block of keys: all query tiles of the pair
// use a block while it is in the cache. For a tile of up to 64 queries, two products write the
// shifted scores into a score tile, a pass over its rows turns them into probabilities relative to
// a running maximum (online softmax, sums in float32), and a third product adds their products with
// the values to the output. The position table is packed (transposed) once per table, keys and
// values once per block. Values that only one tile uses, or whose rows are adjacent, are read from
// the caller's memory if products can read them there.
#include "kernels.h"
#include "philox.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {
namespace {

// A query tile with the running output, maximum and sum of each row.
template <typename T>
struct FwdTile {
  TileRows rows;
  Operand<T>*qu, *qv;
  Acc<T>*acc, *max, *sum;
};

template <typename T>
struct FwdWorkspace {
  int64_t ld_k, ld_v, ld_acc, q_size;
  TablePanels<Word<T>> r_t;
  Word<T>*k_t, *v;
  Operand<T>*queries, *probs, *stage;
  Acc<T>*accs, *maxima, *sums, *scores, *keep;

  FwdWorkspace(const RelAttentionArgs& args, const RelAttentionPlan& plan, Arena& arena) {
    const int64_t n_tiles = plan.n_tiles, key_block = plan.key_block;
    ld_k = leading_dimension(key_block + 16);
    ld_v = leading_dimension(args.Dv);
    ld_acc = round_up(args.Dv, 16);
    q_size = kQueryTile * round_up(row_length<T>(args.D), 16);
    k_t = arena.take<Word<T>>(row_words<T>(args.D) * ld_k);
    const int64_t words = row_words<T>(args.D);
    r_t = take_table<Word<T>>(arena, words, plan);
    v = arena.take<Word<T>>(key_block / kRowsPerWord<T> * ld_v);
    queries = arena.take<Operand<T>>(n_tiles * 2 * q_size);
    accs = arena.take<Acc<T>>(n_tiles * kQueryTile * ld_acc);
    maxima = arena.take<Acc<T>>(n_tiles * kQueryTile);
    sums = arena.take<Acc<T>>(n_tiles * kQueryTile);
    probs = kPacked<T> ? arena.take<Operand<T>>(kQueryTile * kScoreLd) : nullptr;
    stage = arena.take<Operand<T>>(16 * row_length<T>(std::max(args.D, args.Dv)));
    scores = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    keep = arena.take<Acc<T>>(kKeyBlock);
  }

  FwdTile<T> tile(TileRows rows, int64_t index) const {
    Operand<T>* q = queries + index * 2 * q_size;
    const int64_t row = index * kQueryTile;
    return {rows, q, q + q_size, accs + row * ld_acc, maxima + row, sums + row};
  }
};

// probs[j] = e^(scores[j] · factor - shift) for n scores; returns their sum. May work in place. The
// product is rounded before the subtraction, as `shift` was, so that no exponent is positive and
// the largest score's is exactly 0.
template <typename acc_t, typename operand_t>
acc_t exponentiate(const acc_t* scores, acc_t factor, acc_t shift, int64_t n, operand_t* probs) {
  using Vec = Vectorized<acc_t>;
  const Vec factor_vec(factor), shift_vec(shift);
  Vec sum0(0), sum1(0);
  auto step = [&](int64_t j, Vec& sum) {
    const Vec p = exp_nonpositive(Vec::loadu(scores + j) * factor_vec - shift_vec);
    sum = sum + p;
    store_operand(probs + j, p);
  };
  int64_t j = 0;
  for (; j + 2 * Vec::size() <= n; j += 2 * Vec::size()) {
    step(j, sum0);
    step(j + Vec::size(), sum1);
  }
  for (; j < n; j += Vec::size()) step(j, sum0);
  return sum_of(sum0 + sum1);
}

template <typename acc_t>
void scale_row(acc_t* row, acc_t factor, int64_t n) {
  for (int64_t d = 0; d < n; ++d) row[d] *= factor;
}

// One row of one block: replaces masked scores by probabilities, updates the running maximum and
// sum.
template <typename T>
void softmax_row(const RelAttentionArgs& args, int64_t pair_bh, int64_t i, Block block,
                 Acc<T>* scores, Operand<T>* probs, Acc<T>* max, Acc<T>* sum, Acc<T>* acc,
                 Acc<T>* keep) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const auto factor = score_factor<Acc<T>>(args);
  const Acc<T> new_max = std::max(*max, factor * row_max(scores, block.padded));
  const Acc<T> shift = new_max == kNone ? 0 : new_max;
  const Acc<T> block_sum = exponentiate(scores, factor, shift, block.padded, probs);
  if (new_max > *max && *sum > 0) {
    const Acc<T> decay = std::exp(*max - new_max);
    *sum *= decay;
    scale_row(acc, decay, args.Dv);
  }
  *sum += block_sum;
  *max = new_max;
  if (args.dropout_p > 0) {
    dropout_keep(args.dropout_seed, pair_bh, i, block.begin, block.padded,
                 dropout_threshold(args.dropout_p), keep);
    for (int64_t c = 0; c < block.padded; ++c) {
      if (keep[c] == 0) probs[c] = Operand<T>(0);
    }
  }
}

template <typename T>
void write_outputs(const RelAttentionArgs& args, int64_t b, int64_t h, const FwdTile<T>& tile,
                   int64_t ld_acc) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const int64_t begin = tile.rows.begin;
  auto* lse = static_cast<Acc<T>*>(args.lse) + (b * args.H + h) * args.Tq + begin;
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const bool dead = tile.sum[a] == 0;
    const Acc<T> kept = static_cast<Acc<T>>(1 - args.dropout_p);
    Acc<T>* acc = tile.acc + a * ld_acc;
    if (dead) {
      std::fill(acc, acc + args.Dv, Acc<T>(0));
    } else {
      scale_row(acc, 1 / (kept * tile.sum[a]), args.Dv);
    }
    convert_row(acc, args.out.head<T>(b, h) + (begin + a) * args.out.stride_t, args.Dv);
    // In double: the error of the backward's probabilities is at least that of lse.
    lse[a] = dead ? kNone : static_cast<Acc<T>>(tile.max[a] + std::log(double{tile.sum[a]}));
  }
}

// acc += probs · v, from the packed values or, if `values` is not null, from the caller's memory.
template <typename T>
void value_product(const RelAttentionArgs& args, const FwdTile<T>& tile, Block part, int64_t key,
                   const KeyRows<T>* values, const Operand<T>* probs, const FwdWorkspace<T>& ws) {
  if constexpr (kReadable<T>) {
    if (values != nullptr) {
      product_in_place<T>(tile.rows.height, args.Dv, *values, part.begin, part.padded, probs,
                          kScoreLd, ws.stage, tile.acc, ws.ld_acc);
      return;
    }
  }
  for_each_inner_piece(0, part.padded, [&](int64_t x, int64_t size) {
    const Word<T>* v = ws.v + (key + x) / kRowsPerWord<T> * ws.ld_v;
    gemm(tile.rows.height, args.Dv, size, probs + x, kScoreLd, operands<T>(v), ws.ld_v, tile.acc,
         ws.ld_acc, /*accumulate=*/true);
  });
}

template <typename T>
void load_tile(const RelAttentionArgs& args, int64_t b, int64_t h, const FwdTile<T>& tile,
               int64_t ld_acc) {
  const int64_t n_rows = tile.rows.count();
  load_queries<T>(args, b, h, tile.rows, tile.qu, tile.qv, row_length<T>(args.D));
  std::fill(tile.acc, tile.acc + tile.rows.height * ld_acc, Acc<T>(0));
  std::fill(tile.max, tile.max + n_rows, -std::numeric_limits<Acc<T>>::infinity());
  std::fill(tile.sum, tile.sum + n_rows, Acc<T>(0));
}

// One tile against the part of a block to which it attends; `key`: the part's first packed column.
template <typename T>
void fwd_tile(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b, int64_t h,
              const FwdTile<T>& tile, Block part, int64_t key, const KeyRows<T>* values,
              const FwdWorkspace<T>& ws) {
  score_block<T>(args, b, tile.rows, part, block_columns(args, plan, tile.rows, part), tile.qu,
                 tile.qv, ws.k_t + key, ws.ld_k, ws.r_t, ws.scores);
  finish_scores<T>(args, b, h, tile.rows, part, ws.scores);
  Operand<T>* probs;
  if constexpr (kPacked<T>)
    probs = ws.probs;
  else
    probs = ws.scores;
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    softmax_row<T>(args, b * args.H + h, tile.rows.begin + a, part, ws.scores + a * kScoreLd,
                   probs + a * kScoreLd, tile.max + a, tile.sum + a, tile.acc + a * ws.ld_acc,
                   ws.keep);
  }
  if constexpr (kPacked<T>) {
    for (int64_t a = tile.rows.count(); a < tile.rows.height; ++a)
      std::fill(probs + a * kScoreLd, probs + a * kScoreLd + part.padded, Operand<T>(0));
  }
  value_product<T>(args, tile, part, key, values, probs, ws);
}

// Items [first, last] of one pair: those of its query tiles that belong to this chunk.
template <typename T>
void fwd_pair(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t first,
              int64_t last, const FwdWorkspace<T>& ws) {
  const int64_t pair = first / plan.n_tiles, b = args.batch_of(pair), h = args.head_of(pair);
  auto tile = [&](int64_t item) {
    return ws.tile(tile_rows(args, plan, item % plan.n_tiles), item - first);
  };
  for (int64_t item = first; item <= last; ++item) load_tile<T>(args, b, h, tile(item), ws.ld_acc);
  const KeyRows<T> keys(args, args.mem_k, args.k, b, h), values(args, args.mem_v, args.v, b, h);
  // Packing costs more than it saves if only one tile uses the values, or if their rows are
  // adjacent and many tiles use them. (Read in place with AVX-512: two tiles, D 128, 2% slower;
  // eight tiles, D 64, 1.5% faster. With AVX2 both are faster.)
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int64_t kMany = 4;
#else
  constexpr int64_t kMany = 2;
#endif
  const bool pays = first == last || (last - first + 1 >= kMany && values.adjacent(args.Dv));
  const bool in_place = kReadable<T> && pays && values.products_can_read(args.Dv);
  const TileKeys seen = tile_keys(args, plan, b, tile(first).rows.begin, tile(last).rows.end);
  for_each_block(seen, [&](Block block) {
    const int64_t end = block.begin + block.padded;
    pack_transposed<T>(keys, block.begin, end, args.D, ws.stage, ws.k_t, ws.ld_k);
    if (!in_place) pack_natural<T>(values, block.begin, end, args.Dv, ws.stage, ws.v, ws.ld_v);
    for (int64_t item = first; item <= last; ++item) {
      const Block part = seen_part(args, b, tile(item).rows, block);
      if (part.n == 0) continue;
      fwd_tile<T>(args, plan, b, h, tile(item), part, part.begin - block.begin,
                  in_place ? &values : nullptr, ws);
    }
  });
  for (int64_t item = first; item <= last; ++item)
    write_outputs<T>(args, b, h, tile(item), ws.ld_acc);
}

template <typename T>
void fwd_chunk(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t chunk,
               char* workspace) {
  Arena arena(workspace);
  const FwdWorkspace<T> ws(args, plan, arena);
  const int64_t stop = plan.chunks[static_cast<size_t>(chunk + 1)];
  int64_t group = -1;
  for (int64_t item = plan.chunks[static_cast<size_t>(chunk)], next; item < stop; item = next) {
    const int64_t pair = item / plan.n_tiles;
    next = std::min(stop, (pair + 1) * plan.n_tiles);
    if (args.group_of(pair) != group) {
      group = args.group_of(pair);
      pack_table<T>(TableRows<T>(args, pair), plan, args.D, ws.stage, ws.r_t);
    }
    fwd_pair<T>(args, plan, item, next - 1, ws);
  }
  gemm_release();
}

template <typename T>
int64_t fwd_workspace(const RelAttentionArgs& args, const RelAttentionPlan& plan) {
  Arena arena(nullptr);
  FwdWorkspace<T>(args, plan, arena);
  return arena.used();
}

}  // namespace

const FwdKernels fwd_kernels[4] = {{fwd_workspace<float>, fwd_chunk<float>},
                                   {fwd_workspace<double>, fwd_chunk<double>},
                                   {fwd_workspace<Half>, fwd_chunk<Half>},
                                   {fwd_workspace<BFloat16>, fwd_chunk<BFloat16>}};

}  // namespace txl::TXL_ISA
