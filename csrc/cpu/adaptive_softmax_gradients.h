// The second pass over a cluster: gradients of its logits, tile by tile, and their two products.
#pragma once

#include <cstring>

#include "adaptive_softmax_logits.h"

namespace txl::TXL_ISA {

// Writes the gradients g = value(v, i) in both layouts, 16 logits of 16 tokens at a time; `dbias`
// collects each row's sum, spread over 16 elements. `rows` is a multiple of 16.
template <typename T, typename F>
void spread_gradients(int64_t rows, int64_t n, int64_t ld_t, const ClusterSlot<T>& ws, F&& value) {
  using Vec = Vectorized<Acc<T>>;
  alignas(64) Acc<T> square[256], transposed[256];
  for (int64_t v = 0; v < rows; v += 16) {
    for (int64_t i = 0; i < n; i += 16) {
      for (int64_t r = 0; r < 16; ++r) {
        for (int64_t c = 0; c < 16; c += Vec::size()) {
          const Vec g = value(v + r, i + c);
          g.store(square + r * 16 + c);
          store_operand(ws.g_t + (v + r) * ld_t + i + c, g);
          Acc<T>* sum = ws.dbias + (v + r) * 16 + c;
          (Vec::loadu(sum) + g).store(sum);
        }
      }
      transpose_16_rows(square, 16, transposed, 16, 16);
      for (int64_t c = 0; c < 16; ++c) {
        for (int64_t r = 0; r < 16; r += Vec::size())
          store_operand(ws.g + (i + c) * ws.ld_v + v + r, Vec::loadu(transposed + c * 16 + r));
      }
    }
  }
}

// g = scale · softmax of a tile's logits, zeros in the rows after its last column.
template <typename T>
void softmax_gradients(const ClusterArgs& args, const ClusterPlan& plan, int64_t slot,
                       const VocabTile<T>& vocab, const TokenTile& tokens,
                       const ClusterShared<T>& shared, const ClusterSlot<T>& ws) {
  using Vec = Vectorized<Acc<T>>;
  const Acc<T>*max = shared.max + tokens.at, *share = shared.share + tokens.at;
  if (plan.holds(slot, vocab.index)) {
    const int64_t tile = plan.held_index(slot, vocab.index);
    const int64_t at = tile * plan.padded_block() + tokens.at;
    const Operand<T>* powers = shared.held + at * plan.vocab_tile;
    for (int64_t i = 0; i < plan.tile; i += Vec::size()) {
      const Vec decay = exp_nonpositive(Vec::loadu(shared.tile_max + at + i) - Vec::loadu(max + i));
      (decay * Vec::loadu(share + i)).store(ws.factor + i);
    }
    spread_gradients(vocab.rows, plan.tile, shared.ld_t, ws, [&](int64_t v, int64_t i) {
      return load_operand(powers + v * plan.tile + i) * Vec::loadu(ws.factor + i);
    });
    return;
  }
  logits_product(args, plan, vocab, tokens, shared, ws.logits);
  for (int64_t v = vocab.n; v < vocab.rows; ++v)
    std::fill(ws.logits + v * shared.ld_t, ws.logits + v * shared.ld_t + plan.tile,
              -std::numeric_limits<Acc<T>>::infinity());
  const auto* bias = static_cast<const Acc<T>*>(args.bias);
  const Vec zero(0);
  spread_gradients(vocab.rows, plan.tile, shared.ld_t, ws, [&](int64_t v, int64_t i) {
    Vec x = Vec::loadu(ws.logits + v * shared.ld_t + i);
    if (bias != nullptr && v < vocab.n) x = x + Vec(bias[vocab.begin + v]);
    // Another number of threads may have rounded the forward pass's logits differently.
    const Vec below = at::vec::minimum(x - Vec::loadu(max + i), zero);
    return exp_nonpositive(below) * Vec::loadu(share + i);
  });
}

// The gradient of each target's own column: scale · (p - 1), rounded once.
template <typename T>
void target_gradients(const ClusterArgs& args, const VocabTile<T>& vocab, const TokenTile& tokens,
                      const ClusterTokens& given, const ClusterShared<T>& shared,
                      const ClusterSlot<T>& ws) {
  const auto *max = static_cast<const Acc<T>*>(given.max) + tokens.begin,
             *log_sum = static_cast<const Acc<T>*>(given.log_sum) + tokens.begin,
             *scale = static_cast<const Acc<T>*>(given.scale) + tokens.begin;
  const auto *held = static_cast<const Acc<T>*>(given.logit),
             *bias = static_cast<const Acc<T>*>(args.bias);
  for_each_target(args, vocab, tokens, [&](int64_t i, int64_t v) {
    const Acc<T> logit = held != nullptr ? held[tokens.begin + i]
                                         : ws.logits[v * shared.ld_t + i] +
                                               (bias != nullptr ? bias[vocab.begin + v] : 0);
    const Acc<T> log_p = std::min(logit - max[i], Acc<T>(0)) - log_sum[i];
    const auto g = static_cast<Operand<T>>(scale[i] * std::expm1(log_p));
    ws.g_t[v * shared.ld_t + i] = g;
    ws.g[i * ws.ld_v + v] = g;
    ws.dbias[v * 16 + i % 16] -= scale[i];  // the element that holds this token's scale · p
  });
}

// Adds a tile's gradient of the weight over one block of tokens to that of earlier blocks. While a
// bfloat16 gradient has blocks to come, its sum has 24 bits: the upper 16 in the gradient's own
// memory, the next 8 in `dweight_low`. That is 2^8 times finer than the final bfloat16.
template <typename T>
void add_weight_gradient(const ClusterArgs& args, const ClusterPlan& plan,
                         const ClusterGrads& grads, const VocabTile<T>& vocab, int64_t block,
                         const ClusterSlot<T>& ws) {
  const int64_t d = args.d;
  for (int64_t v = 0; v < vocab.n; ++v) {
    Acc<T>* __restrict row = ws.dweight + v * ws.ld_d;
    const int64_t at = (vocab.begin + v) * d;
    Grad<T>* __restrict out = static_cast<Grad<T>*>(grads.dweight) + at;
    if constexpr (std::is_same_v<Grad<T>, Acc<T>>) {
      for (int64_t k = 0; k < d; ++k) out[k] = block > 0 ? out[k] + row[k] : row[k];
    } else {
      uint8_t* __restrict low = plan.n_blocks > 1 ? grads.dweight_low + at : nullptr;
      if (block > 0) {
        for (int64_t k = 0; k < d; ++k) {
          const uint32_t bits = uint32_t{out[k].x} << 16 | uint32_t{low[k]} << 8;
          float before;
          std::memcpy(&before, &bits, sizeof(bits));
          row[k] += before;
        }
      }
      if (block + 1 == plan.n_blocks) {
        convert_row(row, out, d);
      } else {
        for (int64_t k = 0; k < d; ++k) {
          uint32_t bits;
          std::memcpy(&bits, row + k, sizeof(bits));
          bits += 0x80;
          out[k].x = static_cast<uint16_t>(bits >> 16);
          low[k] = static_cast<uint8_t>(bits >> 8);
        }
      }
    }
  }
}

// Packs the tile's weight as the right-hand matrix [rows, d] of the hidden gradient's product. A
// copy, because the caller's rows may begin anywhere in a cache line, or all on one cache set.
template <typename T>
const Operand<T>* pack_weight_rows(const ClusterArgs& args, const VocabTile<T>& vocab,
                                   const ClusterSlot<T>& ws) {
  if constexpr (kPacked<T>) {
    for (int64_t v = 0; v < vocab.rows; v += 2) {
      const BFloat16* even = vocab.weight + v * vocab.ld;
      Word<T>* pairs = ws.weight_rows + v / 2 * ws.ld_d;
      if (v + 1 < vocab.n) {
        interleave(even, even + vocab.ld, args.d, pairs);
      } else {
        auto* last = reinterpret_cast<BFloat16*>(pairs);
        for (int64_t k = 0; k < args.d; ++k)
          last[2 * k] = v < vocab.n ? even[k] : BFloat16(0), last[2 * k + 1] = 0;
      }
    }
  } else {
    for (int64_t v = 0; v < vocab.n; ++v)
      convert_row(vocab.weight + v * vocab.ld, ws.weight_rows + v * ws.ld_d, args.d);
    std::fill(ws.weight_rows + vocab.n * ws.ld_d, ws.weight_rows + vocab.rows * ws.ld_d,
              Operand<T>(0));
  }
  clear_padding(ws.weight_rows, row_words<T>(vocab.rows), args.d, ws.ld_d);
  return reinterpret_cast<const Operand<T>*>(ws.weight_rows);
}

// One slot's work on one block: the gradients of its columns, and its part of the hidden gradients.
template <typename T>
void cluster_gradients(const ClusterArgs& args, const ClusterPlan& plan, const ClusterTokens& given,
                       const ClusterGrads& grads, int64_t block, int64_t slot, char* memory,
                       char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const ClusterShared<T> shared(args, plan, arena);
  const ClusterSlot<T> ws(args, plan, grads, slot_arena);
  const int64_t tiles = token_tiles(args, plan, block), width = round_up(args.d, 16);
  const int64_t first = plan.first_tile(slot);
  for (int64_t index = first; index < plan.first_tile(slot + 1); ++index) {
    const VocabTile<T> vocab(args, plan, index, /*multiplied=*/!plan.holds(slot, index), ws);
    std::fill(ws.dbias, ws.dbias + plan.vocab_tile * 16, Acc<T>(0));
    const Operand<T>* weight_rows = nullptr;
    if (grads.dx != nullptr) weight_rows = pack_weight_rows<T>(args, vocab, ws);
    for (int64_t t = 0; t < tiles; ++t) {
      const TokenTile tokens(args, plan, block, t);
      softmax_gradients(args, plan, slot, vocab, tokens, shared, ws);
      target_gradients(args, vocab, tokens, given, shared, ws);
      if (grads.dweight != nullptr) {
        column_product<T>(vocab.rows, width, plan.tile, ws.g_t, shared.ld_t,
                          reinterpret_cast<const Operand<T>*>(shared.x_n + t * shared.size_x_n),
                          shared.ld_d, ws.dweight, ws.ld_d, t > 0);
      }
      if (grads.dx != nullptr) {
        column_product<T>(plan.tile, width, vocab.rows, ws.g, ws.ld_v, weight_rows, ws.ld_d,
                          ws.dx + tokens.at * ws.ld_d, ws.ld_d, index > first);
      }
    }
    if (grads.dweight != nullptr) add_weight_gradient(args, plan, grads, vocab, block, ws);
    if (grads.dbias != nullptr) {
      auto* dbias = static_cast<Acc<T>*>(grads.dbias) + vocab.begin;
      for (int64_t v = 0; v < vocab.n; ++v) {
        Acc<T> sum = 0;
        for (int64_t c = 0; c < 16; ++c) sum += ws.dbias[v * 16 + c];
        dbias[v] = block > 0 ? dbias[v] + sum : sum;
      }
    }
  }
  gemm_release();
}

// Sums the slots' parts of one token tile's hidden gradients, in the order of slots.
template <typename T>
void cluster_reduce(const ClusterArgs& args, const ClusterPlan& plan, const ClusterGrads& grads,
                    int64_t block, int64_t tile, char* slots, int64_t slot_stride) {
  const TokenTile tokens(args, plan, block, tile);
  auto* dx = static_cast<Acc<T>*>(grads.dx);
  for (int64_t slot = 0; slot < plan.n_slots; ++slot) {
    Arena arena(slots + slot * slot_stride);
    const ClusterSlot<T> ws(args, plan, grads, arena);
    const bool adds = slot > 0 || grads.dx_rows != nullptr;
    for (int64_t i = 0; i < tokens.n; ++i) {
      const int64_t token = tokens.begin + i;
      const Acc<T>* src = ws.dx + (tokens.at + i) * ws.ld_d;
      Acc<T>* dst = dx + (grads.dx_rows != nullptr ? grads.dx_rows[token] : token) * args.d;
      for (int64_t k = 0; k < args.d; ++k) dst[k] = adds ? dst[k] + src[k] : src[k];
    }
  }
}

}  // namespace txl::TXL_ISA
