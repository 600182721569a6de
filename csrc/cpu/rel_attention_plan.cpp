// The keys that a query attends to, and the division of rel_attention's work into tiles and chunks.
#include <algorithm>
#include <cmath>

#include "txl/rel_attention.h"

namespace txl {
namespace {

int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}
int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Several chunks for each thread even out unequal rows and the load of other processes. They are
// used only if every chunk has whole tables of `r` and all threads have equally many. Returns the
// largest such number of chunks (at most 8 per thread), otherwise `threads`.
int64_t chunks_of_whole_tables(int64_t n_tables, int64_t threads) {
  for (int64_t each = 8; each > 1 && threads > 1; --each) {
    if (n_tables % (each * threads) == 0) return each * threads;
  }
  return threads;
}

// Divides the items into at most `max_chunks` runs of about equal cost. A border between two pairs
// is preferred if one is near.
std::vector<int64_t> deal(const std::vector<int64_t>& cost_before, int64_t n_tiles,
                          int64_t max_chunks) {
  const int64_t n_items = static_cast<int64_t>(cost_before.size()) - 1;
  const int64_t n_chunks = std::max<int64_t>(1, std::min(max_chunks, n_items));
  const double share = static_cast<double>(cost_before.back()) / static_cast<double>(n_chunks);
  std::vector<int64_t> chunks{0};
  for (int64_t c = 1; c < n_chunks; ++c) {
    const double target = share * static_cast<double>(c);
    auto distance = [&](int64_t item) {
      return std::abs(static_cast<double>(cost_before[static_cast<size_t>(item)]) - target);
    };
    const auto after = std::lower_bound(cost_before.begin(), cost_before.end(), target);
    int64_t item = std::min<int64_t>(after - cost_before.begin(), n_items);
    const int64_t pair_begin = item / n_tiles * n_tiles;
    const int64_t pair_end = std::min(pair_begin + n_tiles, n_items);
    const int64_t border = distance(pair_begin) <= distance(pair_end) ? pair_begin : pair_end;
    if (distance(border) <= 0.03 * share) item = border;
    if (item > chunks.back() && item < n_items) chunks.push_back(item);
  }
  chunks.push_back(n_items);
  return chunks;
}

}  // namespace

KeyRange RelAttentionArgs::keys_of_row(int64_t b) const {
  return {key_start != nullptr ? key_start[b] : 0, key_lens != nullptr ? key_lens[b] : Tk()};
}

KeyRange RelAttentionArgs::keys_of(int64_t b, int64_t i) const {
  return rule.narrow(keys_of_row(b), i + Tk() - Tq);
}

TileKeys tile_keys(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                   int64_t row_begin, int64_t row_end) {
  const int64_t begin = args.keys_of(b, row_begin).begin;
  const int64_t end = args.keys_of(b, row_end - 1).end;
  if (begin >= end) return {0, 0, 0, 0};
  const int64_t aligned_begin = begin / 16 * 16;
  const int64_t n = end - aligned_begin;
  const int64_t n_blocks = ceil_div(n, plan.key_block);
  return {begin, end, aligned_begin, round_up(ceil_div(n, n_blocks), 64)};
}

RelAttentionPlan plan_rel_attention(const RelAttentionArgs& args, int64_t key_block,
                                    int64_t threads) {
  RelAttentionPlan plan;
  plan.key_block = key_block;
  plan.n_tiles = ceil_div(args.Tq, kQueryTile);
  plan.tile_rows = plan.n_tiles == 1 ? args.Tq : round_up(ceil_div(args.Tq, plan.n_tiles), 16);
  std::vector<int64_t> tile_cost(static_cast<size_t>(args.B * plan.n_tiles));
  bool any = false;
  for (int64_t b = 0; b < args.B; ++b) {
    for (int64_t tile = 0; tile < plan.n_tiles; ++tile) {
      const int64_t row_begin = tile * plan.tile_rows;
      const int64_t row_end = std::min(row_begin + plan.tile_rows, args.Tq);
      const TileKeys keys = tile_keys(args, plan, b, row_begin, row_end);
      tile_cost[static_cast<size_t>(b * plan.n_tiles + tile)] = keys.end - keys.begin + kQueryTile;
      if (keys.begin >= keys.end) continue;
      const int64_t height = plan.tile_height(row_end - row_begin);
      const int64_t e_first = keys.aligned_begin - (row_begin + height) + args.Tq;
      // Keys and columns are rounded up to multiples of 16 each.
      const int64_t e_last = keys.end + 32 - row_begin + args.Tq;
      plan.e_begin = any ? std::min(plan.e_begin, e_first) : e_first;
      plan.e_end = any ? std::max(plan.e_end, e_last) : e_last;
      any = true;
    }
  }
  // Every tile's first column is then a multiple of 16 from e_begin, and for keys and queries in
  // multiples of 64 a multiple of 64, so that its products are cut into large pieces.
  const int64_t phase = args.Tq - plan.tile_height(plan.tile_rows);
  plan.e_begin = phase + floor_div(plan.e_begin - phase, 64) * 64;
  plan.e_end = plan.e_begin + round_up(plan.e_end - plan.e_begin, 16);
  std::vector<int64_t> cost_before{0};
  for (int64_t pair = 0; pair < args.n_pairs(); ++pair) {
    for (int64_t tile = 0; tile < plan.n_tiles; ++tile) {
      const int64_t index = args.batch_of(pair) * plan.n_tiles + tile;
      cost_before.push_back(cost_before.back() + tile_cost[static_cast<size_t>(index)]);
    }
  }
  const int64_t spare = chunks_of_whole_tables(args.n_groups(), threads);
  if (spare > threads) {
    const int64_t items = static_cast<int64_t>(cost_before.size()) - 1;
    for (int64_t c = 0; c <= spare; ++c) plan.chunks.push_back(c * (items / spare));
  } else {
    plan.chunks = deal(cost_before, plan.n_tiles, threads);
  }
  return plan;
}

}  // namespace txl
