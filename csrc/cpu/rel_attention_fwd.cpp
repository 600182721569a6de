// rel_attention forward on the CPU, for one instruction set.
//
// A chunk is computed unit by unit, a unit run by run, and a run block by block of keys: all query
// tiles of the run, of all query heads that share the keys, use a block while it is in the cache.
// For a tile of up to 64 queries, two products write the shifted scores into a score tile, a pass
// over its rows turns them into probabilities relative to a running maximum (online softmax, sums
// in float32), and a third product adds their products with the values to the output. The position
// table is packed (transposed) once per table, keys and values once per block and run. Values that
// only one tile uses, or whose rows are adjacent, are read from the caller's memory if products can
// read them there.
#include <utility>

#include "kernels.h"
#include "rel_attention_softmax.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {
namespace {

// A query tile with the running output, maximum and sum of each row.
template <typename T>
struct FwdTile {
  TileRows rows;
  Operand<T>*qu, *qv;
  Acc<T>*acc, *max, *sum;
};

template <typename T>
struct FwdWorkspace {
  int64_t ld_k, ld_v, ld_acc, q_size, q_pos_size;
  Panels<Word<T>> r_t;  // of the first table of a group
  int64_t table_size;   // from one table to the next
  Word<T>*k_t, *v;
  Operand<T>*queries, *probs, *stage;
  Acc<T>*accs, *maxima, *sums, *scores, *keep;

  FwdWorkspace(const RelAttentionArgs& args, const RelAttentionPlan& plan, Arena& arena) {
    const int64_t items = plan.run_items, key_block = plan.key_block;
    ld_k = leading_dimension(key_block + 16);
    ld_v = leading_dimension(args.Dv);
    ld_acc = round_up(args.Dv, 16);
    q_size = tile_size<T>(args.D), q_pos_size = tile_size<T>(args.Dp);
    k_t = arena.take<Word<T>>(row_words<T>(args.D) * ld_k);
    r_t = take_tables<Word<T>>(arena, args, plan, row_words<T>(args.Dp), &table_size);
    v = arena.take<Word<T>>(key_block / kRowsPerWord<T> * ld_v);
    queries = arena.take<Operand<T>>(items * (q_size + q_pos_size));
    accs = arena.take<Acc<T>>(items * kQueryTile * ld_acc);
    maxima = arena.take<Acc<T>>(items * kQueryTile);
    sums = arena.take<Acc<T>>(items * kQueryTile);
    probs = kPacked<T> ? arena.take<Operand<T>>(kQueryTile * kScoreLd) : nullptr;
    stage = arena.take<Operand<T>>(16 * row_length<T>(std::max({args.D, args.Dp, args.Dv})));
    scores = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    keep = arena.take<Acc<T>>(kKeyBlock + 16);
  }

  FwdTile<T> tile(TileRows rows, int64_t index) const {
    Operand<T>* q = queries + index * (q_size + q_pos_size);
    const int64_t row = index * kQueryTile;
    return {rows, q, q + q_size, accs + row * ld_acc, maxima + row, sums + row};
  }
};

// One row of one block: replaces masked scores by probabilities, updates the running maximum and
// sum.
template <typename T>
void softmax_row(const RelAttentionArgs& args, Acc<T> factor, Block block, const Acc<T>* keep,
                 Acc<T>* scores, Operand<T>* probs, Acc<T>* max, Acc<T>* sum, Acc<T>* acc) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const Acc<T> new_max = std::max(*max, factor * row_max(scores, block.padded));
  const Acc<T> shift = new_max == kNone ? 0 : new_max;
  const Acc<T> block_sum = exponentiate(scores, factor, shift, block.padded, probs);
  if (new_max > *max && *sum > 0) {
    const Acc<T> decay = std::exp(*max - new_max);
    *sum *= decay;
    scale_row(acc, decay, args.Dv);
  }
  *sum += block_sum;
  *max = new_max;
  if (keep != nullptr) {
    for (int64_t c = 0; c < block.padded; ++c) {
      if (keep[c] == 0) probs[c] = Operand<T>(0);
    }
  }
}

