// Rows of tables and of gradients: copied, scaled and summed, in vectors of the accumulation type.
#pragma once

#include "operand.h"
#include "txl/adaptive_embedding.h"

namespace txl::TXL_ISA {

// Two vectors of the accumulation type: as many elements as one vector of a 16-bit type.
template <typename T>
struct Lanes {
  using Vec = Vectorized<Acc<T>>;
  static constexpr int64_t kSize = 2 * Vec::size();
  Vec low{0}, high{0};

  static Lanes load(const T* src, int64_t n = kSize) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      if (n == kSize) return {Vec::loadu(src), Vec::loadu(src + Vec::size())};
      const int64_t rest = std::max<int64_t>(0, n - Vec::size());
      return {Vec::loadu(src, std::min<int64_t>(n, Vec::size())),
              rest > 0 ? Vec::loadu(src + Vec::size(), rest) : Vec(0)};
    } else {
      const auto half = n == kSize ? Vectorized<T>::loadu(src) : Vectorized<T>::loadu(src, n);
      const auto [low, high] = at::vec::convert_to_float<T>(half);
      return {low, high};
    }
  }
  void store(T* dst, int64_t n = kSize) const {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      low.store(dst, std::min<int64_t>(n, Vec::size()));
      if (n > Vec::size()) high.store(dst + Vec::size(), n - Vec::size());
    } else {
      at::vec::convert_from_float<T>(low, high).store(dst, n);
    }
  }
  Lanes operator+(const Lanes& x) const { return {low + x.low, high + x.high}; }
  Lanes operator*(Vec factor) const { return {low * factor, high * factor}; }
};

// Calls f(column, lanes) for the columns of a row of `n`: whole vectors, then the remainder.
template <typename T, typename F>
void for_each_lanes(int64_t n, F&& f) {
  int64_t column = 0;
  for (; column + Lanes<T>::kSize <= n; column += Lanes<T>::kSize) f(column, Lanes<T>::kSize);
  if (column < n) f(column, n - column);
}

// dst = factor · src, which is in the accumulation type.
template <typename T>
void store_scaled(const Acc<T>* src, int64_t n, Acc<T> factor, T* dst) {
  const Vectorized<Acc<T>> by(factor);
  for_each_lanes<T>(n, [&](int64_t k, int64_t m) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      (Lanes<T>::load(src + k, m) * by).store(dst + k, m);
    } else {
      const auto wide = Lanes<Acc<T>>::load(src + k, m);
      (Lanes<T>{wide.low, wide.high} * by).store(dst + k, m);
    }
  });
}

// Calls store(column, lanes, n) with factor · the sum of a run's rows of `from` [·, d].
template <typename T, typename F>
void sum_run(const EmbeddingRuns& runs, int64_t r, const T* from, int64_t d, Acc<T> factor,
             F&& store) {
  const int64_t *place = runs.place + runs.begin[r], *end = runs.place + runs.begin[r + 1];
  const Vectorized<Acc<T>> by(factor);
  constexpr int64_t kSize = Lanes<T>::kSize, kBlock = 4 * kSize;
  int64_t column = 0;
  for (; column + kBlock <= d; column += kBlock) {
    Lanes<T> sum[4];
    for (const int64_t* p = place; p < end; ++p) {
      const T* src = from + *p * d + column;
      for (int i = 0; i < 4; ++i) sum[i] = sum[i] + Lanes<T>::load(src + i * kSize);
    }
    for (int i = 0; i < 4; ++i) store(column + i * kSize, sum[i] * by, kSize);
  }
  for_each_lanes<T>(d - column, [&](int64_t k, int64_t n) {
    Lanes<T> sum;
    for (const int64_t* p = place; p < end; ++p)
      sum = sum + Lanes<T>::load(from + *p * d + column + k, n);
    store(column + k, sum * by, n);
  });
}

// out[token] = scale · the token's row, for tokens [first, last) in the order of runs.
template <typename T>
void embedding_copy(const EmbeddingArgs& args, void* out, int64_t first, int64_t last) {
  const EmbeddingRuns& runs = args.runs;
  const Vectorized<Acc<T>> by(static_cast<Acc<T>>(args.scale));
  const auto* table = static_cast<const T*>(args.table);
  int64_t r = std::upper_bound(runs.begin, runs.begin + runs.n, first) - runs.begin - 1;
  for (int64_t i = first; i < last; ++i) {
    while (i >= runs.begin[r + 1]) ++r;
    const T* src = table + runs.row[r] * args.width;
    T* dst = static_cast<T*>(out) + runs.place[i] * args.d;
    for_each_lanes<T>(
        args.d, [&](int64_t k, int64_t n) { (Lanes<T>::load(src + k, n) * by).store(dst + k, n); });
  }
}

// The table's gradient without a projection, for runs [first, last).
template <typename T>
void embedding_sum(const EmbeddingArgs& args, const EmbeddingGrads& grads, int64_t first,
                   int64_t last) {
  const auto* dout = static_cast<const T*>(grads.dout);
  for (int64_t r = first; r < last; ++r) {
    T* dst = static_cast<T*>(grads.dtable) + (grads.by_run ? r : args.runs.row[r]) * args.width;
    sum_run(args.runs, r, dout, args.d, static_cast<Acc<T>>(args.scale),
            [&](int64_t column, const Lanes<T>& sum, int64_t n) { sum.store(dst + column, n); });
  }
}

}  // namespace txl::TXL_ISA
