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

// The keys (or values) of one (b, h) pair, counted over [memory; segment]; zeros outside `valid`.
template <typename T>
struct KeyRows {
  const T *memory, *segment;
  int64_t stride_memory, stride_segment, Tm;
  KeyRange valid;

  KeyRows(const RelAttentionArgs& args, const Tensor4& memory, const Tensor4& segment, int64_t b,
          int64_t h)
      : memory(memory.head<const T>(b, h)),
        segment(segment.head<const T>(b, h)),
        stride_memory(memory.stride_t),
        stride_segment(segment.stride_t),
        Tm(args.Tm),
        valid(args.keys_of_row(b)) {}

  // Whether rows of D columns are a right-hand matrix for `gemm`. Rows of expanded or overlapping
  // tensors are not, nor are strides that BLAS, which has 32-bit integers, cannot express.
  bool products_can_read(int64_t D) const {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    auto fits = [&](int64_t stride) { return D <= stride && stride <= kMax; };
    return fits(stride_segment) && (Tm == 0 || fits(stride_memory));
  }
  // Whether the rows are adjacent in memory, so that products read them as fast as packed ones.
  bool adjacent(int64_t D) const { return stride_segment == D && (Tm == 0 || stride_memory == D); }
  // The longest run of rows that starts at key j.
  RowRun<T> from(int64_t j) const {
    if (j < valid.begin) return {nullptr, 0, valid.begin - j};
    if (j >= valid.end) return {nullptr, 0, kOpen};
    if (j < Tm) return {memory + j * stride_memory, stride_memory, std::min(Tm, valid.end) - j};
    return {segment + (j - Tm) * stride_segment, stride_segment, valid.end - j};
  }
};

// The position table of one group by column e = j - i + Tq - 1, which is row m = e - (Tq-1) +
// offset of the table. Outside the table rows are zeros, or with `clamp` the table's first or last
// row.
template <typename T>
struct TableRows {
  const T* table;
  int64_t stride, R, e_of_row0;
  bool clamp;

  TableRows(const RelAttentionArgs& args, int64_t pair)
      : table(args.r.head<const T>(args.batch_of(pair), args.head_of(pair))),
        stride(args.r.stride_t),
        R(args.R),
        e_of_row0(args.Tq - 1 - args.offset),
        clamp(args.clamp) {}

  RowRun<T> from(int64_t e) const {
    const int64_t m = e - e_of_row0;
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
