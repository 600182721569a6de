// What a dtype's products are made of, and the vector operations that the row passes need.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace txl::TXL_ISA {

using at::vec::Vectorized;
using c10::BFloat16;
using c10::Half;

// `Acc`: scores, softmax, sums. `Operand`: what products read. bfloat16 stays bfloat16 where the
// processor multiplies it, and is widened to float32 elsewhere, as float16 always is.
template <typename T>
struct Types {
  using Acc = float;
  using Operand = float;
};
template <>
struct Types<double> {
  using Acc = double;
  using Operand = double;
};
#ifdef __AVX512BF16__
template <>
struct Types<BFloat16> {
  using Acc = float;
  using Operand = BFloat16;
};
#endif

template <typename T>
using Acc = typename Types<T>::Acc;
template <typename T>
using Operand = typename Types<T>::Operand;

// Packed operands: the right-hand matrix of a product stands in pairs of rows, [K/2, N, 2].
template <typename T>
constexpr bool kPacked = std::is_same_v<Operand<T>, BFloat16>;
// The right-hand matrix [keys, D] can be read where the caller keeps it.
template <typename T>
constexpr bool kInPlace = std::is_same_v<Operand<T>, T> && !kPacked<T>;
// The unit in which packed matrices are transposed and shifted: one element, or one pair.
template <typename T>
using Word = std::conditional_t<kPacked<T>, float, Operand<T>>;
// Elements of one row of `n` operands, an even number where they are packed.
template <typename T>
constexpr int64_t row_length(int64_t n) {
  return kPacked<T> ? (n + 1) / 2 * 2 : n;
}
template <typename T>
constexpr int64_t row_words(int64_t n) {
  return kPacked<T> ? (n + 1) / 2 : n;
}

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
// A leading dimension of at least `n` columns whose rows fall on different cache sets.
constexpr int64_t leading_dimension(int64_t n) { return (round_up(n, 16) / 16 | 1) * 16; }

// 2^x for x <= 0; 0 for -inf, NaN for NaN. Relative error at most 1.9e-7 (float).
#if defined(CPU_CAPABILITY_AVX512)
inline Vectorized<float> exp2_nonpositive(Vectorized<float> x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-160.f), x);
  const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(bounded, n);
  __m512 y = _mm512_set1_ps(0.00132647273f);  // minimax on [-1/2, 1/2] with 2^0 = 1 exactly
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.00967151299f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0555073358f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240222424f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693147004f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, n);
}
#else
inline Vectorized<float> exp2_nonpositive(Vectorized<float> x) { return x.exp2(); }
#endif
inline Vectorized<double> exp2_nonpositive(Vectorized<double> x) { return x.exp2(); }

template <typename acc_t>
acc_t exp2_nonpositive(acc_t x) {
  return std::exp2(x);
}

inline void store_operand(float* dst, Vectorized<float> x) { x.store(dst); }
inline void store_operand(double* dst, Vectorized<double> x) { x.store(dst); }
#ifdef __AVX512BF16__
inline void store_operand(BFloat16* dst, Vectorized<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

// Rows between a tensor's dtype and the accumulation type.
template <typename From, typename To>
void convert_row(const From* src, To* dst, int64_t n) {
  int64_t d = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, BFloat16>) {
    for (; d + 16 <= n; d += 16) store_operand(dst + d, Vectorized<float>::loadu(src + d));
  }
#endif
  for (; d < n; ++d) dst[d] = static_cast<To>(src[d]);
}

// Row loops run over whole vectors: row lengths are multiples of 16, or the tail is explicit.
template <typename acc_t>
acc_t row_max(const acc_t* row, int64_t n) {
  using Vec = Vectorized<acc_t>;
  Vec best0(row[0]), best1 = best0;
  int64_t j = 0;
  for (; j + 2 * Vec::size() <= n; j += 2 * Vec::size()) {
    best0 = at::vec::maximum(best0, Vec::loadu(row + j));
    best1 = at::vec::maximum(best1, Vec::loadu(row + j + Vec::size()));
  }
  for (; j < n; j += Vec::size()) best0 = at::vec::maximum(best0, Vec::loadu(row + j));
  best0 = at::vec::maximum(best0, best1);
  return at::vec::vec_reduce_all<acc_t>(
      [](Vec a, Vec b) { return at::vec::maximum(a, b); }, best0);
}

template <typename acc_t>
acc_t sum_of(Vectorized<acc_t> x) {
  using Vec = Vectorized<acc_t>;
  return at::vec::vec_reduce_all<acc_t>([](Vec a, Vec b) { return a + b; }, x);
}

}  // namespace txl::TXL_ISA
