// The first pass over a cluster: logits and their log-sum-exp. Differences of logits are computed
// in natural units, where they are exact near the largest one.
#pragma once

#include "adaptive_softmax_tile.h"

namespace txl::TXL_ISA {

// Packs one tile of tokens in both layouts: as the right-hand matrix of the logits' product, and of
// the product that gives the weight's gradient.
template <typename T>
void cluster_pack(const ClusterArgs& args, const ClusterPlan& plan, int64_t block, int64_t tile,
                  char* memory) {
  Arena arena(memory);
  const ClusterShared<T> shared(args, plan, arena);
  const TokenTile tokens(args, plan, block, tile);
  TokenRows<T> rows(args);
  rows.n = tokens.begin + tokens.n;
  const int64_t begin = tokens.begin, end = begin + plan.tile;
  Operand<T>* stage = shared.stage + tile * 16 * row_length<T>(args.d);
  pack_transposed<T>(rows, begin, end, args.d, stage, shared.x_t + tile * shared.size_x_t,
                     shared.ld_t);
  Word<T>* x_n = shared.x_n + tile * shared.size_x_n;
  pack_natural<T>(rows, begin, end, args.d, stage, x_n, shared.ld_d);
  clear_padding(x_n, shared.size_x_n / shared.ld_d, args.d, shared.ld_d);
}

// One tile of logits [rows, ld], a token per column: each column's maximum m and Σ exp(logit - m).
// Writes the powers to `held`, rows of `n` tokens, if that is given.
template <typename acc_t, typename operand_t>
void softmax_columns(const acc_t* logits, int64_t ld, int64_t rows, int64_t n, const acc_t* bias,
                     acc_t* max, acc_t* sum, operand_t* held) {
  using Vec = Vectorized<acc_t>;
  for (int64_t i = 0; i < n; i += Vec::size()) {
    auto logit = [&](int64_t v) {
      const Vec x = Vec::loadu(logits + v * ld + i);
      return bias != nullptr ? x + Vec(bias[v]) : x;
    };
    Vec m(std::numeric_limits<acc_t>::lowest());  // a column of -inf keeps a finite maximum
    for (int64_t v = 0; v < rows; ++v) m = at::vec::maximum(m, logit(v));
    Vec total(0);
    for (int64_t v = 0; v < rows; ++v) {
      const Vec p = exp_nonpositive(logit(v) - m);
      total = total + p;
      if (held != nullptr) store_operand(held + v * n + i, p);
    }
    m.store(max + i);
    total.store(sum + i);
  }
}

// Adds (max, sum) of one tile to those of a slot.
template <typename acc_t>
void merge_columns(const acc_t* max, const acc_t* sum, int64_t n, acc_t* slot_max,
                   acc_t* slot_sum) {
  using Vec = Vectorized<acc_t>;
  for (int64_t i = 0; i < n; i += Vec::size()) {
    const Vec here = Vec::loadu(max + i), before = Vec::loadu(slot_max + i);
    const Vec both = at::vec::maximum(here, before);
    const Vec total = Vec::loadu(sum + i) * exp_nonpositive(here - both) +
                      Vec::loadu(slot_sum + i) * exp_nonpositive(before - both);
    both.store(slot_max + i);
    total.store(slot_sum + i);
  }
}

template <typename T>
void cluster_logits(const ClusterArgs& args, const ClusterPlan& plan, int64_t block, int64_t slot,
                    char* memory, char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const ClusterShared<T> shared(args, plan, arena);
  const ClusterSlot<T> ws(args, plan, {}, slot_arena);
  const int64_t padded = plan.padded_block(), tiles = token_tiles(args, plan, block);
  Acc<T>*slot_max = shared.slot_max + slot * padded, *slot_sum = shared.slot_sum + slot * padded;
  std::fill(slot_max, slot_max + padded, std::numeric_limits<Acc<T>>::lowest());
  std::fill(slot_sum, slot_sum + padded, Acc<T>(0));
  const auto* all_bias = static_cast<const Acc<T>*>(args.bias);
  for (int64_t index = plan.first_tile(slot); index < plan.first_tile(slot + 1); ++index) {
    const VocabTile<T> vocab(args, plan, index, /*multiplied=*/true, ws);
    const Acc<T>* bias = all_bias != nullptr ? all_bias + vocab.begin : nullptr;
    for (int64_t t = 0; t < tiles; ++t) {
      const TokenTile tokens(args, plan, block, t);
      logits_product(args, plan, vocab, tokens, shared, ws.logits);
      for_each_target(args, vocab, tokens, [&](int64_t i, int64_t v) {
        const Acc<T> product = ws.logits[v * shared.ld_t + i];
        shared.logit[tokens.at + i] = bias != nullptr ? product + bias[v] : product;
      });
      Acc<T>* max = ws.max;
      Operand<T>* out = nullptr;
      if (plan.holds(slot, index)) {
        const int64_t tile = plan.held_index(slot, index);
        out = shared.held + (tile * padded + tokens.at) * plan.vocab_tile;
        max = shared.tile_max + tile * padded + tokens.at;
        std::fill(out + vocab.n * plan.tile, out + vocab.rows * plan.tile, Operand<T>(0));
      }
      softmax_columns(ws.logits, shared.ld_t, vocab.n, plan.tile, bias, max, ws.sum, out);
      merge_columns(max, ws.sum, plan.tile, slot_max + tokens.at, slot_sum + tokens.at);
    }
  }
  gemm_release();
}

// Every gradient of the tokens after the last is exactly 0, whatever the biases.
template <typename T>
void clear_shares(const ClusterPlan& plan, const ClusterShared<T>& shared) {
  const int64_t padded = plan.padded_block();
  std::fill(shared.max, shared.max + padded, std::numeric_limits<Acc<T>>::max());
  std::fill(shared.share, shared.share + padded, Acc<T>(0));
}

// Combines the maxima and sums of the slots to each token's log-sum-exp, in the order of slots, in
// double, since all results depend on this number. The gradients use the sum itself, which shares
// its rounding errors with them.
template <typename T>
void cluster_combine(const ClusterArgs& args, const ClusterPlan& plan, const ClusterTokens& out,
                     int64_t block, char* memory) {
  Arena arena(memory);
  const ClusterShared<T> shared(args, plan, arena);
  const int64_t padded = plan.padded_block(), begin = block * plan.block;
  const int64_t n = std::min(plan.block, args.n - begin);
  const auto* scale = static_cast<const Acc<T>*>(out.scale);
  clear_shares(plan, shared);
  for (int64_t i = 0; i < n; ++i) {
    Acc<T> max = shared.slot_max[i];
    for (int64_t s = 1; s < plan.n_slots; ++s) max = std::max(max, shared.slot_max[s * padded + i]);
    double sum = 0;
    for (int64_t s = 0; s < plan.n_slots; ++s) {
      sum += double{shared.slot_sum[s * padded + i]} *
             std::exp(double{shared.slot_max[s * padded + i]} - double{max});
    }
    shared.max[i] = max;
    if (scale != nullptr) shared.share[i] = static_cast<Acc<T>>(scale[begin + i] / sum);
    static_cast<Acc<T>*>(out.max)[begin + i] = max;
    static_cast<Acc<T>*>(out.log_sum)[begin + i] = static_cast<Acc<T>>(std::log(sum));
    if (args.columns != nullptr) static_cast<Acc<T>*>(out.logit)[begin + i] = shared.logit[i];
  }
}

// Restores the state that `cluster_combine` leaves, from the log-sum-exp of an earlier call.
template <typename T>
void cluster_restore(const ClusterArgs& args, const ClusterPlan& plan, const ClusterTokens& given,
                     int64_t block, char* memory) {
  Arena arena(memory);
  const ClusterShared<T> shared(args, plan, arena);
  const int64_t begin = block * plan.block, n = std::min(plan.block, args.n - begin);
  const auto *max = static_cast<const Acc<T>*>(given.max) + begin,
             *log_sum = static_cast<const Acc<T>*>(given.log_sum) + begin,
             *scale = static_cast<const Acc<T>*>(given.scale) + begin;
  clear_shares(plan, shared);
  for (int64_t i = 0; i < n; ++i) {
    shared.max[i] = max[i];
    shared.share[i] = static_cast<Acc<T>>(scale[i] * std::exp(-double{log_sum[i]}));
  }
}

}  // namespace txl::TXL_ISA
