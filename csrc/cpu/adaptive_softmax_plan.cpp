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

}  // namespace

ClusterPlan plan_cluster(const ClusterArgs& args, int64_t held, bool low_halves, int64_t threads) {
  ClusterPlan plan;
  plan.n_vocab_tiles = ceil_div(args.V, kVocabTile);
  plan.n_slots = std::clamp<int64_t>(threads, 1, plan.n_vocab_tiles);
  // A token's row: its logits, or its part of each slot's hidden gradient.
  const int64_t row = held > 0 ? plan.n_vocab_tiles * kVocabTile * held
                               : plan.n_slots * args.d * static_cast<int64_t>(sizeof(float));
  int64_t most = std::max<int64_t>(16, kLogitsBytes / row / 16 * 16);
  // One block of everything, where that is less memory than the lower halves of several's sums.
  const int64_t low_bytes = args.V * args.d * static_cast<int64_t>(sizeof(uint16_t));
  if (low_halves && args.n * row <= kLogitsBytes + low_bytes) most = args.n;
  plan.n_blocks = std::max<int64_t>(1, ceil_div(args.n, most));
  const int64_t each = std::max<int64_t>(1, ceil_div(args.n, plan.n_blocks));
  const int64_t even = ceil_div(each, ceil_div(each, widest_tile(args.d)));
  plan.tile = std::min(round_tile(even), std::max(most, ceil_div(even, 16) * 16));
  plan.block = plan.n_blocks == 1 ? each : std::max(plan.tile, each / plan.tile * plan.tile);
  plan.n_blocks = std::max<int64_t>(1, ceil_div(args.n, plan.block));
  return plan;
}

}  // namespace txl
