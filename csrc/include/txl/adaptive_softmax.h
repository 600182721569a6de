// Adaptive softmax on the CPU: the linear cross entropy of one cluster, cut into tiles of logits.
#pragma once

#include <cstdint>

#include "txl/rel_attention.h"

namespace txl {

// Logits are made in tiles of some columns and up to `kTokenTile` tokens, transposed: a token's
// logits stand in a column.
constexpr int64_t kTokenTile = 256;
// What a cluster's chunk takes at most: logits held between the two passes of `adaptive_loss`, what
// sums over several chunks need beside a 16-bit gradient, hidden rows in both layouts and hidden
// gradients of a slot's own. Wider rows get more: a byte of logits saves a product as long as they.
constexpr int64_t chunk_bytes(int64_t d) {
  return int64_t{42 << 10} * (d > 512 ? d : 512);
}

// One cluster: n of its tokens meet its V columns.
struct ClusterArgs {
  int64_t n = 0, V = 0, d = 0;
  const void* x = nullptr;           // [·, d] hidden rows, projected; contiguous, as all here
  const int64_t* rows = nullptr;     // [n]: token i is row rows[i] of x; null = row i
  const int64_t* columns = nullptr;  // [n]: each token's column, or null
  const void* weight = nullptr;      // [V, d]
  const void* bias = nullptr;        // [V] in the accumulation type, or null
};

// Per token, [n], in the accumulation type.
struct ClusterTokens {
  void* lse = nullptr;          // log-sum-exp of its logits in nats: written forward, read backward
  void* logit = nullptr;        // its column's logit: written forward; null = made again
  const void* scale = nullptr;  // the gradient of its loss
};

// Gradients; null = not wanted.
struct ClusterGrads {
  void* dx = nullptr;                // [·, d] in the accumulation type
  const int64_t* dx_rows = nullptr;  // token i's goes on top of row dx_rows[i]; null = into row i
  void* dweight = nullptr;           // [V, d] in the weight's dtype
  uint8_t* dweight_low = nullptr;    // [V, d]: with several blocks and a 16-bit weight, what sums
                                     // that go on have below the upper 16 bits of float32
  void* dbias = nullptr;             // [V] in the accumulation type
};

// How a cluster is cut. Tokens: blocks, blocks into tiles, padded to `tile` columns. Vocabulary:
// tiles, dealt to slots in runs; a slot owns its columns' gradients and a partial sum of the hidden
// gradients, so that the result depends on the number of slots, never on timing. Of each slot's
// run, the first `n_held` tiles of a block's logits are held from the first pass to the second; the
// others are made again.
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

// One dtype's kernels. `shared` and `slot` are memory of as many bytes as the first two say,
// 64-byte aligned. For each block: `pack` for every token tile, `logits` for every slot, `combine`;
// then `gradients` for every slot and `reduce` for every token tile. Calls of one kind run side by
// side.
struct ClusterKernels {
  int64_t operand_bytes, acc_bytes;  // of an element that products read, of one that sums
  int64_t (*shared_bytes)(const ClusterArgs&, const ClusterPlan&);
  int64_t (*slot_bytes)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&);
  void (*pack)(const ClusterArgs&, const ClusterPlan&, int64_t block, int64_t tile, char* shared);
  void (*logits)(const ClusterArgs&, const ClusterPlan&, int64_t block, int64_t slot, char* shared,
                 char* slot_memory);
  void (*combine)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&, int64_t block,
                  char* shared);
  void (*gradients)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&,
                    const ClusterGrads&, int64_t block, int64_t slot, char* shared,
                    char* slot_memory);
  // `slots`: the slots' memory, `slot_stride` bytes apart.
  void (*reduce)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&, int64_t block,
                 int64_t tile, char* slots, int64_t slot_stride);
};

const ClusterKernels& adaptive_softmax_kernels(Scalar dtype);

// `hold`: whether a block's logits are wanted twice. `low_bytes`: what a sum over several blocks
// needs beside each element of the weight's gradient.
ClusterPlan plan_cluster(const ClusterArgs& args, const ClusterKernels& kernels, bool hold,
                         int64_t low_bytes, int64_t threads);

}  // namespace txl
