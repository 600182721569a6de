// The tiles of one cluster: their memory, and the steps that both passes share.
#pragma once

#include <limits>

#include "arena.h"
#include "operand.h"
#include "pack.h"
#include "txl/adaptive_softmax.h"
#include "txl/gemm.h"

namespace txl::TXL_ISA {

// The type of the weight's gradient. float16 does not hold every gradient whose factor, such as a
// loss scale, comes later; bfloat16 has the range of float32.
template <typename T>
using Grad = std::conditional_t<std::is_same_v<T, Half>, float, T>;

// Tokens of one cluster as rows of hidden, zeros after the last.
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

// C[M, N] = A · B (+ C if `accumulate`), in pieces of columns. With AVX2 a product is slower while
// B does not fit into the second-level cache beside A and C: on an AMD EPYC (family 25 model 17, 1
// MiB), two threads, [64, 512]·[512, 256] runs at 206 GFLOP/s, and in pieces of 64 columns at 225.
// Wider vectors finish a piece so fast that the call's own time counts.
template <typename T>
void column_product(int64_t M, int64_t N, int64_t K, const Operand<T>* A, int64_t lda,
                    const Operand<T>* B, int64_t ldb, Acc<T>* C, int64_t ldc, bool accumulate) {
#if defined(CPU_CAPABILITY_AVX2)
  const int64_t widest = std::is_same_v<Operand<T>, float> ? 64 : N;
#else
  const int64_t widest = N;
#endif
  for (int64_t x = 0; x < N; x += widest) {
    gemm(M, std::min(widest, N - x), K, A, lda, B + x * kRowsPerWord<T>, ldb, C + x, ldc,
         accumulate);
  }
}

// Writes zeros after the `n` columns of each row, so that products run over whole vectors.
template <typename W>
void clear_padding(W* matrix, int64_t rows, int64_t n, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    std::fill(matrix + r * ld + n, matrix + r * ld + round_up(n, 16), W(0));
}

// Memory that all slots of a block share. Per token: arrays of `padded_block`.
template <typename T>
struct ClusterShared {
  int64_t ld_t, ld_d;          // leading dimensions of a row of tokens and of a row of d
  int64_t size_x_t, size_x_n;  // words of one tile in x_t and x_n
  Word<T>*x_t, *x_n;           // per token tile: [d, tile] and [tile, d]
  Operand<T>* stage;           // per token tile
  Operand<T>* held;            // per held and token tile: exp(logit - the tile's largest)
  Acc<T>* tile_max;            // [held tiles, padded_block]: the largest logit of a tile
  Acc<T>*slot_max, *slot_sum;  // [n_slots, padded_block]: of a slot, and Σ exp(logit - largest)
  Acc<T>*max, *share, *logit;  // [padded_block]: of all columns; scale / Σ; the target's

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

// Memory of one slot.
template <typename T>
struct ClusterSlot {
  int64_t ld_d, ld_v;
  Acc<T>* logits;          // [vocab_tile, ld_t]
  Operand<T>* weight;      // [vocab_tile, row_length(d)], if products cannot read the caller's
  Word<T>* weight_rows;    // [vocab_tile, ld_d], or pairs of rows
  Operand<T>*g_t, *g;      // gradients of a tile of logits, [vocab_tile, ld_t] and [tile, ld_v]
  Acc<T>*dweight, *dbias;  // [vocab_tile, ld_d] and [vocab_tile, 16]
  Acc<T>*max, *sum;        // [tile]: of one tile of logits
  Acc<T>* factor;          // [tile]
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
    max = arena.take<Acc<T>>(plan.tile);
    sum = arena.take<Acc<T>>(plan.tile);
    factor = arena.take<Acc<T>>(plan.tile);
    dx = arena.take<Acc<T>>(grads.dx != nullptr ? plan.padded_block() * ld_d : 0);
  }
};

// Columns [begin, begin + n) of a cluster, and their weight: operands in rows of `ld`, a left-hand
// matrix if they are `multiplied`. Products run over `rows` of it, a multiple of 16, so that their
// shapes are few; the rows after the last column are zeros.
template <typename T>
struct VocabTile {
  int64_t index, begin, n, rows;
  const Operand<T>* weight;
  int64_t ld;

  VocabTile(const ClusterArgs& args, const ClusterPlan& plan, int64_t index, bool multiplied,
            const ClusterSlot<T>& ws)
      : index(index),
        begin(index * plan.vocab_tile),
        n(std::min(plan.vocab_tile, args.V - begin)),
        rows(round_up(n, 16)) {
    const T* given = static_cast<const T*>(args.weight) + begin * args.d;
    ld = multiplied ? row_length<T>(args.d) : args.d;
    if constexpr (std::is_same_v<T, Operand<T>>) {
      if (!multiplied || (ld == args.d && rows == n)) {
        weight = given;
        return;
      }
    }
    for (int64_t v = 0; v < n; ++v) {
      convert_row(given + v * args.d, ws.weight + v * ld, args.d);
      std::fill(ws.weight + v * ld + args.d, ws.weight + (v + 1) * ld, Operand<T>(0));
    }
    std::fill(ws.weight + n * ld, ws.weight + rows * ld, Operand<T>(0));
    weight = ws.weight;
  }
};

// Tokens [begin, begin + n) of a cluster; `at` is the position of the first in its block.
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

// logits[v, i] of a tile, without bias; 0 in the rows after the last column.
template <typename T>
void logits_product(const ClusterArgs& args, const ClusterPlan& plan, const VocabTile<T>& vocab,
                    const TokenTile& tokens, const ClusterShared<T>& shared, Acc<T>* logits) {
  column_product<T>(
      vocab.rows, plan.tile, row_length<T>(args.d), vocab.weight, vocab.ld,
      reinterpret_cast<const Operand<T>*>(shared.x_t + tokens.index * shared.size_x_t), shared.ld_t,
      logits, shared.ld_t, /*accumulate=*/false);
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
