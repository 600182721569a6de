// The product of few rows of x with a weight that is read once, in place, row by row.
//
// A call computes the outputs of a range of weight rows, `kWeightRows` at a time. Each vector of
// the weight is multiplied with up to `kGroup` rows of x while it is in a register; the
// accumulators are vectors along K, whose elements are added at the end. More rows of x are
// processed in groups: all groups use a chunk of K before the next chunk, so that the weight is in
// the first-level cache for all groups but the first. The order of a row's additions does not
// depend on the other rows or on the number of threads.
#include "txl/few_row_linear.h"

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "operand.h"

namespace txl::TXL_ISA {
namespace {

constexpr int64_t C = kWeightRows;
constexpr int64_t kRowBlock = 16;  // rows of x that one pass over the weight multiplies
constexpr int64_t kChunk = 512;    // elements of K that all groups process before the next ones
// The registers hold C · kGroup accumulators, kGroup vectors of x and one of the weight.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kGroup = 6;
#else
constexpr int64_t kGroup = 3;
#endif
constexpr int64_t kLine = 64, kPrefetchBytes = 8192;

template <typename T>
constexpr int64_t kLanes = Vectorized<T>::size();

// A vector of weights in the accumulation type A.
template <typename A, typename W>
Vectorized<A> widened(const W* src) {
  if constexpr (std::is_same_v<A, W>) {
    return Vectorized<A>::loadu(src);
  } else if constexpr (std::is_same_v<A, float> && !std::is_same_v<W, int8_t>) {
    Vectorized<float> x;
    at::vec::load_to_float(src, x);
    return x;
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<A, float>)
      return _mm512_cvtepi32_ps(
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<A, float>)
      return _mm256_cvtepi32_ps(
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src))));
#endif
    alignas(64) A x[kLanes<A>];
    for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = static_cast<A>(src[i]);
    return Vectorized<A>::loadu(x);
  }
}

// The same with only the first `n` weights, and zeros after them.
template <typename A, typename W>
Vectorized<A> widened(const W* src, int64_t n) {
  W x[kLanes<A>] = {};
  std::copy_n(src, n, x);
  return widened<A>(x);
}

// Elements [0, n) of adjacent rows of the weight, from a column on.
template <typename W>
struct Piece {
  const W* first;
  int64_t ld, n;
  int64_t ahead;       // elements from each element to the one to prefetch
  int64_t begin, end;  // rows whose elements are prefetched
};

// sums[m, c] += x[m, k] · weight[c, k], vector by vector, or = if `fresh`, for M rows of x and N
// rows of the weight.
template <int64_t M, int64_t N, typename A, typename W>
void accumulate(const A* x, int64_t ld_x, const Piece<W>& w, bool fresh, Vectorized<A>* sums) {
  using Vec = Vectorized<A>;
  Vec sum[M][N];
  auto over_tile = [&](auto&& action) {
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int64_t c = 0; c < N; ++c) action(m, c);
    }
  };
  over_tile([&](int64_t m, int64_t c) { sum[m][c] = fresh ? Vec(A(0)) : sums[m * C + c]; });
  auto step = [&](auto&& x_at, auto&& w_at) {
    Vec rows[M];
#pragma GCC unroll 8
    for (int64_t m = 0; m < M; ++m) rows[m] = x_at(x + m * ld_x);
#pragma GCC unroll 8
    for (int64_t c = 0; c < N; ++c) {
      const Vec weight = w_at(w.first + c * w.ld);
#pragma GCC unroll 8
      for (int64_t m = 0; m < M; ++m) sum[m][c] = at::vec::fmadd(rows[m], weight, sum[m][c]);
    }
  };
  auto whole_step = [&](int64_t k) {
    step([k](const A* row) { return Vec::loadu(row + k); },
         [k](const W* row) { return widened<A>(row + k); });
  };
  int64_t k = 0;
  constexpr int64_t kPerLine = std::max<int64_t>(kLine / sizeof(W), kLanes<A>);
  for (; k + kPerLine <= w.n; k += kPerLine) {
    for (int64_t c = w.begin; c < w.end; ++c)
      __builtin_prefetch(w.first + c * w.ld + k + w.ahead, 0, 2);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kPerLine; i += kLanes<A>) whole_step(k + i);
  }
  for (; k + kLanes<A> <= w.n; k += kLanes<A>) whole_step(k);
  if (const int64_t rest = w.n - k; rest > 0) {
    step([&](const A* row) { return Vec::loadu(row + k, rest); },
         [&](const W* row) { return widened<A>(row + k, rest); });
  }
  over_tile([&](int64_t m, int64_t c) { sums[m * C + c] = sum[m][c]; });
}

// `accumulate` for 1 … kGroup rows of x.
template <int64_t N, typename A, typename W>
void accumulate_rows(int64_t M, const A* x, int64_t ld_x, const Piece<W>& w, bool fresh,
                     Vectorized<A>* sums) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    constexpr void (*kByRows[])(const A*, int64_t, const Piece<W>&, bool,
                                Vectorized<A>*) = {accumulate<I + 1, N, A, W>...};
    kByRows[M - 1](x, ld_x, w, fresh, sums);
  }(std::make_index_sequence<kGroup>());
}

