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

// Divides the items into at most `max_chunks` sequences of about equal cost. A border between two
// units is preferred if one is near.
std::vector<int64_t> deal(const std::vector<int64_t>& cost_before, int64_t unit_items,
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
    const int64_t unit_begin = item / unit_items * unit_items;
    const int64_t unit_end = std::min(unit_begin + unit_items, n_items);
    const int64_t border = distance(unit_begin) <= distance(unit_end) ? unit_begin : unit_end;
    if (distance(border) <= 0.03 * share) item = border;
    if (item > chunks.back() && item < n_items) chunks.push_back(item);
  }
  chunks.push_back(n_items);
  return chunks;
}

// The keys and the columns of the position table that each tile reads.
class TileSurvey {
 public:
  TileSurvey(const RelAttentionArgs& args, RelAttentionPlan& plan) : args_(args), plan_(plan) {
    keys_.reserve(static_cast<size_t>(args.B * plan.n_tiles));
    for (int64_t b = 0; b < args.B; ++b) {
      for (int64_t tile = 0; tile < plan.n_tiles; ++tile) visit(b, tile);
    }
    set_columns();
    set_run_tiles();
    if (plan.has_several_runs()) set_live_keys();
  }
  int64_t cost(int64_t b, int64_t tile) const {
    const KeyRange& keys = keys_of(b, tile);
    return keys.end - keys.begin + kQueryTile;
  }

 private:
  const KeyRange& keys_of(int64_t b, int64_t tile) const {
    return keys_[static_cast<size_t>(b * plan_.n_tiles + tile)];
  }

  void visit(int64_t b, int64_t tile) {
    const int64_t row_begin = tile * plan_.tile_rows;
    const int64_t row_end = std::min(row_begin + plan_.tile_rows, args_.Tq);
    const TileKeys keys = tile_keys(args_, plan_, b, row_begin, row_end);
    keys_.push_back({keys.begin, keys.end});
    if (keys.begin >= keys.end) return;
    const int64_t height = plan_.tile_height(row_end - row_begin), offset = args_.row_offset(b) + 1;
    const int64_t first = keys.aligned_begin - (row_begin + height) + offset;
    // Keys and columns are rounded up to multiples of 16 each.
    const int64_t last = keys.end + 32 - row_begin + offset;
    columns_ = {std::min(columns_.begin, first), std::max(columns_.end, last)};
    // A window on both sides of the query's own column leaves columns out.
    const int64_t same = args_.position(b) + args_.row_offset(b);
    read_ = {std::min(read_.begin, std::max(first, same - args_.rule.window_left - 15)),
             std::max(read_.end, std::min(last, same + args_.rule.window_right + 16))};
  }

  // Every tile's first column is a multiple of 16 from the first column, and for keys and queries
  // in multiples of 64 a multiple of 64, so that its products are cut into large pieces.
  void set_columns() {
    if (columns_.begin >= columns_.end) return;
    const int64_t phase = args_.row_offset(0) + 1 - plan_.tile_height(plan_.tile_rows);
    int64_t begin = phase + floor_div(columns_.begin - phase, 64) * 64, end = columns_.end;
    // Products skip pieces of columns without a row of `r`. The borders of pieces, and with them
    // the order of sums, do not depend on the number of panels that are left out here.
    if (!args_.clamp) {
      begin += std::max<int64_t>(0, floor_div(-kPiece - begin, kPanel)) * kPanel;
      end = std::min(end, args_.R + kPiece);
      read_ = read_.within(-kPiece, args_.R + kPiece);
    }
    plan_.column_begin = begin;
    plan_.n_columns = std::max<int64_t>(0, round_up(end - begin, 16));
    plan_.packed_begin =
        std::clamp(floor_div(read_.begin - begin, 16) * 16, int64_t{0}, plan_.n_columns);
    plan_.packed_end =
        std::clamp(round_up(read_.end - begin, 16), plan_.packed_begin, plan_.n_columns);
  }

