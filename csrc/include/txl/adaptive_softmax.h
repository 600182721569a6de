// Adaptive softmax on the CPU: the linear cross entropy of one cluster, in tiles of logits.
#pragma once

#include <cstdint>

#include "txl/rel_attention.h"

namespace txl {

// Logits are computed in tiles of 64 or 128 columns and up to `kTokenTile` tokens, transposed: a
// column of a tile holds the logits of one token.
constexpr int64_t kTokenTile = 256;
// The most memory of a cluster's chunk: logits held between the two passes of `adaptive_loss`, the
// low bits of sums over several chunks beside a bfloat16 gradient, hidden rows in both layouts and
// the hidden gradients of each slot. It grows with d: each held logit saves a product of length d.
constexpr int64_t chunk_bytes(int64_t d) {
  return int64_t{42 << 10} * (d > 512 ? d : 512);
}

// One cluster: n tokens and V columns; n, V and d are at least 1.
struct ClusterArgs {
  int64_t n = 0, V = 0, d = 0;
  const void* x = nullptr;           // [·, d] hidden rows, projected; every array is contiguous
  const int64_t* rows = nullptr;     // [n]: token i is row rows[i] of x; null = row i
  const int64_t* columns = nullptr;  // [n]: each token's column, or null
  const void* weight = nullptr;      // [V, d]
  const void* bias = nullptr;        // [V] in the accumulation type, or null
};

// Per token, [n], in the accumulation type. The log-sum-exp of a token's logits has two parts, both
// written forward and read backward: where logits are large, their sum would round the second away.
struct ClusterTokens {
  void* max = nullptr;          // the largest logit
  void* log_sum = nullptr;      // log Σ exp(logit - max)
  void* logit = nullptr;        // the target's logit: written forward; null = recomputed
  const void* scale = nullptr;  // the gradient of the token's loss
};

// Gradients; null = not requested.
struct ClusterGrads {
  void* dx = nullptr;  // [·, d] in the accumulation type
  const int64_t* dx_rows =
      nullptr;                     // token i's is added to row dx_rows[i]; null = written to row i
  void* dweight = nullptr;         // [V, d] in the weight's dtype, float32 for float16
  uint8_t* dweight_low = nullptr;  // [V, d]: with several blocks and a bfloat16 weight, the next 8
                                   // bits of sums that are not complete
  void* dbias = nullptr;           // [V] in the accumulation type
};

// How a cluster is divided. Tokens: blocks, blocks into tiles, padded to `tile` columns.
// Vocabulary: tiles, dealt to slots in runs; a slot owns its columns' gradients and a partial sum
// of the hidden gradients, so that the result depends on the number of slots, never on timing. Of
// each slot's run, the first `n_held` tiles of a block's logits are held from the first pass to the
// second; the others are recomputed.
struct ClusterPlan {
  int64_t block = 0, n_blocks = 0;  // tokens
  int64_t tile = 0;                 // tokens, a multiple of 16
  int64_t vocab_tile = 0;           // columns, a multiple of 16
  int64_t n_vocab_tiles = 0, n_slots = 0, n_held = 0;

  int64_t tiles_of(int64_t tokens) const { return (tokens + tile - 1) / tile; }
  int64_t padded_block() const { return tiles_of(block) * tile; }
  // The vocabulary tiles of a slot: from this one to the next slot's.
  int64_t first_tile(int64_t slot) const { return slot * n_vocab_tiles / n_slots; }
  bool holds(int64_t slot, int64_t tile) const { return tile - first_tile(slot) < n_held; }
  int64_t held_index(int64_t slot, int64_t tile) const {
    return slot * n_held + tile - first_tile(slot);
  }
};

// One dtype's kernels. `shared` and `slot` are memory of the sizes that the first two return,
// 64-byte aligned. For each block: `pack` for every token tile; `logits` for every slot and
// `combine`, or `restore` where the log-sum-exp is known; then `gradients` for every slot and
// `reduce` for every token tile. Calls of one kind run side by side.
struct ClusterKernels {
  int64_t operand_bytes, acc_bytes;  // of an element of a product, of an element of a sum
  int64_t (*shared_bytes)(const ClusterArgs&, const ClusterPlan&);
  int64_t (*slot_bytes)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&);
  void (*pack)(const ClusterArgs&, const ClusterPlan&, int64_t block, int64_t tile, char* shared);
  void (*logits)(const ClusterArgs&, const ClusterPlan&, int64_t block, int64_t slot, char* shared,
                 char* slot_memory);
  void (*combine)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&, int64_t block,
                  char* shared);
  void (*restore)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&, int64_t block,
                  char* shared);
  void (*gradients)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&,
                    const ClusterGrads&, int64_t block, int64_t slot, char* shared,
                    char* slot_memory);
  // `slots`: the slots' memory, `slot_stride` bytes apart.
  void (*reduce)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&, int64_t block,
                 int64_t tile, char* slots, int64_t slot_stride);
};

const ClusterKernels& adaptive_softmax_kernels(Scalar dtype);

// `hold`: whether both passes follow each other, so that logits may be held. `low_bytes`: the
// memory that a sum over several blocks needs beside each element of the weight's gradient.
ClusterPlan plan_cluster(const ClusterArgs& args, const ClusterKernels& kernels, bool hold,
                         int64_t low_bytes, int64_t threads);

}  // namespace txl
