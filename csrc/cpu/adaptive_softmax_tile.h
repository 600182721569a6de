// One cluster's tiles: where they stand in memory, and what both passes do with them.
#pragma once

#include <limits>

#include "arena.h"
#include "operand.h"
#include "pack.h"
#include "txl/adaptive_softmax.h"
#include "txl/gemm.h"

namespace txl::TXL_ISA {

// Tokens of one cluster as rows of hidden, zeros behind the last.
template <typename T>
struct TokenRows {
  const T* x;
  const int64_t* rows;
  int64_t d, n;

  explicit TokenRows(const ClusterArgs& args)
      : x(static_cast<const T*>(args.x)), rows(args.rows), d(args.d), n(args.n) {}

  RowRun<T> from(int64_t i) const {
    if (i >= n) return {nullptr, 0, kOpen};
    if (rows == nullptr) return {x + i * d, d, n - i};
    return {x + rows[i] * d, 0, 1};
  }
};

// Zeros behind the `n` columns of each row, so that products run over whole vectors.
template <typename W>
void clear_padding(W* matrix, int64_t rows, int64_t n, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    std::fill(matrix + r * ld + n, matrix + r * ld + round_up(n, 16), W(0));
}

// What the slots of a block share. Per token: arrays of `padded_block`.
template <typename T>
struct ClusterShared {
  int64_t ld_t, ld_d;          // leading dimensions of a row of tokens, of a row of d
  int64_t size_x_t, size_x_n;  // words of one tile in x_t and x_n
  Word<T>*x_t, *x_n;           // per token tile: [d, tile] and [tile, d]
  Operand<T>* stage;           // per token tile
  Operand<T>* held;            // per held and token tile: 2^(logit - its tile's maximum)
  Acc<T>* tile_max;            // [held tiles, padded_block], in units of log2 e as all here
  Acc<T>*slot_max, *slot_sum;  // [n_slots, padded_block]
  Acc<T>*max, *share, *logit;  // [padded_block]: of all columns, and scale / their sum

  ClusterShared(const ClusterArgs& args, const ClusterPlan& plan, Arena& arena) {
    const int64_t tokens = plan.padded_block(), tiles = plan.tiles_of(plan.block);
    ld_t = leading_dimension(plan.tile);
    ld_d = leading_dimension(args.d);
    size_x_t = row_words<T>(args.d) * ld_t;
    size_x_n = plan.tile / (kPacked<T> ? 2 : 1) * ld_d;
    x_t = arena.take<Word<T>>(tiles * size_x_t);
    x_n = arena.take<Word<T>>(tiles * size_x_n);
    stage = arena.take<Operand<T>>(tiles * 16 * row_length<T>(args.d));
    const int64_t held_tiles = plan.n_slots * plan.n_held;
    held = arena.take<Operand<T>>(held_tiles * plan.vocab_tile * tokens);
    tile_max = arena.take<Acc<T>>(held_tiles * tokens);
    slot_max = arena.take<Acc<T>>(plan.n_slots * tokens);
    slot_sum = arena.take<Acc<T>>(plan.n_slots * tokens);
    max = arena.take<Acc<T>>(tokens);
    share = arena.take<Acc<T>>(tokens);
    logit = arena.take<Acc<T>>(tokens);
  }
};

// What one slot works with.
template <typename T>
struct ClusterSlot {
  int64_t ld_d, ld_v;
  Acc<T>* logits;          // [vocab_tile, ld_t]
  Operand<T>* weight;      // [vocab_tile, row_length(d)], where products cannot read the caller's
  Word<T>* weight_rows;    // [vocab_tile, ld_d], or pairs of rows
  Operand<T>*g_t, *g;      // gradients of a tile of logits, [vocab_tile, ld_t] and [tile, ld_v]
  Acc<T>*dweight, *dbias;  // [vocab_tile, ld_d] and [vocab_tile, 16]
  Acc<T>*factor, *shift;   // [tile]
  Acc<T>* dx;              // [padded_block, ld_d]