// out[c]: the sum of the elements of sums[c], for C vectors.
template <typename A>
void reduce(const Vectorized<A>* sums, A* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    static_assert(C == 4, "one vector holds the sums");
    auto half = [&](int64_t c) {
#if defined(CPU_CAPABILITY_AVX512)
      return _mm256_add_ps(_mm512_castps512_ps256(sums[c]), _mm512_extractf32x8_ps(sums[c], 1));
#else
      return static_cast<__m256>(sums[c]);
#endif
    };
    const __m256 pairs =
        _mm256_hadd_ps(_mm256_hadd_ps(half(0), half(1)), _mm256_hadd_ps(half(2), half(3)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
    return;
  }
#endif
  for (int64_t c = 0; c < C; ++c) out[c] = sum_of(sums[c]);
}

template <typename A>
A element(const PerOutput& values, int64_t n) {
  switch (values.dtype) {
    case Scalar::f32:
      return static_cast<A>(static_cast<const float*>(values.data)[n]);
    case Scalar::f64:
      return static_cast<A>(static_cast<const double*>(values.data)[n]);
    case Scalar::f16:
      return static_cast<A>(static_cast<const Half*>(values.data)[n]);
    default:
      return static_cast<A>(static_cast<const BFloat16*>(values.data)[n]);
  }
}

// The outputs of rows n … n + N - 1 of the weight for rows `first` … `first + M - 1` of x. `sums`
// is scratch memory; with N < C, some of its elements are summed and not used.
template <int64_t N, typename T, typename W>
void block(const FewRowLinearArgs& args, int64_t n, int64_t first, int64_t M,
           Vectorized<Acc<T>>* sums) {
  using A = Acc<T>;
  const A* x = static_cast<const A*>(args.x) + first * args.ld_x;
  const W* weight = static_cast<const W*>(args.weight) + n * args.ld_weight;
  const int64_t n_groups = (M + kGroup - 1) / kGroup;
  const int64_t block_bytes = std::max<int64_t>(1, C * args.ld_weight * sizeof(W));
  const int64_t ahead = (kPrefetchBytes / block_bytes + 1) * C * args.ld_weight;
  const int64_t chunk = n_groups == 1 ? std::max<int64_t>(1, args.K) : kChunk;
  for (int64_t k = 0; k == 0 || k < args.K; k += chunk) {
    for (int64_t g = 0; g < n_groups; ++g) {
      auto share = [&](int64_t n) { return std::pair(g * n / n_groups, (g + 1) * n / n_groups); };
      const auto [m, end] = share(M);
      const auto [prefetch_begin, prefetch_end] = share(N);
      const Piece<W> piece{weight + k, args.ld_weight, std::min(chunk, args.K - k),
                           ahead,      prefetch_begin, prefetch_end};
      accumulate_rows<N>(end - m, x + m * args.ld_x + k, args.ld_x, piece, k == 0, sums + m * C);
    }
  }
  T* out = static_cast<T*>(args.out) + first * args.N + n;
  A scale[N], bias[N];
  for (int64_t c = 0; c < N; ++c) {
    scale[c] = args.scale.data != nullptr ? element<A>(args.scale, n + c) : A(1);
    bias[c] = args.bias.data != nullptr ? element<A>(args.bias, n + c) : A(0);
  }
  for (int64_t m = 0; m < M; ++m) {
    A total[C];
    reduce(sums + m * C, total);
    for (int64_t c = 0; c < N; ++c)
      out[m * args.N + c] = static_cast<T>(total[c] * scale[c] + bias[c]);
  }
}

template <typename T, typename W>
void run(const FewRowLinearArgs& args, int64_t begin, int64_t end) {
  Vectorized<Acc<T>> sums[kRowBlock * C];
  for (int64_t first = 0; first < args.M; first += kRowBlock) {
    const int64_t M = std::min(kRowBlock, args.M - first);
    int64_t n = begin;
    for (; n + C <= end; n += C) block<C, T, W>(args, n, first, M, sums);
    for (; n < end; ++n) block<1, T, W>(args, n, first, M, sums);
  }
}

template <typename T>
void widen(const void* x, void* wide, int64_t n) {
  convert_row(static_cast<const T*>(x), static_cast<Acc<T>*>(wide), n);
}

}  // namespace

const FewRowLinearKernels few_row_linear_kernels[4] = {
    {widen<float>, {run<float, float>, run<float, int8_t>, run<float, Half>, run<float, BFloat16>}},
    {widen<double>, {run<double, double>, run<double, int8_t>}},
    {widen<Half>, {run<Half, Half>, run<Half, int8_t>}},
    {widen<BFloat16>, {run<BFloat16, BFloat16>, run<BFloat16, int8_t>}}};

}  // namespace txl::TXL_ISA