template <typename T>
void write_outputs(const RelAttentionArgs& args, int64_t b, int64_t h, const FwdTile<T>& tile,
                   int64_t ld_acc) {
  for (int64_t a = 0; a < tile.rows.count(); ++a)
    write_query<T>(args, b, h, tile.rows.begin + a, tile.max[a], tile.sum[a],
                   tile.acc + a * ld_acc);
}

// acc += probs · v, from the packed values or, if `values` is not null, from the caller's memory.
template <typename T>
void value_product(const RelAttentionArgs& args, const FwdTile<T>& tile, Block part, int64_t key,
                   const KeyRows<T>* values, const Operand<T>* probs, const FwdWorkspace<T>& ws) {
  if constexpr (kReadable<T>) {
    if (values != nullptr) {
      product_in_place<T>(tile.rows.height, args.Dv, *values, part.begin, part.padded, probs,
                          kScoreLd, ws.stage, tile.acc, ws.ld_acc);
      return;
    }
  }
  for_each_inner_piece(0, part.padded, [&](int64_t x, int64_t size) {
    const Word<T>* v = ws.v + (key + x) / kRowsPerWord<T> * ws.ld_v;
    gemm(tile.rows.height, args.Dv, size, probs + x, kScoreLd, operands<T>(v), ws.ld_v, tile.acc,
         ws.ld_acc, /*accumulate=*/true);
  });
}

template <typename T>
void load_tile(const RelAttentionArgs& args, int64_t b, int64_t h, const FwdTile<T>& tile,
               int64_t ld_acc) {
  const int64_t n_rows = tile.rows.count();
  load_queries<T>(args, b, h, tile.rows, tile.qu, tile.qv);
  std::fill(tile.acc, tile.acc + tile.rows.height * ld_acc, Acc<T>(0));
  std::fill(tile.max, tile.max + n_rows, -std::numeric_limits<Acc<T>>::infinity());
  std::fill(tile.sum, tile.sum + n_rows, Acc<T>(0));
}

// One tile against the part of a block to which it attends; `key`: the part's first packed column.
template <typename T>
void fwd_tile(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b, int64_t h,
              const FwdTile<T>& tile, Block part, int64_t key, const KeyRows<T>* values,
              Panels<Word<T>> r_t, const FwdWorkspace<T>& ws) {
  score_block<T>(args, plan, b, tile.rows, part, block_columns(args, plan, b, tile.rows, part),
                 tile.qu, tile.qv, ws.k_t + key, ws.ld_k, r_t, ws.scores);
  finish_scores<T>(args, b, h, tile.rows, part, ws.scores);
  Operand<T>* probs;
  if constexpr (kPacked<T>)
    probs = ws.probs;
  else
    probs = ws.scores;
  const Acc<T> factor = Factors<Acc<T>>(args).score;
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const Acc<T>* keep =
        args.dropout_p > 0 ? block_keep(args, b, h, tile.rows.begin + a, part, ws.keep) : nullptr;
    softmax_row<T>(args, factor, part, keep, ws.scores + a * kScoreLd, probs + a * kScoreLd,
                   tile.max + a, tile.sum + a, tile.acc + a * ws.ld_acc);
  }
  if constexpr (kPacked<T>) {
    for (int64_t a = tile.rows.count(); a < tile.rows.height; ++a)
      std::fill(probs + a * kScoreLd, probs + a * kScoreLd + part.padded, Operand<T>(0));
  }
  value_product<T>(args, tile, part, key, values, probs, ws);
}

