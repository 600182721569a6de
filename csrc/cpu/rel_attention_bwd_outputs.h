// The scratch memory of the backward, and the functions that write its results.
//
// A chunk writes the query gradients of its tiles and the key gradients of pairs that it computes
// alone. Chunks that share a pair, a table of `r` or a head's bias write a slot each, and `finish`
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

template <typename T>
struct BwdWorkspace {
  int64_t ld_k, ld_row, ld_acc;
  // The position table of the current pairs.
  TablePanels<Word<T>> r_t;
  Word<T>* r;
  TablePanels<Acc<T>> dr_t;
  // A block of keys and values.
  Word<T>*k_t, *v_t, *k;
  Acc<T>*dk_t, *dv_t;
  // All query tiles of a pair, tile after tile.
  int64_t q_size, o_size, acc_size;
  Operand<T>*queries, *douts;
  Acc<T>*dqueries, *deltas;
  // One tile against one block.
  Operand<T>* stage;
  Acc<T>*scores, *dprobs, *keep, *dbias;
  // Packed operands only: score gradients by row, and pairs of rows.
  Operand<T>*dscores, *probs_row;
  Word<T>*probs_pairs, *dscores_pairs, *shifted_pairs;

  BwdWorkspace(const RelAttentionArgs& args, const RelAttentionPlan& plan, Arena& arena) {
    const int64_t D = args.D, Dv = args.Dv, n_e = plan.n_columns(), n_tiles = plan.n_tiles;
    ld_k = leading_dimension(plan.key_block + 16);
    ld_row = leading_dimension(D);
    ld_acc = round_up(D, 16);
    r_t = take_table<Word<T>>(arena, row_words<T>(D), plan);
    r = arena.take<Word<T>>(n_e / kRowsPerWord<T> * ld_row);
    dr_t = take_table<Acc<T>>(arena, D, plan);
    k_t = arena.take<Word<T>>(row_words<T>(D) * ld_k);
    v_t = arena.take<Word<T>>(row_words<T>(Dv) * ld_k);
    k = arena.take<Word<T>>(plan.key_block / kRowsPerWord<T> * ld_row);
    dk_t = arena.take<Acc<T>>(D * ld_k);
    dv_t = arena.take<Acc<T>>(Dv * ld_k);
    q_size = kQueryTile * round_up(row_length<T>(D), 16);
    o_size = kQueryTile * round_up(row_length<T>(Dv), 16);
    acc_size = kQueryTile * ld_acc;
    queries = arena.take<Operand<T>>(n_tiles * 4 * q_size);
    douts = arena.take<Operand<T>>(n_tiles * 2 * o_size);
    dqueries = arena.take<Acc<T>>(n_tiles * 2 * acc_size);
    deltas = arena.take<Acc<T>>(n_tiles * kQueryTile);
    stage = arena.take<Operand<T>>(16 * row_length<T>(std::max(D, Dv)));
    scores = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    dprobs = arena.take<Acc<T>>(kScoreSize) + kScoreSlack;
    keep = arena.take<Acc<T>>(kKeyBlock);
    dbias = arena.take<Acc<T>>(2 * D);
    if constexpr (kPacked<T>) {
      dscores = arena.take<Operand<T>>(kScoreSize) + kScoreSlack;
      probs_row = arena.take<Operand<T>>(2 * kScoreLd);
      probs_pairs = arena.take<Word<T>>(kQueryTile / 2 * kKeyBlock);
      dscores_pairs = arena.take<Word<T>>(kQueryTile / 2 * kKeyBlock);
      shifted_pairs = arena.take<Word<T>>(kPairSize) + kScoreSlack;
    }
  }

  BwdTile<T> tile(TileRows rows, int64_t index) const {
    Operand<T>*q = queries + index * 4 * q_size, *o = douts + index * 2 * o_size;
    Acc<T>* dq = dqueries + index * 2 * acc_size;
    return {rows,           q,
            q + q_size,     o,
            q + 2 * q_size, q + 3 * q_size,
            o + o_size,     dq,
            dq + acc_size,  deltas + index * kQueryTile};
  }
};

// dq = scale · (dqu + dqv). Their column sums are the gradients of the biases.
template <typename T>
void write_dq(const RelAttentionArgs& args, const RelAttentionGrads& grads, int64_t b, int64_t h,
              const BwdTile<T>& tile, const BwdWorkspace<T>& ws) {
  const auto scale = static_cast<Acc<T>>(args.scale);
  Acc<T> dq[256];
  for (int64_t a = 0; a < tile.rows.count(); ++a) {
    const Acc<T>*dqu = tile.dqu + a * ws.ld_acc, *dqv = tile.dqv + a * ws.ld_acc;
    for (int64_t d = 0; d < args.D; ++d) {
      dq[d] = scale * (dqu[d] + dqv[d]);
      ws.dbias[d] += scale * dqu[d];
      ws.dbias[args.D + d] += scale * dqv[d];
    }
    if (grads.dq == nullptr) continue;
    const int64_t row = (b * args.H + h) * args.Tq + tile.rows.begin + a;
    convert_row(dq, static_cast<T*>(grads.dq) + row * args.D, args.D);
  }
}