  void set_run_tiles() {
    plan_.run_tiles = std::max<int64_t>(1, std::min(plan_.n_tiles, plan_.run_items / plan_.heads));
    if (args_.key_table == nullptr) return;
    // Documents in one row: a run of few tiles reads few documents, and its memory stays in the
    // cache.
    int64_t n_keys = 0;
    for (const KeyRange& keys : keys_) n_keys += keys.end - keys.begin;
    const int64_t mean = n_keys / static_cast<int64_t>(keys_.size());
    plan_.run_tiles = std::min(plan_.run_tiles, std::max<int64_t>(4, mean * 3 / 2 / kQueryTile));
  }

  void set_live_keys() {
    const int64_t n_runs = ceil_div(plan_.n_tiles, plan_.run_tiles);
    plan_.first_keys.assign(static_cast<size_t>(args_.B * n_runs), args_.Tk);
    for (int64_t b = 0; b < args_.B; ++b) {
      int64_t* first = plan_.first_keys.data() + b * n_runs;
      for (int64_t tile = plan_.n_tiles - 1, least = args_.Tk; tile >= 0; --tile) {
        const KeyRange& keys = keys_of(b, tile);
        if (keys.begin < keys.end) least = std::min(least, keys.begin);
        first[tile / plan_.run_tiles] = least;
      }
      for (int64_t tile = 0, end = 0; tile < plan_.n_tiles; ++tile) {
        end = std::max(end, keys_of(b, tile).end);
        plan_.live_keys = std::max(plan_.live_keys, end - first[tile / plan_.run_tiles]);
      }
    }
  }

  const RelAttentionArgs& args_;
  RelAttentionPlan& plan_;
  std::vector<KeyRange> keys_;
  // Rows of `r`, extended on both sides, that belong to some tile, and those that products read.
  static constexpr KeyRange kNone{INT64_MAX, INT64_MIN};
  KeyRange columns_ = kNone, read_ = kNone;
};

}  // namespace

int64_t RelAttentionArgs::row_offset(int64_t b) const {
  if (q_start == nullptr) return offset;
  return std::clamp(offset + (Tk - Tq) - q_start[b], -Tk, R + Tq);
}

int64_t RelAttentionArgs::aligned(int64_t b, int64_t j) const {
  return j - ((j - row_offset(0) + row_offset(b)) & 15);
}

KeyRange RelAttentionArgs::keys_of_row(int64_t b) const {
  return {key_start.stride_i == 0 ? key_start.of(b, 0, 0) : 0,
          key_lens.stride_i == 0 ? key_lens.of(b, 0, Tk) : Tk};
}

KeyRange RelAttentionArgs::keys_of(int64_t b, int64_t i) const {
  return rule.narrow({key_start.of(b, i, 0), key_lens.of(b, i, Tk)}, i + position(b));
}

KeyRange RelAttentionArgs::keys_of_rows(int64_t b, int64_t first, int64_t last) const {
  // Without a table both ends grow with the query.
  if (key_table == nullptr) return {keys_of(b, first).begin, keys_of(b, last - 1).end};
  const int64_t n_entries = ceil_div(Tq, kRangeRows);
  KeyRange all{Tk, 0};
  for (int64_t n = first / kRangeRows; n < ceil_div(last, kRangeRows); ++n) {
    const KeyRange entry = key_table[b * n_entries + n];
    all = {std::min(all.begin, entry.begin), std::max(all.end, entry.end)};
  }
  return all;
}

void fill_key_table(const RelAttentionArgs& args, KeyRange* table) {
  const int64_t n_entries = ceil_div(args.Tq, kRangeRows);
  for (int64_t b = 0; b < args.B; ++b) {
    for (int64_t n = 0; n < n_entries; ++n) {
      KeyRange all{args.Tk, 0};
      for (int64_t i = n * kRangeRows; i < std::min((n + 1) * kRangeRows, args.Tq); ++i) {
        const KeyRange keys = args.keys_of(b, i);
        if (keys.begin >= keys.end) continue;
        all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
      }
      table[b * n_entries + n] = all;
    }
  }
}

