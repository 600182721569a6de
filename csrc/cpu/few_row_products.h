// Products of a few queries with rows that are read once, in the caller's memory: keys, rows of the
// position table, values. Sums are in registers, eight vectors at a time.
#pragma once

#include <algorithm>

#include "operand.h"
#include "pack.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// Accumulators of a product: vectors that are in registers at a time.
constexpr int kSums = 8;
// Rows of values that all queries read before the next ones are read.
constexpr int64_t kValueRows = 16;

// Rows are prefetched so many rows before they are used: the hardware's prefetcher stops at the end
// of each page, and does not follow rows that are pages apart. (AMD EPYC, family 25 model 1, one
// query, 16 heads of 64, 1,600 keys: 49% of the read bandwidth of a thread without prefetching, 74%
// with a distance of 16 rows, 77% with 32.)
constexpr int64_t kAhead = 32;

// Prefetches `n` adjacent elements. An address outside of the tensor has no effect.
template <typename T>
void prefetch(const T* row, int64_t stride, int64_t n) {
  const auto first = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(stride) * sizeof(T);
  for (uintptr_t x = 0; x < static_cast<uintptr_t>(n) * sizeof(T); x += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + x));
}

template <typename T>
Vectorized<Acc<T>> load_row(const T* src) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return Vectorized<T>::loadu(src);
  } else {
    Vectorized<float> x;
    at::vec::load_to_float<T>(src, x);
    return x;
  }
}

// A row of D elements as vectors. The last vector ends with the row, so that it may overlap the one
// before it.
template <typename acc_t>
struct RowVectors {
  static constexpr int64_t kSize = Vectorized<acc_t>::size();
  static_assert(kSize <= kShortestRow);
  int64_t D, whole, rest;  // vectors without overlap, elements after them

  explicit RowVectors(int64_t D) : D(D), whole(D / kSize), rest(D % kSize) {}
  int64_t n() const { return whole + (rest > 0); }
  int64_t length() const { return n() * kSize; }
  // The first column of the last vector.
  int64_t last() const { return D - kSize; }
  // From D adjacent elements to vectors, in place: elements that the last vector shares with the
  // one before it are zeros in the last one.
  void to_vectors(acc_t* row) const {
    if (rest == 0) return;
    acc_t* last = row + whole * kSize;
    std::fill(last + rest, last + kSize, acc_t(0));
    std::rotate(last, last + rest, last + kSize);
  }
  // From vectors of sums to D adjacent elements, in place.
  void from_vectors(acc_t* row) const {
    acc_t* last = row + whole * kSize;
    if (rest > 0) std::copy(last + kSize - rest, last + kSize, last);
  }
};

// totals[n]: the sum of the elements of sums[n].
template <typename acc_t>
void add_up(const Vectorized<acc_t> (&sums)[kSums], acc_t* totals) {
  for (int n = 0; n < kSums; ++n) totals[n] = sum_of(sums[n]);
}
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
inline void add_up(const Vectorized<float> (&sums)[kSums], float* totals) {
  __m256 x[kSums];
#pragma GCC unroll 8
  for (int n = 0; n < kSums; ++n) {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 sum = sums[n];
    x[n] = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
#else
    x[n] = sums[n];
#endif
  }
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  _mm256_storeu_ps(totals, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                         _mm256_permute2f128_ps(low, high, 0x31)));
}
#endif

// A query, as vectors, and the row that receives its scores.
template <typename acc_t>
struct ScoredRow {
  const acc_t* query;
  acc_t* scores;
};

// Scores of M queries and kSums / M keys.
template <int M, typename T>
void score_group(const ScoredRow<Acc<T>>* rows, const T* const* keys, RowVectors<Acc<T>> vectors,
                 int64_t column, bool accumulate) {
  using Vec = Vectorized<Acc<T>>;
  constexpr int N = kSums / M;
  const Vec zero(0);
  Vec sums[kSums] = {zero, zero, zero, zero, zero, zero, zero, zero};
  const int64_t n_vectors = vectors.n(), last = vectors.last();
  for (int64_t v = 0, x = 0; v < n_vectors; ++v, x = std::min(x + Vec::size(), last)) {
    Vec key[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) key[n] = load_row(keys[n] + x);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec q = Vec::loadu(rows[m].query + v * Vec::size());
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m * N + n] = at::vec::fmadd(q, key[n], sums[m * N + n]);
    }
  }
  Acc<T> totals[kSums];
  add_up(sums, totals);
  for (int m = 0; m < M; ++m) {
    Acc<T>* scores = rows[m].scores + column;
    for (int n = 0; n < N; ++n)
      scores[n] = accumulate ? scores[n] + totals[m * N + n] : totals[m * N + n];
  }
}

