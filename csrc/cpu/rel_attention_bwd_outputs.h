// The scratch memory of the backward, and the functions that write its results.
//
// A chunk writes the query gradients of its tiles and the key gradients of units that it computes
// alone. Chunks that share a unit, a table of `r` or a head's bias write a slot each, and `finish`
// adds the slots in the order of chunks. Nothing is atomic, so timing changes no bit.
#pragma once

#include "rel_attention_tile.h"

namespace txl::TXL_ISA {

// Pairs of score-gradient rows for the position products: each row is joined with the next row,
// which is shifted by one key.
constexpr int64_t kPairLd = kScoreLd;
constexpr int64_t kPairSize = kScoreSlack + kQueryTile / 2 * (kPairLd + 2) + kScoreSlack;

// A query tile in the layouts that products read, and its accumulated gradients.
template <typename T>
struct BwdTile {
  TileRows rows;
  Operand<T>*qu, *qv, *dout, *qu_t, *qv_t, *dout_t;
  Acc<T>*dqu, *dqv, *delta;
};

// A ring of panels for `columns` adjacent columns.
template <typename W>
Panels<W> take_ring(Arena& arena, int64_t rows, int64_t columns) {
  const auto n = static_cast<int64_t>(
      std::bit_ceil(static_cast<uint64_t>(round_up(columns, kPanel) / kPanel)));
  return {arena.take<W>(n * rows * kPanelLd), rows, kPanelLd, n - 1};
}

template <typename T>
struct BwdWorkspace {
  int64_t ld_k, ld_row, ld_r, ld_acc, ld_acc_pos;
  // The position tables of the current group: the first one, and the distances between tables.
  Panels<Word<T>> r_t;
  Word<T>* r;
  Panels<Acc<T>> dr_t;
  int64_t r_t_size, r_size, dr_t_size;
  // A block of keys and values. The gradients are those of a block or, if a unit has several runs,
  // of all keys that earlier and later runs read.
  Word<T>*k_t, *v_t, *k;
  Panels<Acc<T>> dk_t, dv_t;
  // All items of a run, tile after tile.
  int64_t q_size, q_pos_size, o_size, acc_size, acc_pos_size;
  Operand<T>*queries, *douts;
  Acc<T>*dqueries, *deltas;
  // One tile against one block.
  Operand<T>* stage;
  Acc<T>*scores, *dprobs, *keep, *dbias;
  // Packed operands only: score gradients by row, and pairs of rows.
  Operand<T>*dscores, *probs_row;
  Word<T>*probs_pairs, *dscores_pairs, *shifted_pairs;

  BwdWorkspace(const RelAttentionArgs& args, const RelAttentionPlan& plan, Arena& arena) {
    const int64_t D = args.D, Dv = args.Dv, Dp = args.Dp, items = plan.run_items;
    ld_k = leading_dimension(plan.key_block + 16);
    ld_row = leading_dimension(D), ld_r = leading_dimension(Dp);
    ld_acc = round_up(D, 16), ld_acc_pos = round_up(Dp, 16);
    r_t = take_tables<Word<T>>(arena, args, plan, row_words<T>(Dp), &r_t_size);
    r_size = plan.n_columns / kRowsPerWord<T> * ld_r;
    r = arena.take<Word<T>>(args.tables_per_group() * r_size);
    dr_t = take_tables<Acc<T>>(arena, args, plan, Dp, &dr_t_size);
    k_t = arena.take<Word<T>>(row_words<T>(D) * ld_k);
    v_t = arena.take<Word<T>>(row_words<T>(Dv) * ld_k);
    k = arena.take<Word<T>>(plan.key_block / kRowsPerWord<T> * ld_row);
    if (plan.has_several_runs()) {
      dk_t = take_ring<Acc<T>>(arena, D, plan.live_keys + 32);
      dv_t = take_ring<Acc<T>>(arena, Dv, plan.live_keys + 32);
    } else {
      dk_t = {arena.take<Acc<T>>(D * ld_k), D, ld_k};
      dv_t = {arena.take<Acc<T>>(Dv * ld_k), Dv, ld_k};
    }
    q_size = tile_size<T>(D), q_pos_size = tile_size<T>(Dp), o_size = tile_size<T>(Dv);
    acc_size = kQueryTile * ld_acc, acc_pos_size = kQueryTile * ld_acc_pos;
    queries = arena.take<Operand<T>>(items * 2 * (q_size + q_pos_size));
    douts = arena.take<Operand<T>>(items * 2 * o_size);
    dqueries = arena.take<Acc<T>>(items * (acc_size + acc_pos_size));
    deltas = arena.take<Acc<T>>(items * kQueryTile);
    stage = arena.take<Operand<T>>(16 * row_length<T>(std::max({D, Dv, Dp})));
    scores = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    dprobs = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    keep = arena.take<Acc<T>>(kKeyBlock + 16);
    dbias = arena.take<Acc<T>>(bias_size(args));
    if constexpr (kPacked<T>) {
      dscores = arena.take<Operand<T>>(kScoreSize) + kScoreSlack;
      probs_row = arena.take<Operand<T>>(2 * kScoreLd);
      probs_pairs = arena.take<Word<T>>(kQueryTile / 2 * kKeyBlock);
      dscores_pairs = arena.take<Word<T>>(kQueryTile / 2 * kKeyBlock);
      shifted_pairs = arena.take<Word<T>>(kPairSize) + kScoreSlack;
    }
  }