// Items [first, stop) of one unit, counted from the unit's first.
template <typename T>
void fwd_unit(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t unit,
              int64_t first, int64_t stop, const FwdWorkspace<T>& ws) {
  const int64_t b = args.batch_of(unit), hk = args.key_head_of(unit);
  const KeyRows<T> keys(args, &KeyRun::k, b, hk), values(args, &KeyRun::v, b, hk);
  // Packing costs more than it saves if only one tile uses the values, or if their rows are
  // adjacent and many tiles use them. (Read in place with AVX-512: two tiles, D 128, 2% slower;
  // eight tiles, D 64, 1.5% faster. With AVX2 both are faster.)
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int64_t kMany = 4;
#else
  constexpr int64_t kMany = 2;
#endif
  const bool pays = stop - first == 1 || (stop - first >= kMany && values.adjacent(args.Dv));
  const bool in_place = kReadable<T> && pays && values.products_can_read(args.Dv);
  for_each_run(args, plan, b, first, stop, [&](int64_t begin, int64_t end, TileKeys seen) {
    auto head = [&](int64_t n) { return hk * plan.heads + plan.item(begin + n).head; };
    auto tile = [&](int64_t n) {
      return ws.tile(tile_rows(args, plan, plan.item(begin + n).tile), n);
    };
    const int64_t n_items = end - begin;
    for (int64_t n = 0; n < n_items; ++n) load_tile<T>(args, b, head(n), tile(n), ws.ld_acc);
    for_each_block(seen, [&](Block block) {
      bool packed = false;
      for (int64_t n = 0; n < n_items; ++n) {
        const Block part = seen_part(args, b, tile(n).rows, block);
        if (part.n == 0) continue;
        if (!std::exchange(packed, true)) {
          const int64_t block_end = block.begin + block.padded;
          pack_transposed<T>(keys, block.begin, block_end, args.D, ws.stage, ws.k_t, ws.ld_k);
          if (!in_place)
            pack_natural<T>(values, block.begin, block_end, args.Dv, ws.stage, ws.v, ws.ld_v);
        }
        fwd_tile<T>(args, plan, b, head(n), tile(n), part, part.begin - block.begin,
                    in_place ? &values : nullptr,
                    table_of(args, ws.r_t, ws.table_size, plan.item(begin + n).head), ws);
      }
    });
    for (int64_t n = 0; n < n_items; ++n) write_outputs<T>(args, b, head(n), tile(n), ws.ld_acc);
  });
}

template <typename T>
void fwd_chunk(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t chunk,
               char* workspace) {
  Arena arena(workspace);
  const FwdWorkspace<T> ws(args, plan, arena);
  const int64_t stop = plan.chunks[static_cast<size_t>(chunk + 1)], n_items = plan.unit_items();
  int64_t group = -1;
  for (int64_t item = plan.chunks[static_cast<size_t>(chunk)], next; item < stop; item = next) {
    const int64_t unit = item / n_items, before = unit * n_items;
    next = std::min(stop, before + n_items);
    if (args.group_of(unit) != group) {
      group = args.group_of(unit);
      for_each_table<T>(args, unit, [&](int64_t n, const TableRows<T>& table) {
        pack_table<T>(table, plan, args.Dp, ws.stage, table_of(args, ws.r_t, ws.table_size, n));
      });
    }
    fwd_unit<T>(args, plan, unit, item - before, next - before, ws);
  }
  gemm_release();
}

template <typename T>
int64_t fwd_workspace(const RelAttentionArgs& args, const RelAttentionPlan& plan) {
  Arena arena(nullptr);
  FwdWorkspace<T>(args, plan, arena);
  return arena.used();
}

template <typename T>
int64_t fwd_item_bytes(const RelAttentionArgs& args) {
  const auto operands =
      static_cast<int64_t>(sizeof(Operand<T>)) * (tile_size<T>(args.D) + tile_size<T>(args.Dp));
  return operands + static_cast<int64_t>(sizeof(Acc<T>)) * kQueryTile * (round_up(args.Dv, 16) + 2);
}

template <typename T>
constexpr FwdKernels kFwdKernels{fwd_item_bytes<T>, fwd_workspace<T>, fwd_chunk<T>};

}  // namespace

const FwdKernels fwd_kernels[4] = {kFwdKernels<float>, kFwdKernels<double>, kFwdKernels<Half>,
                                   kFwdKernels<BFloat16>};

}  // namespace txl::TXL_ISA
