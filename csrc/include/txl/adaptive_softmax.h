// Adaptive softmax on the CPU: the linear cross entropy of one cluster, cut into tiles of logits.
#pragma once

#include <cstdint>

#include "txl/rel_attention.h"

namespace txl {

// Logits are made in tiles of up to `kVocabTile` columns and `kTokenTile` tokens, transposed: a
// token's logits stand in a column.
constexpr int64_t kVocabTile = 64, kTokenTile = 256;
// What `adaptive_loss` holds between its two passes, at most: one chunk of a cluster's logits. (One
// token tile of 16 tokens is held whatever its size; and where several chunks would need more for
// the lower halves of a 16-bit weight's gradient, one larger chunk.)
constexpr int64_t kLogitsBytes = int64_t{24} << 20;

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
  uint16_t* dweight_low = nullptr;   // [V, d]: with several blocks and a 16-bit weight, the lower
                                     // halves of sums that go on
  void* dbias = nullptr;             // [V] in the accumulation type
};

// How a cluster is cut. Tokens: blocks, each with all its logits at once where gradients are formed
// in the forward pass; blocks: tiles, padded to `tile` columns. Vocabulary: tiles, dealt to slots
// in runs; a slot owns its columns' gradients and a partial sum of the hidden gradients, so that
// the result depends on the number of slots, never on timing.
struct ClusterPlan {
  int64_t block = 0, n_blocks = 0;  // tokens
  int64_t tile = 0;                 // tokens, a multiple of 16
  int64_t n_vocab_tiles = 0, n_slots = 0;

  int64_t tiles_of(int64_t tokens) const { return (tokens + tile - 1) / tile; }
  int64_t padded_block() const { return tiles_of(block) * tile; }
  // The vocabulary tiles of a slot: from this one to the next slot's.
  int64_t first_tile(int64_t slot) const { return slot * n_vocab_tiles / n_slots; }
};

// `held`: whether logits are held, as elements of this many bytes, or 0. `low_halves`:
// whether sums over several blocks need memory beside the weight's gradient.
ClusterPlan plan_cluster(const ClusterArgs& args, int64_t held, bool low_halves, int64_t threads);

// One dtype's kernels. `shared` and `slot` are memory of as many bytes as the first two say,
// 64-byte aligned. For each block: `pack` for every token tile, `logits` for every slot, `combine`;
// then `gradients` for every slot and `reduce` for every token tile. Calls of one kind run side by
// side.
struct ClusterKernels {
  int64_t operand_bytes;
  int64_t (*shared_bytes)(const ClusterArgs&, const ClusterPlan&, bool held);
  int64_t (*slot_bytes)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&);
  void (*pack)(const ClusterArgs&, const ClusterPlan&, bool held, int64_t block, int64_t tile,
               char* shared);
  void (*logits)(const ClusterArgs&, const ClusterPlan&, bool held, int64_t block, int64_t slot,
                 char* shared, char* slot_memory);
  void (*combine)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&, bool held,
                  int64_t block, char* shared);
  void (*gradients)(const ClusterArgs&, const ClusterPlan&, const ClusterTokens&,
                    const ClusterGrads&, bool held, int64_t block, int64_t slot, char* shared,
                    char* slot_memory);
  // `slots`: the slots' memory, `slot_stride` bytes apart.
  void (*reduce)(const ClusterArgs&, const ClusterPlan&, const ClusterGrads&, int64_t block,
                 int64_t tile, char* slots, int64_t slot_stride);
};

const ClusterKernels& adaptive_softmax_kernels(Scalar dtype);

}  // namespace txl