// rows[x - begin] = factor · accumulated[:, x - first] for x in [begin, end).
template <typename acc_t, typename To>
void write_transposed(const acc_t* accumulated, int64_t ld, int64_t first, int64_t begin,
                      int64_t end, int64_t D, acc_t factor, To* rows) {
  acc_t tile[16 * 256];
  for (int64_t x = begin; x < end; x += 16) {
    const int64_t n = std::min<int64_t>(16, end - x);
    for (int64_t d = 0; d < D; d += 16) {
      transpose_block(accumulated + d * ld + (x - first), ld, tile + d, D,
                      std::min<int64_t>(16, D - d), n);
    }
    for (int64_t t = 0; t < n * D; ++t) tile[t] *= factor;
    convert_row(tile, rows + (x - begin) * D, n * D);
  }
}

// The factor of gradients that are products with signed queries.
template <typename T>
Acc<T> key_factor(const RelAttentionArgs& args) {
  return static_cast<Acc<T>>(args.scale) * query_sign<Acc<T>>(args);
}

// Calls f(accumulated, D, factor, begin, end, rows) for each destination of a pair's key and value
// gradients: the results, or a slot if other chunks share the pair. `rows` holds keys [begin, end).
template <typename T, typename F>
void for_each_key_output(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                         const RelAttentionPartials& partials, int64_t b, int64_t h, int64_t slot,
                         const BwdWorkspace<T>& ws, F&& f) {
  const int64_t Tk = args.Tk(), Tm = args.Tm, pair = b * args.H + h;
  auto visit = [&](const Acc<T>* acc, int64_t D, Acc<T> factor, void* memory, void* segment,
                   void* parked) {
    if (slot >= 0) {
      if (parked != nullptr)
        f(acc, D, factor, int64_t{0}, Tk, static_cast<Acc<T>*>(parked) + slot * Tk * D);
      return;
    }
    if (memory != nullptr)
      f(acc, D, factor, int64_t{0}, Tm, static_cast<T*>(memory) + pair * Tm * D);
    if (segment != nullptr)
      f(acc, D, factor, Tm, Tk, static_cast<T*>(segment) + pair * args.Ts * D);
  };
  visit(ws.dk_t, args.D, key_factor<T>(args), grads.dmem_k, grads.dk, partials.dk);
  visit(ws.dv_t, args.Dv, Acc<T>(1), grads.dmem_v, grads.dv, partials.dv);
}

// The accumulated gradients of one block's keys.
template <typename T>
void write_keys(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                const RelAttentionPartials& partials, int64_t b, int64_t h, Block block,
                int64_t slot, const BwdWorkspace<T>& ws) {
  auto write = [&](const Acc<T>* acc, int64_t D, Acc<T> factor, int64_t begin, int64_t end,
                   auto* rows) {
    const int64_t lo = std::clamp(block.begin, begin, end);
    const int64_t hi = std::clamp(block.begin + block.n, lo, end);
    write_transposed(acc, ws.ld_k, block.begin, lo, hi, D, factor, rows + (lo - begin) * D);
  };
  for_each_key_output<T>(args, grads, partials, b, h, slot, ws, write);
}

// Clears the gradients of keys outside [span.begin, span.end), to which no tile of the chunk
// attends.
template <typename T>
void clear_other_keys(const RelAttentionArgs& args, const RelAttentionGrads& grads,
                      const RelAttentionPartials& partials, int64_t b, int64_t h, KeyRange span,
                      int64_t slot, const BwdWorkspace<T>& ws) {
  auto clear = [&](const Acc<T>*, int64_t D, Acc<T>, int64_t begin, int64_t end, auto* rows) {
    const std::remove_reference_t<decltype(*rows)> zero(0);
    const int64_t lo = std::clamp(span.begin, begin, end), hi = std::clamp(span.end, lo, end);
    std::fill(rows, rows + (lo - begin) * D, zero);
    std::fill(rows + (hi - begin) * D, rows + (end - begin) * D, zero);
  };
  for_each_key_output<T>(args, grads, partials, b, h, slot, ws, clear);
}

// Calls f(row, n) for each row of each panel, with the number of columns in use.
template <typename W, typename F>
void for_each_panel_row(const RelAttentionPlan& plan, TablePanels<W> panels, F&& f) {
  for (int64_t column = 0; column < plan.n_columns(); column += kPanel) {
    for (int64_t d = 0; d < panels.rows; ++d)
      f(panels.at(column) + d * kPanelLd, std::min(kPanel, plan.n_columns() - column));
  }
}

