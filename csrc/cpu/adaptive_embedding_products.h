// The products of a projected table: panels of the right-hand matrix, and rows of results that are
// written to each of their tokens.
#pragma once

#include "adaptive_embedding_rows.h"
#include "arena.h"
#include "pack.h"
#include "txl/gemm.h"

namespace txl::TXL_ISA {

constexpr int64_t kProductRows = 64, kProductDepth = 512;

// Memory that all tasks of one table share. Rows after the last run are zeros.
template <typename T>
struct EmbeddingShared {
  int64_t ld_width, ld_d, ld_runs;
  int64_t piece;       // elements of one piece of dout_t
  Operand<T>* rows;    // [padded runs, ld_width], forward: the table's
  Operand<T>* dout;    // [padded runs, ld_d], backward: scale · each run's sum
  Operand<T>* dout_t;  // the same, transposed, in pieces of kProductDepth runs:
                       // [d rounded up to a tile, ld_runs] each

  EmbeddingShared(const EmbeddingArgs& args, const EmbeddingGrads* grads, Arena& arena)
      : ld_width(leading_dimension(args.width)),
        ld_d(leading_dimension(args.d)),
        ld_runs(leading_dimension(std::min(args.runs.padded(), kProductDepth))),
        piece(round_up(args.d, kRunTile) * ld_runs) {
    auto take = [&](bool needed, int64_t n) { return arena.take<Operand<T>>(needed ? n : 0); };
    rows = take(grads == nullptr, args.runs.padded() * ld_width);
    dout = take(grads != nullptr, args.runs.padded() * ld_d);
    dout_t = take(grads != nullptr && grads->dprojection != nullptr,
                  round_up(args.runs.padded(), kProductDepth) / kProductDepth * piece);
  }

  // Element [0, run] of dout_t.
  Operand<T>* dout_column(int64_t run) const {
    return dout_t + run / kProductDepth * piece + run % kProductDepth;
  }
};

// Memory of one task.
template <typename T>
struct EmbeddingSlot {
  static constexpr int64_t ld = kPanelColumns;
  Word<T>* panel;     // [depth, ld], or pairs of rows
  Operand<T>* stage;  // 16 rows of operands
  Word<T>* pairs;     // a tile of gradients as pairs of rows
  Acc<T>* product;    // [kProductRows, ld]

  EmbeddingSlot(const EmbeddingArgs& args, const EmbeddingGrads* grads, Arena& arena) {
    const int64_t depth = grads == nullptr ? args.width : std::max(args.d, args.runs.padded());
    panel = arena.take<Word<T>>(row_words<T>(depth) * ld);
    stage = arena.take<Operand<T>>(16 * row_length<T>(std::max(args.width, kPanelColumns)));
    pairs = arena.take<Word<T>>(grads != nullptr && kPacked<T> ? kRunTile / 2 * args.d : 0);
    product = arena.take<Acc<T>>(kProductRows * ld);
  }
};

// One task's panel of columns and share of rows.
struct PanelTask {
  int64_t column, n_columns, first, last;

  PanelTask(const PanelPlan& plan, int64_t task) {
    const int64_t share = task % plan.n_shares;
    const int64_t tiles = (plan.rows + kRunTile - 1) / kRunTile;
    column = task / plan.n_shares * plan.panel;
    n_columns = std::min(plan.panel, plan.columns - column);
    first = share * tiles / plan.n_shares * kRunTile;
    last = std::min(plan.rows, (share + 1) * tiles / plan.n_shares * kRunTile);
  }
};

// Rows `first + index[i]` of a matrix, or `first + i` without an index; zeros after the last.
template <typename T>
struct MatrixRows {
  const T* first;
  int64_t stride, n;
  const int64_t* index = nullptr;

