// How one cluster's work is divided into blocks and tiles of tokens, and slots of the vocabulary.
#include <algorithm>

#include "txl/adaptive_softmax.h"
#include "txl/gemm.h"

namespace txl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Eight distinct sizes: for each, five micro-kernels are compiled and kept.
int64_t round_tile(int64_t tokens) {
  const int64_t step = tokens <= 64 ? 16 : tokens <= 128 ? 32 : 64;
  return ceil_div(tokens, step) * step;
}

// Tile registers multiply faster than the second-level cache delivers operands. Processors with
// tile registers have a large one, and larger tiles read less: the heads of wt103's models in
// bfloat16 take 12% less time.
bool large_tiles(const ClusterKernels& kernels) {
  return kernels.operand_bytes == 2 && packed_step() > 2;
}

// The most tokens whose rows, and the rows of their gradients, stay in a processor's second-level
// cache beside a tile of the weight.
int64_t widest_tile(int64_t d, bool large) {
  const int64_t cache_bytes = int64_t{1} << (large ? 20 : 19);
  const int64_t fit = cache_bytes / (2 * d * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(fit / 64 * 64, 64, kTokenTile);
}

// A block reads the whole weight twice, and reads and writes its gradient's sums: with fewer tokens
// than these, that takes longer than recomputing their logits.
constexpr int64_t kLeastBlock = 96;

}  // namespace

ClusterPlan plan_cluster(const ClusterArgs& args, const ClusterKernels& kernels, bool hold,
                         int64_t low_bytes, int64_t threads) {
  ClusterPlan plan;
  const bool large = large_tiles(kernels);
  plan.vocab_tile = large ? 128 : 64;
  plan.n_vocab_tiles = ceil_div(args.V, plan.vocab_tile);
  plan.n_slots = std::clamp<int64_t>(threads, 1, plan.n_vocab_tiles);
  const int64_t slot_tiles = ceil_div(plan.n_vocab_tiles, plan.n_slots);
  // Of one token: its row in both layouts and its part of each slot's hidden gradient; its logits
  // in a tile of each slot.
  const int64_t rows = args.d * (2 * kernels.operand_bytes + plan.n_slots * kernels.acc_bytes);
  const int64_t tile_logits = hold ? plan.n_slots * plan.vocab_tile * kernels.operand_bytes : 0;
  const int64_t chunk = chunk_bytes(args.d), low = args.V * args.d * low_bytes;
  const int64_t n = std::max<int64_t>(1, args.n);
  int64_t most = n;  // tokens of a block
  if (most * (rows + slot_tiles * tile_logits) > chunk) {
    const int64_t all_held = (chunk - low) / (rows + slot_tiles * tile_logits);
    if (hold && all_held >= kLeastBlock) {
      most = all_held;
    } else if (most * rows > chunk / 2 + low) {  // else one block: several would need more memory
      most = std::max<int64_t>(16, chunk / 2 / rows);
    }
  }
  const int64_t each = ceil_div(n, ceil_div(n, most));
  plan.tile = round_tile(ceil_div(each, ceil_div(each, widest_tile(args.d, large))));
  plan.block = n <= most ? each : plan.tiles_of(each) * plan.tile;
  plan.n_blocks = ceil_div(n, plan.block);
  if (hold) {
    const int64_t block = plan.padded_block(), sums = plan.n_blocks > 1 ? low : 0;
    plan.n_held =
        std::clamp<int64_t>((chunk - sums - block * rows) / (block * tile_logits), 0, slot_tiles);
  }
  return plan;
}

}  // namespace txl