// Writes the gradient of the table's rows to the chunk's slot. With `clamp` the columns outside the
// table are added to its first and last row.
template <typename T>
void write_table(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                 const RelAttentionPartials& partials, int64_t slot, const BwdWorkspace<T>& ws) {
  if (partials.dr == nullptr) return;
  const int64_t D = args.D, R = args.R, e_of_row0 = args.Tq - 1 - args.offset;
  Acc<T>* dr = static_cast<Acc<T>*>(partials.dr) + slot * R * D;
  const int64_t lo = std::clamp(plan.e_begin - e_of_row0, int64_t{0}, R);
  const int64_t hi = std::clamp(plan.e_end - e_of_row0, lo, R);
  std::fill(dr, dr + lo * D, Acc<T>(0));
  for (int64_t m = lo, stop; m < hi; m = stop) {
    const int64_t column = m + e_of_row0 - plan.e_begin;
    stop = std::min(hi, m + kPanel - column % kPanel);
    write_transposed(ws.dr_t.at(column), kPanelLd, m, m, stop, D, key_factor<T>(args), dr + m * D);
  }
  std::fill(dr + hi * D, dr + R * D, Acc<T>(0));
  if (!args.clamp) return;
  auto fold = [&](int64_t begin, int64_t end, Acc<T>* row) {
    for (int64_t d = 0; d < D; ++d) {
      Acc<T> sum = 0;
      for (int64_t e = begin; e < end; ++e) sum += ws.dr_t.at(e - plan.e_begin)[d * kPanelLd];
      row[d] += key_factor<T>(args) * sum;
    }
  };
  fold(plan.e_begin, std::min(plan.e_end, e_of_row0), dr);
  fold(std::max(plan.e_begin, e_of_row0 + R), plan.e_end, dr + (R - 1) * D);
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
  const int64_t pairs = args.n_pairs() / args.n_groups(), size = args.R * args.D;
  std::vector<const Acc<T>*> slots;
  for_each_chunk(
      plan, group * pairs * plan.n_tiles, (group + 1) * pairs * plan.n_tiles, [&](int64_t chunk) {
        slots.push_back(static_cast<const Acc<T>*>(partials.dr) + (group + chunk) * size);
      });
  sum_slots(slots, size, static_cast<T*>(grads.dr) + group * size);
}

template <typename T>
void finish_pair(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                 const RelAttentionGrads& grads, const RelAttentionPartials& partials,
                 int64_t pair) {
  const int64_t begin = pair * plan.n_tiles, end = begin + plan.n_tiles;
  auto sum = [&](void* parked, int64_t D, void* memory, void* segment) {
    std::vector<const Acc<T>*> slots;
    for_each_chunk(plan, begin, end, [&](int64_t chunk) {
      const int64_t first_pair = plan.chunks[static_cast<size_t>(chunk)] / plan.n_tiles;
      slots.push_back(static_cast<const Acc<T>*>(parked) +
                      (2 * chunk + (pair != first_pair)) * args.Tk() * D);
    });
    if (slots.size() < 2) return;  // one chunk computed the whole pair and wrote its gradients
    const int64_t index = args.batch_of(pair) * args.H + args.head_of(pair);
    if (memory != nullptr)
      sum_slots(slots, args.Tm * D, static_cast<T*>(memory) + index * args.Tm * D);
    for (const Acc<T>*& slot : slots) slot += args.Tm * D;
    if (segment != nullptr)
      sum_slots(slots, args.Ts * D, static_cast<T*>(segment) + index * args.Ts * D);
  };
  if (partials.dk != nullptr) sum(partials.dk, args.D, grads.dmem_k, grads.dk);
  if (partials.dv != nullptr) sum(partials.dv, args.Dv, grads.dmem_v, grads.dv);
}

template <typename T>
void finish_head(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                 const RelAttentionGrads& grads, const RelAttentionPartials& partials, int64_t h) {
  std::vector<const Acc<T>*> slots;
  for (int64_t pair = 0; pair < args.n_pairs(); ++pair) {
    if (args.head_of(pair) != h) continue;
    for_each_chunk(plan, pair * plan.n_tiles, (pair + 1) * plan.n_tiles, [&](int64_t chunk) {
      slots.push_back(static_cast<const Acc<T>*>(partials.dbias) + (pair + chunk) * 2 * args.D);
    });
  }
  auto* du = static_cast<Acc<T>*>(grads.dr_w_bias);
  auto* dv = static_cast<Acc<T>*>(grads.dr_r_bias);
  if (du != nullptr) sum_slots(slots, args.D, du + h * args.D);
  for (const Acc<T>*& slot : slots) slot += args.D;
  if (dv != nullptr) sum_slots(slots, args.D, dv + h * args.D);
}

template <typename T>
void bwd_finish(const RelAttentionArgs& args, const RelAttentionPlan& plan,
                const RelAttentionGrads& grads, const RelAttentionPartials& partials,
                int64_t item) {
  const int64_t groups = args.n_groups(), pairs = args.n_pairs();
  if (item < groups) {
    finish_group<T>(args, plan, grads, partials, item);
  } else if (item < groups + pairs) {
    finish_pair<T>(args, plan, grads, partials, item - groups);
  } else {
    finish_head<T>(args, plan, grads, partials, item - groups - pairs);
  }
}

}  // namespace txl::TXL_ISA
