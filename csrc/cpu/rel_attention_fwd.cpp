// rel_attention forward on the CPU, for one instruction set.
//
// One chunk walks its query tiles pair by pair. A tile of up to 64 queries meets its keys in blocks
// of up to 512: two products put the shifted scores into a tile that stays in cache, a row pass
// turns them into probabilities against a running maximum (online softmax, sums in float32), one
// product adds them to the output. Keys and the position table are packed transposed, once per pair
// and once per table; values are read where they stand if products can read their dtype.
#include "kernels.h"
#include "philox.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {
namespace {

template <typename T>
struct FwdWorkspace {
  int64_t ld_k, ld_r, ld_v, ld_acc;
  Word<T>*k_t, *r_t, *v;
  Operand<T>*qu, *qv, *probs, *stage;
  Acc<T>*scores, *acc, *max, *sum, *keep;

  FwdWorkspace(const RelAttentionArgs& args, const RelAttentionPlan& plan, Arena& arena) {
    const int64_t D = std::max(args.D, args.Dv);
    ld_k = leading_dimension(args.Tk() + 16);
    ld_r = leading_dimension(plan.n_columns());
    ld_v = leading_dimension(args.Dv);
    ld_acc = round_up(args.Dv, 16);
    k_t = arena.take<Word<T>>(row_words<T>(args.D) * ld_k);
    r_t = arena.take<Word<T>>(row_words<T>(args.D) * ld_r);
    v = arena.take<Word<T>>(round_up(args.Tk() + 16, 16) / (kPacked<T> ? 2 : 1) * ld_v);
    qu = arena.take<Operand<T>>(kQueryTile * row_length<T>(args.D));
    qv = arena.take<Operand<T>>(kQueryTile * row_length<T>(args.D));
    probs = kPacked<T> ? arena.take<Operand<T>>(kQueryTile * kScoreLd) : nullptr;
    stage = arena.take<Operand<T>>(16 * row_length<T>(D));
    scores = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    acc = arena.take<Acc<T>>(kQueryTile * ld_acc);
    max = arena.take<Acc<T>>(kQueryTile);
    sum = arena.take<Acc<T>>(kQueryTile);
    keep = arena.take<Acc<T>>(kKeyBlock);
  }
};

// probs[j] = 2^(scores[j] · factor - shift) for n scores; returns their sum. May work in place.
template <typename acc_t, typename operand_t>
acc_t exponentiate(const acc_t* scores, acc_t factor, acc_t shift, int64_t n, operand_t* probs) {
  using Vec = Vectorized<acc_t>;
  const Vec factor_vec(factor), minus_shift(-shift);
  Vec sum0(0), sum1(0);
  auto step = [&](int64_t j, Vec& sum) {
    const Vec p = exp2_nonpositive(at::vec::fmadd(Vec::loadu(scores + j), factor_vec, minus_shift));
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

// One row of one block: masked scores to probabilities, the running maximum and sum moved on.
template <typename T>
void softmax_row(const RelAttentionArgs& args, int64_t pair_bh, int64_t i, Block block, bool first,
                 Acc<T>* scores, Operand<T>* probs, Acc<T>* max, Acc<T>* sum, Acc<T>* acc,
                 Acc<T>* keep) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const auto factor = static_cast<Acc<T>>(exponent_factor(args));
  const Acc<T> new_max = std::max(*max, factor * row_max(scores, block.padded));
  const Acc<T> shift = new_max == kNone ? 0 : new_max;
  const Acc<T> block_sum = exponentiate(scores, factor, shift, block.padded, probs);
  if (!first && new_max > *max) {
    const Acc<T> decay = std::exp2(*max - new_max);
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
void write_outputs(const RelAttentionArgs& args, int64_t b, int64_t h, TileRows rows,
                   const FwdWorkspace<T>& ws) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  auto* lse = static_cast<Acc<T>*>(args.lse) + (b * args.H + h) * args.Tq + rows.begin;
  for (int64_t a = 0; a < rows.count(); ++a) {
    const bool dead = ws.sum[a] == 0;
    const Acc<T> kept = static_cast<Acc<T>>(1 - args.dropout_p);
    Acc<T>* acc = ws.acc + a * ws.ld_acc;
    if (dead) {
      std::fill(acc, acc + args.Dv, Acc<T>(0));
    } else {
      scale_row(acc, 1 / (kept * ws.sum[a]), args.Dv);
    }
    convert_row(acc, args.out.head<T>(b, h) + (rows.begin + a) * args.out.stride_t, args.Dv);
    // In double: the backward's probabilities are no better than this number.
    lse[a] = dead ? kNone : static_cast<Acc<T>>(kLn2 * (ws.max[a] + std::log2(double{ws.sum[a]})));
  }
}

// acc (+)= probs · v, from the packed values or, where `values` are given, from where they stand.
template <typename T>
void value_product(const RelAttentionArgs& args, TileRows rows, Block block, int64_t k_begin,
                   const KeyRows<T>* values, const Operand<T>* probs, bool first,
                   const FwdWorkspace<T>& ws) {
  if constexpr (kReadable<T>) {
    if (values != nullptr) {
      product_in_place<T>(rows.count(), args.Dv, *values, block.begin, block.begin + block.n, probs,
                          kScoreLd, ws.acc, ws.ld_acc, !first);
      return;
    }
  }
  const int64_t row = (block.begin - k_begin) / (kPacked<T> ? 2 : 1);
  gemm(rows.count(), args.Dv, row_length<T>(block.n), probs, kScoreLd,
       reinterpret_cast<const Operand<T>*>(ws.v + row * ws.ld_v), ws.ld_v, ws.acc, ws.ld_acc,
       !first);
}

template <typename T>
void fwd_tile(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b, int64_t h,
              TileRows rows, int64_t k_begin, const KeyRows<T>* values, const FwdWorkspace<T>& ws) {
  const int64_t ld_q = row_length<T>(args.D);
  load_queries<T>(args, b, h, rows, ws.qu, ws.qv, ld_q);
  std::fill(ws.max, ws.max + rows.count(), -std::numeric_limits<Acc<T>>::infinity());
  std::fill(ws.sum, ws.sum + rows.count(), Acc<T>(0));
  bool first = true;
  for_each_block(tile_keys(args, plan, b, rows.begin, rows.end), [&](Block block) {
    score_block<T>(rows, block, block_columns(args, plan, rows, block), args.D, ws.qu, ws.qv,
                   ws.k_t + (block.begin - k_begin), ws.ld_k, ws.r_t, ws.ld_r, ws.scores);
    finish_scores<T>(args, b, h, rows, block, ws.scores);
    Operand<T>* probs;
    if constexpr (kPacked<T>)
      probs = ws.probs;
    else
      probs = ws.scores;
    for (int64_t a = 0; a < rows.count(); ++a) {
      softmax_row<T>(args, b * args.H + h, rows.begin + a, block, first, ws.scores + a * kScoreLd,
                     probs + a * kScoreLd, ws.max + a, ws.sum + a, ws.acc + a * ws.ld_acc, ws.keep);
    }
    value_product<T>(args, rows, block, k_begin, values, probs, first, ws);
    first = false;
  });
  write_outputs<T>(args, b, h, rows, ws);
}

template <typename T>
void fwd_chunk(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t chunk,
               char* workspace) {
  Arena arena(workspace);
  const FwdWorkspace<T> ws(args, plan, arena);
  const int64_t stop = plan.chunks[static_cast<size_t>(chunk + 1)];
  int64_t group = -1;
  for (int64_t item = plan.chunks[static_cast<size_t>(chunk)]; item < stop;) {
    const int64_t pair = item / plan.n_tiles, b = args.batch_of(pair), h = args.head_of(pair);
    const int64_t last = std::min(stop, (pair + 1) * plan.n_tiles) - 1;
    const TileKeys keys = tile_keys(args, plan, b, tile_rows(args, plan, item % plan.n_tiles).begin,
                                    tile_rows(args, plan, last % plan.n_tiles).end);
    const int64_t k_begin = keys.aligned_begin, k_end = round_up(keys.end, 16);
    if (args.group_of(pair) != group) {
      group = args.group_of(pair);
      pack_transposed<T>(TableRows<T>(args, pair), plan.e_begin, plan.e_end, args.D, ws.stage,
                         ws.r_t, ws.ld_r);
    }
    pack_transposed<T>(KeyRows<T>(args, args.mem_k, args.k, b, h), k_begin, k_end, args.D, ws.stage,
                       ws.k_t, ws.ld_k);
    const KeyRows<T> values(args, args.mem_v, args.v, b, h);
    // Values that one tile alone reads are not worth a copy.
    const bool in_place = kReadable<T> && item == last;
    if (!in_place) pack_natural<T>(values, k_begin, k_end, args.Dv, ws.stage, ws.v, ws.ld_v);
    for (; item <= last; ++item) {
      fwd_tile<T>(args, plan, b, h, tile_rows(args, plan, item % plan.n_tiles), k_begin,
                  in_place ? &values : nullptr, ws);
    }
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