TileKeys tile_keys(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                   int64_t row_begin, int64_t row_end) {
  const auto [begin, end] = args.keys_of_rows(b, row_begin, row_end);
  if (begin >= end) return {0, 0, 0, 0};
  const int64_t aligned_begin = args.aligned(b, begin);
  const int64_t n = end - aligned_begin;
  const int64_t n_blocks = ceil_div(n, plan.key_block);
  return {begin, end, aligned_begin, round_up(ceil_div(n, n_blocks), 64)};
}

RelAttentionPlan plan_rel_attention(const RelAttentionArgs& args, int64_t key_block,
                                    int64_t item_bytes, int64_t threads) {
  RelAttentionPlan plan;
  plan.key_block = key_block;
  plan.heads = args.heads_per_key();
  plan.n_tiles = ceil_div(args.Tq, kQueryTile);
  plan.tile_rows = plan.n_tiles == 1 ? args.Tq : round_up(ceil_div(args.Tq, plan.n_tiles), 16);
  // Runs of more items pack keys more rarely, but need more scratch memory.
  constexpr int64_t kRunBytes = 4 << 20;
  plan.run_items =
      std::min(std::clamp<int64_t>(kRunBytes / item_bytes, 8, 64), plan.heads * plan.n_tiles);
  const TileSurvey survey(args, plan);
  const int64_t n_items = args.n_units() * plan.unit_items();
  const int64_t spare = chunks_of_whole_tables(args.n_groups(), threads);
  if (spare > threads) {
    for (int64_t c = 0; c <= spare; ++c) plan.chunks.push_back(c * (n_items / spare));
  } else if (threads == 1) {
    plan.chunks = {0, n_items};
  } else {
    std::vector<int64_t> cost_before{0};
    cost_before.reserve(static_cast<size_t>(n_items + 1));
    for (int64_t unit = 0; unit < args.n_units(); ++unit) {
      for (int64_t index = 0; index < plan.unit_items(); ++index) {
        cost_before.push_back(cost_before.back() +
                              survey.cost(args.batch_of(unit), plan.item(index).tile));
      }
    }
    plan.chunks = deal(cost_before, plan.unit_items(), threads);
  }
  return plan;
}

// With few rows of queries the packed products wait for memory; with many, packing pays.
// Seconds of the packed kernel / of the one for few queries, one thread of an AMD EPYC (family 25
// model 1, AVX2), 8 key heads of 64, 1,600 keys (8 heads of 128, 3,800 keys: within 0.2 of these):
//     queries                   1     2     4     8    12    16
//     float32                 2.1   2.0   1.8   1.4   1.5   1.2
//     float32, grouped by 8   3.1   2.3   2.2   1.3     -   0.9
//     bfloat16                2.4     -   1.9   1.5     -   0.8
//     float16                 5.3     -   2.5   1.6     -   1.2
//     float64                 2.0     -   1.2   0.9     -   0.5
// With 16 keys both take about the same time. Calls with dropout are training steps and stay
// packed.
bool has_few_queries(const RelAttentionArgs& args, Scalar dtype) {
  int64_t most = kFewQueries / 2;
  if (dtype == Scalar::f32 && args.heads_per_key() == 1) most = kFewQueries;
  if (dtype == Scalar::f64) most = kFewQueries / 4;
  return args.Tq <= most && args.dropout_p == 0 &&
         std::min({args.D, args.Dp, args.Dv}) >= kShortestRow;
}

FewQueryPlan plan_few_queries(const RelAttentionArgs& args) {
  constexpr int64_t kMostKeys = 256;
  KeyRange all{args.Tk, 0};
  for (int64_t b = 0; b < args.B; ++b) {
    const KeyRange keys = args.keys_of_rows(b, 0, args.Tq);
    if (keys.begin < keys.end) all = {std::min(all.begin, keys.begin), std::max(all.end, keys.end)};
  }
  FewQueryPlan plan;
  plan.first_key = all.begin / 16 * 16;
  const int64_t n = std::max<int64_t>(16, all.end - plan.first_key);
  plan.n_blocks = ceil_div(n, kMostKeys);
  plan.block_keys = round_up(ceil_div(n, plan.n_blocks), 16);
  return plan;
}

}  // namespace txl