  ClusterSlot(const ClusterArgs& args, const ClusterPlan& plan, const ClusterGrads& grads,
              Arena& arena) {
    const int64_t ld_t = leading_dimension(plan.tile), columns = plan.vocab_tile;
    ld_d = leading_dimension(args.d);
    ld_v = leading_dimension(columns);
    logits = arena.take<Acc<T>>(columns * ld_t);
    weight = arena.take<Operand<T>>(columns * row_length<T>(args.d));
    weight_rows = arena.take<Word<T>>(columns / (kPacked<T> ? 2 : 1) * ld_d);
    g_t = arena.take<Operand<T>>(columns * ld_t);
    g = arena.take<Operand<T>>(plan.tile * ld_v);
    dweight = arena.take<Acc<T>>(columns * ld_d);
    dbias = arena.take<Acc<T>>(columns * 16);
    factor = arena.take<Acc<T>>(plan.tile);
    shift = arena.take<Acc<T>>(plan.tile);
    dx = arena.take<Acc<T>>(grads.dx != nullptr ? plan.padded_block() * ld_d : 0);
  }
};

// Columns [begin, begin + n) of a cluster, and their weight: operands in rows of `ld`, a left-hand
// matrix if they are `multiplied`.
template <typename T>
struct VocabTile {
  int64_t index, begin, n;
  const Operand<T>* weight;
  int64_t ld;

  VocabTile(const ClusterArgs& args, const ClusterPlan& plan, int64_t index, bool multiplied,
            const ClusterSlot<T>& ws)
      : index(index), begin(index * plan.vocab_tile), n(std::min(plan.vocab_tile, args.V - begin)) {
    const T* rows = static_cast<const T*>(args.weight) + begin * args.d;
    ld = multiplied ? row_length<T>(args.d) : args.d;
    if constexpr (std::is_same_v<T, Operand<T>>) {
      if (ld == args.d) {
        weight = rows;
        return;
      }
    }
    for (int64_t v = 0; v < n; ++v) {
      convert_row(rows + v * args.d, ws.weight + v * ld, args.d);
      std::fill(ws.weight + v * ld + args.d, ws.weight + (v + 1) * ld, Operand<T>(0));
    }
    weight = ws.weight;
  }
};

// Tokens [begin, begin + n) of a cluster; `at`: where they stand in a block.
struct TokenTile {
  int64_t index, begin, n, at;

  TokenTile(const ClusterArgs& args, const ClusterPlan& plan, int64_t block, int64_t index)
      : index(index), begin(block * plan.block + index * plan.tile), at(index * plan.tile) {
    const int64_t end = std::min(args.n, (block + 1) * plan.block);
    n = std::clamp<int64_t>(end - begin, 0, plan.tile);
  }
};

inline int64_t token_tiles(const ClusterArgs& args, const ClusterPlan& plan, int64_t block) {
  return plan.tiles_of(std::min(plan.block, args.n - block * plan.block));
}

// logits[v, i] of a tile, without bias.
template <typename T>
void logits_product(const ClusterArgs& args, const ClusterPlan& plan, const VocabTile<T>& vocab,
                    const TokenTile& tokens, const ClusterShared<T>& shared, Acc<T>* logits) {
  gemm(vocab.n, plan.tile, row_length<T>(args.d), vocab.weight, vocab.ld,
       reinterpret_cast<const Operand<T>*>(shared.x_t + tokens.index * shared.size_x_t),
       shared.ld_t, logits, shared.ld_t, /*accumulate=*/false);
}

// Calls f(token within the tile, column within the tile) for tokens whose column is in the tile.
template <typename T, typename F>
void for_each_target(const ClusterArgs& args, const VocabTile<T>& vocab, const TokenTile& tokens,
                     F&& f) {
  if (args.columns == nullptr) return;
  for (int64_t i = 0; i < tokens.n; ++i) {
    const int64_t v = args.columns[tokens.begin + i] - vocab.begin;
    if (v >= 0 && v < vocab.n) f(i, v);
  }
}

}  // namespace txl::TXL_ISA
