// How one cluster's work is cut into blocks and tiles of tokens, and slots of the vocabulary.
#include <algorithm>

#include "txl/adaptive_softmax.h"

namespace txl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Few distinct sizes: each is three micro-kernels to compile.
int64_t round_tile(int64_t tokens) {
  const int64_t step = tokens <= 64 ? 16 : tokens <= 128 ? 32 : 64;
  return ceil_div(tokens, step) * step;
}

// The most tokens whose rows, and the rows of their gradients, stay in a processor's second-level
// cache beside a tile of the weight.
int64_t widest_tile(int64_t d) {
  constexpr int64_t kCacheBytes = int64_t{1} << 19;
  const int64_t fit = kCacheBytes / (2 * d * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(fit / 64 * 64, 64, kTokenTile);
}

// A block reads the whole weight twice, and reads and writes its gradient's sums: with fewer tokens
// than these, that takes longer than making their logits again.
constexpr int64_t kLeastBlock = 96;

}  // namespace

ClusterPlan plan_cluster(const ClusterArgs& args, int64_t held_bytes, int64_t low_bytes,
                         int64_t threads) {
  ClusterPlan plan;
  plan.n_vocab_tiles = ceil_div(args.V, kVocabTile);
  plan.n_slots = std::clamp<int64_t>(threads, 1, plan.n_vocab_tiles);
  const int64_t slot_tiles = ceil_div(plan.n_vocab_tiles, plan.n_slots);
  // Of one token: its logits, in a tile of each slot; its row in both layouts, and its part of each
  // slot's hidden gradient.
  const int64_t tile_logits = plan.n_slots * kVocabTile * held_bytes;
  const int64_t rows = (plan.n_slots + 2) * args.d * static_cast<int64_t>(sizeof(float));
  const int64_t all = rows + slot_tiles * tile_logits, low = args.V * args.d * low_bytes;
  int64_t most = std::max<int64_t>(1, args.n);  // tokens of a block
  if (args.n * all > kChunkBytes) {
    const int64_t all_held = (kChunkBytes - low) / all;
    if (held_bytes > 0 && all_held >= kLeastBlock) {
      most = all_held / 16 * 16;
    } else if (args.n * rows > kChunkBytes / 2 + low) {
      most = std::max<int64_t>(16, kChunkBytes / 2 / rows / 16 * 16);
    }
  }
  plan.n_blocks = std::max<int64_t>(1, ceil_div(args.n, most));
  const int64_t each = std::max<int64_t>(1, ceil_div(args.n, plan.n_blocks));
  const int64_t even = ceil_div(each, ceil_div(each, widest_tile(args.d)));
  plan.tile = std::min(round_tile(even), std::max(most, ceil_div(even, 16) * 16));
  plan.block = plan.n_blocks == 1 ? each : std::max(plan.tile, each / plan.tile * plan.tile);
  plan.n_blocks = std::max<int64_t>(1, ceil_div(args.n, plan.block));
  if (held_bytes > 0) {
    const int64_t room =
        kChunkBytes - plan.padded_block() * rows - (plan.n_blocks > 1 ? low : int64_t{0});
    plan.n_held = std::clamp<int64_t>(room / (plan.padded_block() * tile_logits), 0, slot_tiles);
  }
  return plan;
}

}  // namespace txl