  // Gradients of the biases of a unit's heads, [heads, D + Dp].
  static int64_t bias_size(const RelAttentionArgs& args) {
    return args.heads_per_key() * (args.D + args.Dp);
  }

  BwdTile<T> tile(TileRows rows, int64_t index) const {
    Operand<T>* q = queries + index * 2 * (q_size + q_pos_size);
    Operand<T>*q_t = q + q_size + q_pos_size, *o = douts + index * 2 * o_size;
    Acc<T>* dq = dqueries + index * (acc_size + acc_pos_size);
    return {rows,          q,
            q + q_size,    o,
            q_t,           q_t + q_size,
            o + o_size,    dq,
            dq + acc_size, deltas + index * kQueryTile};
  }
};

// dq = scale · dqu and dq_pos = pos_scale · dqv, or their sum in dq if the call has no q_pos.
// Column sums are the gradients of the biases; `dbias` [D + Dp] are those of the head.
template <typename T>
void write_dq(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
              const BwdTile<T>& tile, const BwdWorkspace<T>& ws, Acc<T>* dbias) {
  const auto scale = static_cast<Acc<T>>(args.scale), pos = static_cast<Acc<T>>(args.pos_scale);
  Acc<T> dq[kMaxHeadSize], dq_pos[kMaxHeadSize];
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const Acc<T>*dqu = tile.dqu + a * ws.ld_acc, *dqv = tile.dqv + a * ws.ld_acc_pos;
    for (int64_t d = 0; d < args.D; ++d) {
      dq[d] = scale * dqu[d];
      dbias[d] += dq[d];
    }
    for (int64_t d = 0; d < args.Dp; ++d) {
      dq_pos[d] = pos * dqv[d];
      dbias[args.D + d] += dq_pos[d];
    }
    if (!args.has_q_pos) {
      // One multiplication if the factors are equal: one rounding less.
      for (int64_t d = 0; d < args.D; ++d)
        dq[d] = scale == pos ? scale * (dqu[d] + dqv[d]) : dq[d] + dq_pos[d];
    }
    const int64_t row = (b * args.H + h) * args.Tq + tile.rows.begin + a;
    if (grads.dq != nullptr) convert_row(dq, static_cast<T*>(grads.dq) + row * args.D, args.D);
    if (grads.dq_pos != nullptr)
      convert_row(dq_pos, static_cast<T*>(grads.dq_pos) + row * args.Dp, args.Dp);
  }
}

// rows[x] = factor · accumulated[:, x] for x in [0, n_rows).
template <typename acc_t, typename To>
void write_transposed(const acc_t* accumulated, int64_t ld, int64_t n_rows, int64_t D, acc_t factor,
                      To* rows) {
  acc_t tile[16 * kMaxHeadSize];
  for (int64_t x = 0; x < n_rows; x += 16) {
    const int64_t n = std::min<int64_t>(16, n_rows - x);
    for (int64_t d = 0; d < D; d += 16)
      transpose_block(accumulated + d * ld + x, ld, tile + d, D, std::min<int64_t>(16, D - d), n);
    for (int64_t t = 0; t < n * D; ++t) tile[t] *= factor;
    convert_row(tile, rows + x * D, n * D);
  }
}

