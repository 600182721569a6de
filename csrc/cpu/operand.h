// The operand types of each dtype's products, and the vector operations of the row passes.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "txl/gemm.h"

namespace txl::TXL_ISA {

using at::vec::Vectorized;
using c10::BFloat16;
using c10::Half;

// `Acc` is the type of scores, softmax and sums, `Operand` the type that products read. bfloat16
// stays bfloat16 on processors that multiply it and is widened to float32 on others; float16 is
// always widened.
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

// With packed operands the right-hand matrix of a product consists of pairs of rows, [K/2, N, 2].
template <typename T>
constexpr bool kPacked = std::is_same_v<Operand<T>, BFloat16>;
template <typename T>
constexpr int64_t kRowsPerWord = kPacked<T> ? 2 : 1;
// Whether products can read the caller's own rows [keys, D] as a right-hand matrix.
template <typename T>
constexpr bool kReadable = std::is_same_v<Operand<T>, T> && !kPacked<T>;
// The unit in which packed matrices are transposed and shifted: one element or one pair.
template <typename T>
using Word = std::conditional_t<kPacked<T>, float, Operand<T>>;

constexpr int64_t round_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}
// Elements (and words) of an inner dimension of `n`. Packed operands come in steps of
// `packed_step()`, filled up with zeros.
template <typename T>
int64_t row_length(int64_t n) {
  return kPacked<T> ? round_up(n, packed_step()) : n;
}
template <typename T>
int64_t row_words(int64_t n) {
  return kPacked<T> ? row_length<T>(n) / 2 : n;
}
// A leading dimension of at least `n` columns whose rows fall on different cache sets.
constexpr int64_t leading_dimension(int64_t n) {
  return (round_up(n, 16) / 16 | 1) * 16;
}

// The bits of 2^(k/8), k from 0 to 7, less k · 2^20: adding m · 2^20 for any m with m mod 8 = k
// gives the bits of 2^(m/8). Twice, because AVX-512 reads four bits of an index.
alignas(64) constexpr uint32_t kPowersOfTwo[16] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

// e^f - 1 for |f| <= ln(2) / 16.
template <typename V, typename Set, typename Fma>
V expm1_polynomial(V f, Set&& set, Fma&& fma) {
  V y = fma(set(1.f / 24), f, set(1.f / 6));
  y = fma(y, f, set(0.5f));
  return fma(f * f, y, f);
}

// e^x = 2^(m/8) · e^f for x <= 0; 0 for -inf, NaN for NaN. Relative error at most 1.0e-7 (float) if
// the result is a normal number; below, it is between 0 and the smallest normal number. Adding
// `kShift` rounds to eighths, and leaves m in the last bits.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr float kShift = 1572864.f;          // 1.5 · 2^23 / 8
constexpr float kLeastExponent = -88.0297f;  // m = -127 · 8, and 2^(m/8) has the bits of 0
#endif
#if defined(CPU_CAPABILITY_AVX512)
inline Vectorized<float> exp_nonpositive(Vectorized<float> x) {
  auto set = [](float value) { return _mm512_set1_ps(value); };
  auto fma = [](__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); };
  const __m512 bounded = _mm512_max_ps(set(kLeastExponent), x);
  const __m512 shifted = fma(bounded, set(1.44269504f), set(kShift));
  const __m512 n = _mm512_sub_ps(shifted, set(kShift));
  __m512 f = _mm512_fnmadd_ps(n, set(0.693359375f), bounded);  // ln 2 in two parts
  f = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), f);
  const __m512i m = _mm512_castps_si512(shifted);
  const __m512i fraction = _mm512_permutexvar_epi32(m, _mm512_load_si512(kPowersOfTwo));
  const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(m, 20)));
  return fma(power, expm1_polynomial(f, set, fma), power);
}
#elif defined(CPU_CAPABILITY_AVX2)
inline Vectorized<float> exp_nonpositive(Vectorized<float> x) {
  auto set = [](float value) { return _mm256_set1_ps(value); };
  auto fma = [](__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); };
  const __m256 bounded = _mm256_max_ps(set(kLeastExponent), x);
  const __m256 shifted = fma(bounded, set(1.44269504f), set(kShift));
  const __m256 n = _mm256_sub_ps(shifted, set(kShift));
  __m256 f = _mm256_fnmadd_ps(n, set(0.693359375f), bounded);  // ln 2 in two parts
  f = _mm256_fnmadd_ps(n, set(-2.12194440e-4f), f);
  const __m256i m = _mm256_castps_si256(shifted);
  const __m256i fractions = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPowersOfTwo));
  const __m256i fraction = _mm256_permutevar8x32_epi32(fractions, m);
  const __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_slli_epi32(m, 20)));
  return fma(power, expm1_polynomial(f, set, fma), power);
}
#else
inline Vectorized<float> exp_nonpositive(Vectorized<float> x) {
  return x.exp();
}
#endif
inline Vectorized<double> exp_nonpositive(Vectorized<double> x) {
  return x.exp();
}

