// Packed matrices as panels of columns, and the pieces of columns and rows that products process.
#pragma once

#include "arena.h"
#include "operand.h"
#include "pack.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

constexpr int64_t kPanelLd = leading_dimension(kPanel);

// A transposed matrix, [rows, columns], as panels [columns / kPanel][rows][ld]. With a mask the
// panels are a ring: panel n is kept where panel n & mask is.
template <typename W>
struct Panels {
  W* data;
  int64_t rows, ld = kPanelLd, mask = -1;

  W* at(int64_t column) const {
    return data + (column / kPanel & mask) * rows * ld + column % kPanel;
  }

  // Calls f(row, n) for each row of each panel, with the elements of columns [begin, end).
  template <typename F>
  void for_each_row(int64_t begin, int64_t end, F&& f) const {
    for (int64_t x = begin, stop; x < end; x = stop) {
      stop = std::min(end, x + kPanel - x % kPanel);
      for (int64_t d = 0; d < rows; ++d) f(at(x) + d * ld, stop - x);
    }
  }
};

// Panels for each table of a group; `size` returns the distance from one table to the next.
template <typename W>
Panels<W> take_tables(Arena& arena, const RelAttentionArgs& args, const RelAttentionPlan& plan,
                      int64_t rows, int64_t* size) {
  const int64_t n_panels = round_up(plan.n_columns, kPanel) / kPanel;
  *size = n_panels * rows * kPanelLd;
  return {arena.take<W>(args.tables_per_group() * *size), rows};
}

// The table of one of a unit's query heads.
template <typename W>
Panels<W> table_of(const RelAttentionArgs& args, Panels<W> first, int64_t size, int64_t head) {
  return {first.data + (args.r_per_head ? head * size : 0), first.rows};
}

// Calls f(n, rows) for each table of a unit's group.
template <typename T, typename F>
void for_each_table(const RelAttentionArgs& args, int64_t unit, F&& f) {
  const int64_t h = args.key_head_of(unit) * args.heads_per_key();
  for (int64_t n = 0; n < args.tables_per_group(); ++n)
    f(n, TableRows<T>(args, args.batch_of(unit), h + n));
}

// Packs the table's columns of the plan, transposed.
template <typename T>
void pack_table(const TableRows<T>& rows, const RelAttentionPlan& plan, int64_t Dp,
                Operand<T>* stage, Panels<Word<T>> panels) {
  for (int64_t x = plan.packed_begin, stop; x < plan.packed_end; x = stop) {
    stop = std::min(plan.packed_end, x + kPanel - x % kPanel);
    const int64_t row = plan.column_begin + x;
    pack_transposed<T>(rows, row, row + stop - x, Dp, stage, panels.at(x), panels.ld);
  }
}

// Calls f(x, size) for consecutive pieces of [begin, begin + n), n a multiple of 16. No piece
// crosses a multiple of kPanel. There are at most three sizes, because ATen keeps machine code for
// every distinct product (see txl/gemm.h). `begin` may be negative.
template <typename F>
void for_each_piece(int64_t largest, int64_t begin, int64_t n, F&& f) {
  for (int64_t x = begin, end = begin + n, size; x < end; x += size) {
    const int64_t room = std::min(end - x, kPanel - (x & (kPanel - 1)));
    size = room >= largest ? largest : room >= 64 ? 64 : 16;
    f(x, size);
  }
}

// Rows [begin, end) of a tile.
struct RowSpan {
  int64_t begin, end;
  int64_t n() const { return end - begin; }
  bool operator==(const RowSpan&) const = default;
};

// Pieces of a product's columns: f(x, size, rows). With AVX2 a piece of 64 columns stays in the
// first-level cache: on an AMD EPYC (family 25 model 1), two threads, [64, 64]·[64, N] runs at 184
// GFLOP/s for N 64 and at 170 for N 256. A piece is divided into halves that need different rows of
// the tile, `rows_of(x, size)`: at the diagonal, a quarter of its product is left out. Wider
// vectors finish a piece of 64 so fast that the call's own time counts.
template <typename R, typename F>
void for_each_column_piece(int64_t begin, int64_t n, [[maybe_unused]] int64_t height,
                           [[maybe_unused]] R&& rows_of, F&& f) {
#if defined(CPU_CAPABILITY_AVX512)
  for_each_piece(kPiece, begin, n,
                 [&](int64_t x, int64_t size) { f(x, size, RowSpan{0, height}); });
#else
  for_each_piece(64, begin, n, [&](int64_t x, int64_t size) {
    if (size < 64) return f(x, size, RowSpan{0, height});
    const RowSpan left = rows_of(x, size / 2), right = rows_of(x + size / 2, size / 2);
    if (left == right) return f(x, size, left);
    f(x, size / 2, left);
    f(x + size / 2, size / 2, right);
  });
#endif
}

// Pieces of a product's inner dimension.
template <typename F>
void for_each_inner_piece(int64_t begin, int64_t n, F&& f) {
  for_each_piece(kPiece, begin, n, f);
}

}  // namespace txl::TXL_ISA