// Rows [begin, end) of `rows` = factor · the panels' columns from `column` on.
template <typename acc_t, typename To>
void write_panels(Panels<acc_t> panels, int64_t column, int64_t begin, int64_t end, acc_t factor,
                  To* rows) {
  const int64_t D = panels.rows;
  for (int64_t x = begin, stop; x < end; x = stop) {
    const int64_t at = column + x - begin;
    stop = std::min(end, x + kPanel - at % kPanel);
    write_transposed(panels.at(at), panels.ld, stop - x, D, factor, rows + x * D);
  }
}

// Calls f(accumulated, factor, begin, end, rows) for each destination of a unit's key and value
// gradients: the results, or a slot if other chunks share the unit. `rows` holds keys [begin, end).
template <typename T, typename F>
void for_each_key_output(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                         const RelAttentionPartials& partials, int64_t b, int64_t hk, int64_t slot,
                         const BwdWorkspace<T>& ws, F&& f) {
  const int64_t unit = b * args.Hk + hk;
  auto visit = [&](Panels<Acc<T>> acc, Acc<T> factor, void* const* results, void* parked) {
    const int64_t D = acc.rows;
    if (slot >= 0) {
      if (parked != nullptr)
        f(acc, factor, int64_t{0}, args.Tk, static_cast<Acc<T>*>(parked) + slot * args.Tk * D);
      return;
    }
    for (int n = 0; n < args.n_runs; ++n) {
      const KeyRun& run = args.runs[n];
      if (results[n] != nullptr)
        f(acc, factor, run.begin, run.begin + run.n,
          static_cast<T*>(results[n]) + unit * run.n * D);
    }
  };
  visit(ws.dk_t, Factors<Acc<T>>(args).gradient, grads.dk, partials.dk);
  visit(ws.dv_t, Acc<T>(1), grads.dv, partials.dv);
}

// The accumulated gradients of keys [span.begin, span.end); column 0 of the panels is key `origin`.
template <typename T>
void write_keys(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                const RelAttentionPartials& partials, int64_t b, int64_t hk, KeyRange span,
                int64_t origin, int64_t slot, const BwdWorkspace<T>& ws) {
  auto write = [&](Panels<Acc<T>> acc, Acc<T> factor, int64_t begin, int64_t end, auto* rows) {
    const int64_t lo = std::clamp(span.begin, begin, end), hi = std::clamp(span.end, lo, end);
    write_panels(acc, lo - origin, lo - begin, hi - begin, factor, rows);
  };
  for_each_key_output<T>(args, grads, partials, b, hk, slot, ws, write);
}

// Clears the gradients of keys [span.begin, span.end) in the destinations.
template <typename T>
void clear_keys(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                const RelAttentionPartials& partials, int64_t b, int64_t hk, KeyRange span,
                int64_t slot, const BwdWorkspace<T>& ws) {
  auto clear = [&](Panels<Acc<T>> acc, Acc<T>, int64_t begin, int64_t end, auto* rows) {
    const std::remove_reference_t<decltype(*rows)> zero(0);
    const int64_t lo = std::clamp(span.begin, begin, end), hi = std::clamp(span.end, lo, end);
    std::fill(rows + (lo - begin) * acc.rows, rows + (hi - begin) * acc.rows, zero);
  };
  for_each_key_output<T>(args, grads, partials, b, hk, slot, ws, clear);
}

// The gradients of a unit's keys, in ascending order: those before key `written_` are in their
// destinations, those from there to key `opened_` are sums in the workspace's panels.
template <typename T>
class KeyGradients {
 public:
  KeyGradients(const RelAttentionArgs& args, const RelAttentionGrads& grads,
               const RelAttentionPartials& partials, int64_t b, int64_t hk, int64_t slot,
               const BwdWorkspace<T>& ws)
      : args_(args), grads_(grads), partials_(partials), b_(b), hk_(hk), slot_(slot), ws_(ws) {}