  RowRun<T> from(int64_t i) const {
    if (i >= n) return {nullptr, 0, kOpen};
    if (index != nullptr) return {first + index[i] * stride, 0, 1};
    return {first + i * stride, stride, n - i};
  }
};

// Calls store(row, product) with each row of left [rows, depth] · the task's panel; `left` has rows
// up to a whole tile of runs. Element [row, k] of `left` is at row · ld_left + k % kProductDepth in
// piece ⌊k / kProductDepth⌋.
template <typename T, typename F>
void multiply_panel(const Operand<T>* left, int64_t ld_left, int64_t piece, int64_t depth,
                    const PanelTask& task, const EmbeddingSlot<T>& slot, F&& store) {
  constexpr int64_t kRowsPerWord = kPacked<T> ? 2 : 1, ld = EmbeddingSlot<T>::ld;
  const int64_t columns = round_up(task.n_columns, 16);
  for (int64_t first = task.first; first < task.last; first += kProductRows) {
    const int64_t rows = std::min(kProductRows, task.last - first);
    const int64_t padded = std::min(kProductRows, round_up(rows, kRunTile));
    for (int64_t k = 0; k < depth; k += kProductDepth) {
      gemm(padded, columns, std::min(kProductDepth, depth - k),
           left + k / kProductDepth * piece + first * ld_left, ld_left,
           reinterpret_cast<const Operand<T>*>(slot.panel + k / kRowsPerWord * ld), ld,
           slot.product, ld, /*accumulate=*/k > 0);
    }
    for (int64_t row = 0; row < rows; ++row) store(first + row, slot.product + row * ld);
  }
  gemm_release();
}

// Gathers one tile of the table's rows as operands.
template <typename T>
void embedding_gather(const EmbeddingArgs& args, int64_t tile, char* memory) {
  Arena arena(memory);
  const EmbeddingShared<T> shared(args, nullptr, arena);
  const MatrixRows<T> rows{static_cast<const T*>(args.table), args.width, args.runs.n,
                           args.runs.row};
  for (int64_t r = tile * kRunTile; r < (tile + 1) * kRunTile; r += 16)
    stage_rows<T>(rows, r, args.width, shared.rows + r * shared.ld_width, shared.ld_width);
}

// out[token] = scale · projection · its row, for the columns of a panel.
template <typename T>
void embedding_project(const EmbeddingArgs& args, const PanelPlan& plan, void* out, int64_t index,
                       char* memory, char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const EmbeddingShared<T> shared(args, nullptr, arena);
  const EmbeddingSlot<T> slot(args, nullptr, slot_arena);
  const PanelTask task(plan, index);
  const MatrixRows<T> columns{static_cast<const T*>(args.projection), args.width, args.d};
  pack_transposed<T>(columns, task.column, task.column + round_up(task.n_columns, 16), args.width,
                     slot.stage, slot.panel, slot.ld);
  const EmbeddingRuns& runs = args.runs;
  const auto factor = static_cast<Acc<T>>(args.scale);
  multiply_panel<T>(shared.rows, shared.ld_width, kProductDepth, row_length<T>(args.width), task,
                    slot, [&](int64_t r, const Acc<T>* product) {
                      for (int64_t i = runs.begin[r]; i < runs.begin[r + 1]; ++i) {
                        store_scaled(product, task.n_columns, factor,
                                     static_cast<T*>(out) + runs.place[i] * args.d + task.column);
                      }
                    });
}

// Writes scale · the sum of each run's gradients for one tile of runs, in both layouts.
template <typename T>
void embedding_gather_gradients(const EmbeddingArgs& args, const EmbeddingGrads& grads,
                                int64_t tile, char* memory, char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const EmbeddingShared<T> shared(args, &grads, arena);
  const EmbeddingSlot<T> slot(args, &grads, slot_arena);
  const int64_t first = tile * kRunTile;
  const auto* dout = static_cast<const T*>(grads.dout);
  for (int64_t r = first; r < first + kRunTile; ++r) {
    Operand<T>* dst = shared.dout + r * shared.ld_d;
    std::fill(dst + (r < args.runs.n ? args.d : 0), dst + row_length<T>(args.d), Operand<T>(0));
    if (r >= args.runs.n) continue;
    sum_run(args.runs, r, dout, args.d, static_cast<Acc<T>>(args.scale),
            [&](int64_t column, const Lanes<T>& sum, int64_t n) {
              Lanes<Operand<T>>{sum.low, sum.high}.store(dst + column, n);
            });
  }
  if (grads.dprojection == nullptr) return;
  const Operand<T>* rows = shared.dout + first * shared.ld_d;
  if constexpr (kPacked<T>) {
    for (int64_t pair = 0; pair < kRunTile / 2; ++pair)
      interleave(rows + 2 * pair * shared.ld_d, rows + (2 * pair + 1) * shared.ld_d, args.d,
                 slot.pairs + pair * args.d);
    transpose_16_rows(slot.pairs, args.d, reinterpret_cast<Word<T>*>(shared.dout_column(first)),
                      shared.ld_runs / 2, args.d);
  } else {
    for (int64_t r = 0; r < kRunTile; r += 16)
      transpose_16_rows(rows + r * shared.ld_d, shared.ld_d, shared.dout_column(first + r),
                        shared.ld_runs, args.d);
  }
}

// Packs the task's columns of rows [0, depth) as its panel.
template <typename T>
void pack_panel(MatrixRows<T> rows, int64_t depth, const PanelTask& task,
                const EmbeddingSlot<T>& slot) {
  constexpr int64_t kRowsPerWord = kPacked<T> ? 2 : 1;
  const int64_t columns = round_up(task.n_columns, 16);
  rows.first += task.column;
  pack_natural<T>(rows, 0, depth, task.n_columns, slot.stage, slot.panel, slot.ld);
  for (int64_t k = 0; task.n_columns < columns && k < depth / kRowsPerWord; ++k)
    std::fill(slot.panel + k * slot.ld + task.n_columns, slot.panel + k * slot.ld + columns,
              Word<T>(0));
}

// dtable[row of a run] = its gradient · projection.
template <typename T>
void embedding_table_gradient(const EmbeddingArgs& args, const EmbeddingGrads& grads,
                              const PanelPlan& plan, int64_t index, char* memory,
                              char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const EmbeddingShared<T> shared(args, &grads, arena);
  const EmbeddingSlot<T> slot(args, &grads, slot_arena);
  const PanelTask task(plan, index);
  const int64_t depth = row_length<T>(args.d);
  pack_panel<T>({static_cast<const T*>(args.projection), args.width, args.d}, depth, task, slot);
  multiply_panel<T>(shared.dout, shared.ld_d, kProductDepth, depth, task, slot,
                    [&](int64_t r, const Acc<T>* product) {
                      const int64_t row = grads.by_run ? r : args.runs.row[r];
                      store_scaled(product, task.n_columns, Acc<T>(1),
                                   static_cast<T*>(grads.dtable) + row * args.width + task.column);
                    });
}

// dprojection = the runs' gradients, transposed, · their rows.
template <typename T>
void embedding_projection_gradient(const EmbeddingArgs& args, const EmbeddingGrads& grads,
                                   const PanelPlan& plan, int64_t index, char* memory,
                                   char* slot_memory) {
  Arena arena(memory), slot_arena(slot_memory);
  const EmbeddingShared<T> shared(args, &grads, arena);
  const EmbeddingSlot<T> slot(args, &grads, slot_arena);
  const PanelTask task(plan, index);
  const EmbeddingRuns& runs = args.runs;
  pack_panel<T>({static_cast<const T*>(args.table), args.width, runs.n, runs.row}, runs.padded(),
                task, slot);
  multiply_panel<T>(shared.dout_t, shared.ld_runs, shared.piece, runs.padded(), task, slot,
                    [&](int64_t row, const Acc<T>* product) {
                      store_scaled(
                          product, task.n_columns, Acc<T>(1),
                          static_cast<T*>(grads.dprojection) + row * args.width + task.column);
                    });
}

}  // namespace txl::TXL_ISA
