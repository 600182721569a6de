// Packing: copies rows of keys, values or the position table into the layouts of tile products.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "operand.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// `n` rows that are `stride` elements apart from each other (0: the same row again and again); if
// `first` is null, rows of zeros.
template <typename T>
struct RowRun {
  const T* first;
  int64_t stride, n;
};

// The keys (or the values) of one key head, from all runs of keys; zeros outside `valid`.
template <typename T>
class KeyRows {
 public:
  KeyRows(const RelAttentionArgs& args, Tensor4 KeyRun::* tensor, int64_t b, int64_t hk)
      : n_runs_(args.n_runs), valid_(args.keys_of_row(b)) {
    for (int n = 0; n < n_runs_; ++n) {
      const KeyRun& run = args.runs[n];
      const Tensor4& rows = run.*tensor;
      runs_[n] = {rows.head<const T>(b, hk), rows.stride_t, run.begin, run.begin + run.n};
    }
  }

  // Whether rows of D columns are a right-hand matrix for `gemm`. Rows of expanded or overlapping
  // tensors are not, nor are strides that BLAS, which has 32-bit integers, cannot express.
  bool products_can_read(int64_t D) const {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    return all([&](const Run& run) { return D <= run.stride && run.stride <= kMax; });
  }
  // Whether the rows are adjacent in memory, so that products read them as fast as packed ones.
  bool adjacent(int64_t D) const {
    return all([&](const Run& run) { return run.stride == D; });
  }
  // The longest run of rows that starts at key j, which may be negative.
  RowRun<T> from(int64_t j) const {
    if (j < valid_.begin) return {nullptr, 0, valid_.begin - j};
    if (j >= valid_.end) return {nullptr, 0, kOpen};
    int n = 0;
    while (j >= runs_[n].end) ++n;
    const Run& run = runs_[n];
    return {run.first + (j - run.begin) * run.stride, run.stride,
            std::min(run.end, valid_.end) - j};
  }

 private:
  struct Run {
    const T* first;
    int64_t stride, begin, end;
  };
  template <typename F>
  bool all(F&& holds) const {
    return std::all_of(runs_, runs_ + n_runs_, holds);
  }

  int n_runs_;
  Run runs_[kMaxKeyRuns];
  KeyRange valid_;
};

// A table of positions: row m of `r`, or zeros outside of `r`, with `clamp` its first or last row.
template <typename T>
struct TableRows {
  const T* table;
  int64_t stride, R;
  bool clamp;

  TableRows(const RelAttentionArgs& args, int64_t b, int64_t h)
      : table(args.r.head<const T>(b, h)), stride(args.r.stride_t), R(args.R), clamp(args.clamp) {}

  RowRun<T> from(int64_t m) const {
    if (m < 0) return {clamp ? table : nullptr, 0, -m};
    if (m < R) return {table + m * stride, stride, R - m};
    return {clamp ? table + (R - 1) * stride : nullptr, 0, kOpen};
  }
};

// Copies the 16 rows from `begin` as operands, with zeros after the first D columns.
template <typename T, typename Rows>
void stage_rows(const Rows& rows, int64_t begin, int64_t D, Operand<T>* stage, int64_t ld) {
  for (int64_t row = 0; row < 16;) {
    const RowRun<T> run = rows.from(begin + row);
    const int64_t stop = std::min<int64_t>(16, row + run.n);
    for (int64_t t = row; t < stop; ++t) {
      Operand<T>* dst = stage + t * ld;
      if (run.first != nullptr) convert_row(run.first + (t - row) * run.stride, dst, D);
      std::fill(dst + (run.first != nullptr ? D : 0), dst + ld, Operand<T>(0));
    }
    row = stop;
  }
}

// dst[n, m] = src[m, n] for a block of 16 rows and `n` columns.
template <typename W>
void transpose_16_rows(const W* src, int64_t ld_src, W* dst, int64_t ld_dst, int64_t n) {
  for (int64_t column = 0; column < n; column += 16) {
    transpose_block(src + column, ld_src, dst + column * ld_dst, ld_dst, 16,
                    std::min<int64_t>(16, n - column));
  }
}

// The hardware's prefetcher does not follow rows that are pages apart.
template <typename T>
void prefetch_rows(const T* first, int64_t stride, int64_t D) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t row = 0; row < 16; ++row) {
    for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(first + row * stride + d);
  }
}

// dst[d, x - begin] = rows[x, d] for x in [begin, end), a multiple of 16 rows; with packed operands
// dst holds pairs of d. `ld` counts words. `stage`: scratch memory for 16 · row_length(D) operands.
template <typename T, typename Rows>
void pack_transposed(const Rows& rows, int64_t begin, int64_t end, int64_t D, Operand<T>* stage,
                     Word<T>* dst, int64_t ld) {
  using W = Word<T>;
  constexpr int64_t kOperandsPerWord = sizeof(W) / sizeof(Operand<T>);
  const int64_t length = row_length<T>(D), words = row_words<T>(D);
  for (int64_t x = begin; x < end; x += 16) {
    const RowRun<T> run = rows.from(x);
    if (run.n >= 32) prefetch_rows(run.first + 16 * run.stride, run.stride, D);
    const W* src = reinterpret_cast<const W*>(stage);
    int64_t ld_src = words;
    const bool direct = std::is_same_v<T, Operand<T>> && run.n >= 16 && run.first != nullptr &&
                        length == D && run.stride % kOperandsPerWord == 0;
    if (direct) {
      src = reinterpret_cast<const W*>(run.first);
      ld_src = run.stride / kOperandsPerWord;
    } else {
      stage_rows<T>(rows, x, D, stage, length);
    }
    transpose_16_rows(src, ld_src, dst + (x - begin), ld, words);
  }
}

// Copies rows [begin, end) as a right-hand matrix [end - begin, D] of a product with inner
// dimension end - begin. With packed operands dst holds pairs of rows, and `begin` and `end` are
// even. `ld` counts columns.
template <typename T, typename Rows>
void pack_natural(const Rows& rows, int64_t begin, int64_t end, int64_t D, Operand<T>* stage,
                  Word<T>* dst, int64_t ld) {
  if constexpr (kPacked<T>) {
    std::fill(stage, stage + D, T(0));
    auto row = [&](int64_t x) {
      return rows.from(x).first != nullptr ? rows.from(x).first : stage;
    };
    for (int64_t x = begin; x < end; x += 2)
      interleave(row(x), row(x + 1), D, dst + (x - begin) / 2 * ld);
  } else {
    for (int64_t x = begin; x < end;) {
      const RowRun<T> run = rows.from(x);
      const int64_t stop = std::min(end, x + run.n);
      for (const T* src = run.first; x < stop; ++x, src += run.stride) {
        Operand<T>* row = dst + (x - begin) * ld;
        if (run.first != nullptr) {
          convert_row(src, row, D);
        } else {
          std::fill(row, row + D, Operand<T>(0));
        }
      }
    }
  }
}

}  // namespace txl::TXL_ISA