  // The panels' column of a key.
  int64_t column(int64_t key) const { return key - origin_; }
  // Key `begin` is the panels' first column. All keys before it have been written.
  void restart(int64_t begin) { close(begin), origin_ = begin; }
  // Keys before `end`, a multiple of 16 from the panels' first, receive sums from now on.
  void open(int64_t end) {
    if (end <= opened_) return;
    auto clear = [](Acc<T>* row, int64_t n) { std::fill(row, row + n, Acc<T>(0)); };
    ws_.dk_t.for_each_row(column(opened_), column(end), clear);
    ws_.dv_t.for_each_row(column(opened_), column(end), clear);
    opened_ = end;
  }
  // Writes the keys before `end`, which receive no sums any more.
  void close(int64_t end) {
    const KeyRange sums{written_, std::min(end, opened_)}, zeros{opened_, end};
    if (sums.begin < sums.end)
      write_keys<T>(args_, grads_, partials_, b_, hk_, sums, origin_, slot_, ws_);
    if (zeros.begin < zeros.end)
      clear_keys<T>(args_, grads_, partials_, b_, hk_, zeros, slot_, ws_);
    written_ = std::max(written_, end), opened_ = std::max(opened_, end);
  }

 private:
  const RelAttentionArgs& args_;
  const RelAttentionGrads& grads_;
  const RelAttentionPartials& partials_;
  int64_t b_, hk_, slot_;
  const BwdWorkspace<T>& ws_;
  int64_t origin_ = -16, written_ = -16, opened_ = -16;  // blocks begin at -15 or later
};

// Writes the gradient of one table's rows [R, Dp]. With `clamp` the columns outside the table are
// added to its first and last row.
template <typename T>
void write_table(const RelAttentionArgs& args, const RelAttentionPlan& plan, Panels<Acc<T>> dr_t,
                 Acc<T>* dr) {
  const int64_t D = args.Dp, R = args.R;
  const Acc<T> factor = Factors<Acc<T>>(args).gradient;
  const int64_t begin = plan.column_begin + plan.packed_begin;
  const int64_t end = plan.column_begin + plan.packed_end;
  const int64_t lo = std::clamp(begin, int64_t{0}, R), hi = std::clamp(end, lo, R);
  std::fill(dr, dr + lo * D, Acc<T>(0));
  write_panels(dr_t, lo - plan.column_begin, lo, hi, factor, dr);
  std::fill(dr + hi * D, dr + R * D, Acc<T>(0));
  if (!args.clamp) return;
  auto fold = [&](int64_t first, int64_t last, Acc<T>* row) {
    for (int64_t d = 0; d < D; ++d) {
      Acc<T> sum = 0;
      for (int64_t m = first; m < last; ++m) sum += dr_t.at(m - plan.column_begin)[d * dr_t.ld];
      row[d] += factor * sum;
    }
  };
  fold(begin, std::min(end, int64_t{0}), dr);
  fold(std::max(begin, R), end, dr + (R - 1) * D);
}

// Writes the gradients of a group's tables to the chunk's slot.
template <typename T>
void write_tables(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                  const RelAttentionPartials& partials, int64_t slot, const BwdWorkspace<T>& ws) {
  if (partials.dr == nullptr) return;
  const int64_t n_tables = args.tables_per_group(), size = args.R * args.Dp;
  for (int64_t n = 0; n < n_tables; ++n) {
    write_table<T>(args, plan, table_of(args, ws.dr_t, ws.dr_t_size, n),
                   static_cast<Acc<T>*>(partials.dr) + (slot * n_tables + n) * size);
  }
}

// Calls f(chunk) for each chunk that computed items of [begin, end), in order.
template <typename F>
void for_each_chunk(const RelAttentionPlan& plan, int64_t begin, int64_t end, F&& f) {
  for (int64_t chunk = 0; chunk < plan.n_chunks(); ++chunk) {
    if (plan.chunks[static_cast<size_t>(chunk)] < end &&
        plan.chunks[static_cast<size_t>(chunk + 1)] > begin)
      f(chunk);
  }
}