// Scores of `n_rows` queries and the keys of a group, of which the first `n` are requested. Up to
// kSums - 1 scores after them are overwritten.
template <typename T>
void score_queries(const ScoredRow<Acc<T>>* rows, int64_t n_rows, const T* const* keys, int64_t n,
                   RowVectors<Acc<T>> vectors, int64_t column, bool accumulate) {
  int64_t a = 0;
  for (; a + 4 <= n_rows; a += 4) {
    for (int64_t x = 0; x < n; x += 2)
      score_group<4, T>(rows + a, keys + x, vectors, column + x, accumulate);
  }
  for (; a + 2 <= n_rows; a += 2) {
    for (int64_t x = 0; x < n; x += 4)
      score_group<2, T>(rows + a, keys + x, vectors, column + x, accumulate);
  }
  if (a < n_rows) score_group<1, T>(rows + a, keys, vectors, column, accumulate);
}

// scores[x - begin] = query · source[x], or += if `accumulate`, for x in [begin, end).
template <typename T, typename Rows>
void score_rows(const ScoredRow<Acc<T>>* rows, int64_t n_rows, const Rows& source, int64_t begin,
                int64_t end, int64_t D, bool accumulate) {
  const RowVectors<Acc<T>> vectors(D);
  for (int64_t x = begin; x < end; x += kSums) {
    const RowRun<T> run = source.from(x);
    const int64_t n = std::min<int64_t>(kSums, end - x);
    const T* keys[kSums];
    for (int64_t y = 0; y < kSums; ++y) {
      const int64_t row = std::min(y, n - 1);
      prefetch(run.first, (row + kAhead) * run.stride, D);
      keys[y] = row < run.n ? run.first + row * run.stride : source.from(x + row).first;
    }
    score_queries<T>(rows, n_rows, keys, n, vectors, x - begin, accumulate);
  }
}

// A query's probabilities, and its sums of products with the values, as vectors.
template <typename acc_t>
struct OutputRow {
  const acc_t* probs;
  acc_t* sums;
};

// Adds the products of M queries' probabilities with columns [x, x + C vectors) of n values, from
// vector `v` of the sums on.
template <int M, int C, typename T>
void add_columns(const OutputRow<Acc<T>>* rows, int64_t first, const T* values, int64_t stride,
                 int64_t n, int64_t v, int64_t x) {
  using Vec = Vectorized<Acc<T>>;
  Vec sums[M * C];
#pragma GCC unroll 8
  for (int s = 0; s < M * C; ++s)
    sums[s] = Vec::loadu(rows[s / C].sums + (v + s % C) * Vec::size());
  for (int64_t j = 0; j < n; ++j) {
    prefetch(values + x, (j + kAhead) * stride, C * Vec::size());
    Vec value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load_row(values + j * stride + x + c * Vec::size());
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec p(rows[m].probs[first + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[m * C + c] = at::vec::fmadd(p, value[c], sums[m * C + c]);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < M * C; ++s) sums[s].store(rows[s / C].sums + (v + s % C) * Vec::size());
}

// As add_columns, for all columns: C vectors at a time, then fewer.
template <int M, int C, typename T>
void add_row_products(const OutputRow<Acc<T>>* rows, int64_t first, const T* values, int64_t stride,
                      int64_t n, RowVectors<Acc<T>> vectors, int64_t v) {
  for (; v + C <= vectors.whole; v += C)
    add_columns<M, C, T>(rows, first, values, stride, n, v, v * vectors.kSize);
  if constexpr (C > 1) {
    add_row_products<M, C / 2, T>(rows, first, values, stride, n, vectors, v);
  } else if (vectors.rest > 0) {
    add_columns<M, 1, T>(rows, first, values, stride, n, v, vectors.last());
  }
}

// sums += probs[x - begin] · source[x] over x in [begin, end).
template <typename T>
void add_products(const OutputRow<Acc<T>>* rows, int64_t n_rows, const KeyRows<T>& source,
                  int64_t begin, int64_t end, int64_t D) {
  const RowVectors<Acc<T>> vectors(D);
  for (int64_t x = begin, n; x < end; x += n) {
    const RowRun<T> run = source.from(x);
    n = std::min({kValueRows, run.n, end - x});
    int64_t a = 0;
    const int64_t first = x - begin;
    for (; a + 4 <= n_rows; a += 4)
      add_row_products<4, kSums / 4, T>(rows + a, first, run.first, run.stride, n, vectors, 0);
    for (; a + 2 <= n_rows; a += 2)
      add_row_products<2, kSums / 2, T>(rows + a, first, run.first, run.stride, n, vectors, 0);
    if (a < n_rows)
      add_row_products<1, kSums, T>(rows + a, first, run.first, run.stride, n, vectors, 0);
  }
}

}  // namespace txl::TXL_ISA