inline void store_operand(float* dst, Vectorized<float> x) {
  x.store(dst);
}
inline void store_operand(double* dst, Vectorized<double> x) {
  x.store(dst);
}
#ifdef __AVX512BF16__
inline void store_operand(BFloat16* dst, Vectorized<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif

inline Vectorized<float> load_operand(const float* src) {
  return Vectorized<float>::loadu(src);
}
inline Vectorized<double> load_operand(const double* src) {
  return Vectorized<double>::loadu(src);
}
#ifdef __AVX512BF16__
inline Vectorized<float> load_operand(const BFloat16* src) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif

// Converts a row between a tensor's dtype, operands and the accumulation type.
template <typename From, typename To>
void convert_row(const From* src, To* dst, int64_t n) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(To));
    return;
  }
  int64_t d = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, BFloat16>) {
    for (; d + 16 <= n; d += 16) store_operand(dst + d, Vectorized<float>::loadu(src + d));
  }
#endif
  for (; d < n; ++d) dst[d] = static_cast<To>(src[d]);
}

// out[j] = (even[j], odd[j]): joins two rows to one row of pairs.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t n, float* out) {
  const auto *low = reinterpret_cast<const uint16_t*>(even),
             *high = reinterpret_cast<const uint16_t*>(odd);
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t j = 0; j < n; ++j) words[j] = low[j] | static_cast<uint32_t>(high[j]) << 16;
}

#if defined(CPU_CAPABILITY_AVX512)
// dst = src transposed, in registers.
__attribute__((always_inline)) inline void transpose_16x16(const float* src, int64_t ld_src,
                                                           float* dst, int64_t ld_dst) {
  __m512 row[16], pair[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(src + i * ld_src);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16;
       i += 4) {  // row[i + c]: columns c, c + 4, c + 8, c + 12 of rows i … i + 3
    row[i] = low(pair[i], pair[i + 2]);
    row[i + 1] = high(pair[i], pair[i + 2]);
    row[i + 2] = low(pair[i + 1], pair[i + 3]);
    row[i + 3] = high(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(row[c], row[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(row[c], row[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * ld_dst, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(dst + (c + 4) * ld_dst, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(dst + (c + 8) * ld_dst, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(dst + (c + 12) * ld_dst, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#endif

#if defined(CPU_CAPABILITY_AVX2)
// dst = src transposed, in registers.
__attribute__((always_inline)) inline void transpose_8x8(const float* src, int64_t ld_src,
                                                         float* dst, int64_t ld_dst) {
  auto halves = [&](int64_t row, int64_t column) {  // rows `row` and `row + 4`, four columns each
    const float* at = src + row * ld_src + column;
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)),
                                _mm_loadu_ps(at + 4 * ld_src), 1);
  };
  auto low = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  auto high = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
#pragma GCC unroll 2
  for (int64_t c = 0; c < 8; c += 4) {
    const __m256 row0 = halves(0, c), row1 = halves(1, c), row2 = halves(2, c), row3 = halves(3, c);
    const __m256 low01 = _mm256_unpacklo_ps(row0, row1), high01 = _mm256_unpackhi_ps(row0, row1);
    const __m256 low23 = _mm256_unpacklo_ps(row2, row3), high23 = _mm256_unpackhi_ps(row2, row3);
    _mm256_storeu_ps(dst + c * ld_dst, low(low01, low23));
    _mm256_storeu_ps(dst + (c + 1) * ld_dst, high(low01, low23));
    _mm256_storeu_ps(dst + (c + 2) * ld_dst, low(high01, high23));
    _mm256_storeu_ps(dst + (c + 3) * ld_dst, high(high01, high23));
  }
}
#endif

// dst[n, m] = src[m, n] for m and n up to 16. ATen's routine takes twice as long, since it goes
// through memory.
template <typename W>
void transpose_block(const W* src, int64_t ld_src, W* dst, int64_t ld_dst, int64_t m, int64_t n) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<W, float>) {
    if (m == 16 && n == 16) return transpose_16x16(src, ld_src, dst, ld_dst);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<W, float>) {
    if (m == 16 && n == 16) {
      for (int64_t c = 0; c < 16; c += 8) {
        transpose_8x8(src + c, ld_src, dst + c * ld_dst, ld_dst);
        transpose_8x8(src + 8 * ld_src + c, ld_src, dst + c * ld_dst + 8, ld_dst);
      }
      return;
    }
  }
#endif
  at::vec::transpose_mxn<W>(src, ld_src, dst, ld_dst, static_cast<int>(m), static_cast<int>(n));
}

// Row loops process whole vectors: row lengths are multiples of 16, or the tail is explicit.
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
  return at::vec::vec_reduce_all<acc_t>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, best0);
}

template <typename acc_t>
acc_t sum_of(Vectorized<acc_t> x) {
  using Vec = Vectorized<acc_t>;
  return at::vec::vec_reduce_all<acc_t>([](Vec a, Vec b) { return a + b; }, x);
}

}  // namespace txl::TXL_ISA