// rows [n, D] of `to` = the sum of the slots' rows.
template <typename acc_t, typename To>
void sum_slots(const std::vector<const acc_t*>& slots, int64_t n, To* to) {
  constexpr int64_t kPiece = 1024;
  acc_t sum[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t size = std::min(kPiece, n - begin);
    std::copy(slots[0] + begin, slots[0] + begin + size, sum);
    for (size_t s = 1; s < slots.size(); ++s) {
      for (int64_t t = 0; t < size; ++t) sum[t] += slots[s][begin + t];
    }
    convert_row(sum, to + begin, size);
  }
}

template <typename T>
void finish_group(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                  const RelAttentionGrads& grads, const RelAttentionPartials& partials,
                  int64_t group) {
  if (grads.dr == nullptr) return;
  const int64_t items = args.n_units() / args.n_groups() * plan.unit_items();
  const int64_t size = args.tables_per_group() * args.R * args.Dp;
  std::vector<const Acc<T>*> slots;
  for_each_chunk(plan, group * items, (group + 1) * items, [&](int64_t chunk) {
    slots.push_back(static_cast<const Acc<T>*>(partials.dr) + (group + chunk) * size);
  });
  sum_slots(slots, size, static_cast<T*>(grads.dr) + group * size);
}

template <typename T>
void finish_unit(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                 const RelAttentionGrads& grads, const RelAttentionPartials& partials,
                 int64_t unit) {
  const int64_t begin = unit * plan.unit_items(), end = begin + plan.unit_items();
  auto sum = [&](void* parked, int64_t D, void* const* results) {
    std::vector<const Acc<T>*> slots;
    for_each_chunk(plan, begin, end, [&](int64_t chunk) {
      const int64_t first_unit = plan.chunks[static_cast<size_t>(chunk)] / plan.unit_items();
      slots.push_back(static_cast<const Acc<T>*>(parked) +
                      (2 * chunk + (unit != first_unit)) * args.Tk * D);
    });
    if (slots.size() < 2) return;  // one chunk computed the whole unit and wrote its gradients
    const int64_t index = args.batch_of(unit) * args.Hk + args.key_head_of(unit);
    for (int n = 0; n < args.n_runs; ++n) {
      const int64_t size = args.runs[n].n * D;
      if (results[n] != nullptr) sum_slots(slots, size, static_cast<T*>(results[n]) + index * size);
      for (const Acc<T>*& slot : slots) slot += size;
    }
  };
  if (partials.dk != nullptr) sum(partials.dk, args.D, grads.dk);
  if (partials.dv != nullptr) sum(partials.dv, args.Dv, grads.dv);
}

template <typename T>
void finish_head(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                 const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t h) {
  const int64_t heads = args.heads_per_key(), items = plan.unit_items(), size = args.D + args.Dp;
  std::vector<const Acc<T>*> slots;
  for (int64_t unit = 0; unit < args.n_units(); ++unit) {
    if (args.key_head_of(unit) != h / heads) continue;
    for_each_chunk(plan, unit * items, (unit + 1) * items, [&](int64_t chunk) {
      slots.push_back(static_cast<const Acc<T>*>(partials.dbias) +
                      ((unit + chunk) * heads + h % heads) * size);
    });
  }
  auto* du = static_cast<Acc<T>*>(grads.dr_w_bias);
  auto* dv = static_cast<Acc<T>*>(grads.dr_r_bias);
  if (du != nullptr) sum_slots(slots, args.D, du + h * args.D);
  for (const Acc<T>*& slot : slots) slot += args.D;
  if (dv != nullptr) sum_slots(slots, args.Dp, dv + h * args.Dp);
}

template <typename T>
void bwd_finish(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                const RelAttentionGrads& grads, const RelAttentionPartials& partials,
                int64_t item) {
  const int64_t groups = args.n_groups(), units = args.n_units();
  if (item < groups) {
    finish_group<T>(args, plan, grads, partials, item);
  } else if (item < groups + units) {
    finish_unit<T>(args, plan, grads, partials, item - groups);
  } else {
    finish_head<T>(args, plan, grads, partials, item - groups - units);
  }
}

}  // namespace txl::TXL_ISA
