// Tile products by oneDNN's micro-kernels (ATen's brgemm) or by the BLAS library inside torch.
#include "txl/gemm.h"

#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <dlfcn.h>

#include <algorithm>

#include "processor.h"

namespace txl {
namespace {

using at::native::cpublas::brgemm;

template <typename T>
using BlasGemm = void (*)(const char* transa, const char* transb, const int* m, const int* n,
                          const int* k, const T* alpha, const T* a, const int* lda, const T* b,
                          const int* ldb, const T* beta, T* c, const int* ldc);

template <typename T>
BlasGemm<T> blas_symbol(const char* name) {
  return reinterpret_cast<BlasGemm<T>>(dlsym(RTLD_DEFAULT, name));
}

BlasGemm<float> sgemm() {
  static const auto symbol = blas_symbol<float>("sgemm_");
  return symbol;
}

BlasGemm<double> dgemm() {
  static const auto symbol = blas_symbol<double>("dgemm_");
  return symbol;
}

// Fortran BLAS is column-major: C^T = B^T · A^T.
template <typename T>
void call_blas(BlasGemm<T> gemm, int64_t M, int64_t N, int64_t K, const T* A, int64_t lda,
               const T* B, int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  const int m = static_cast<int>(N), n = static_cast<int>(M), k = static_cast<int>(K);
  const int la = static_cast<int>(ldb), lb = static_cast<int>(lda), lc = static_cast<int>(ldc);
  const T alpha = 1, beta = accumulate ? 1 : 0;
  gemm("N", "N", &m, &n, &k, &alpha, B, &la, A, &lb, &beta, C, &lc);
}

// In the last M % 4 rows MKL adds every single product to C, so that each of K additions is rounded
// at C's magnitude (K 64: 9 units in the last place of C instead of 1). These rows are multiplied
// into a buffer and added once.
template <typename T>
void blas(BlasGemm<T> gemm, int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B,
          int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  const int64_t whole = accumulate ? M / 4 * 4 : M;
  if (whole > 0) call_blas(gemm, whole, N, K, A, lda, B, ldb, C, ldc, accumulate);
  if (whole == M) return;
  constexpr int64_t kColumns = 256;
  T product[3 * kColumns];
  for (int64_t column = 0; column < N; column += kColumns) {
    const int64_t n = std::min(kColumns, N - column);
    call_blas(gemm, M - whole, n, K, A + whole * lda, lda, B + column, ldb, product, n, false);
    for (int64_t row = whole; row < M; ++row) {
      for (int64_t j = 0; j < n; ++j) C[row * ldc + column + j] += product[(row - whole) * n + j];
    }
  }
}

bool has_avx512() {
  static const bool yes = at::get_cpu_capability() == "AVX512";
  return yes;
}

// A product of ones. ATen's brgemm throws if oneDNN has no micro-kernel for this processor, or if
// ONEDNN_MAX_CPU_ISA forbids it.
template <typename T>
bool brgemm_runs(bool is_vnni) {
  constexpr int64_t N = 16, K = 32;
  T a[K], b[K * N];
  float c[N] = {};
  std::fill_n(a, K, T(1.f));
  std::fill_n(b, K * N, T(1.f));
  try {
    brgemm(1, N, K, K, N, N, false, a, b, c, is_vnni);
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {
    return false;
  }
  return c[0] == K;
}

// With AVX-512 brgemm is faster for every shape that our kernels use. With AVX2 it is up to 1.25
// times as fast as MKL's sgemm while B stays in the second-level cache, and slower beyond: on an
// AMD EPYC (family 25 model 1), one thread, [64, K]·[K, N] in GFLOP/s, brgemm and sgemm: K 64, N
// 512 89 and 72; K 512, N 128 88 and 76; K 512, N 256 74 and 80; K 512, N 1024 69 and 75. The
// choice depends on the processor and the shape only, so that two runs on one machine give the same
// bits.
bool prefers_brgemm(int64_t N, int64_t K) {
  constexpr int64_t kCachedElements = 1 << 16;
  return has_brgemm() && (has_avx512() || N * K <= kCachedElements || sgemm() == nullptr);
}

}  // namespace

bool has_brgemm() {
  static const bool yes = at::get_cpu_capability() != "DEFAULT" && brgemm_runs<float>(false);
  return yes;
}

bool has_packed_products() {
  static const bool yes = has_avx512() && has_avx512_bf16() && brgemm_runs<c10::BFloat16>(true);
  return yes;
}

int64_t packed_step() {
  static const int64_t step = has_amx_bf16() ? 16 : 2;
  return step;
}

void gemm_by_blas(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B,
                  int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  blas(sgemm(), M, N, K, A, lda, B, ldb, C, ldc, accumulate);
}

void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
          float* C, int64_t ldc, bool accumulate) {
  if (prefers_brgemm(N, K)) {
    brgemm(M, N, K, lda, ldb, ldc, accumulate, A, B, C);
  } else {
    gemm_by_blas(M, N, K, A, lda, B, ldb, C, ldc, accumulate);
  }
}

void gemm(int64_t M, int64_t N, int64_t K, const double* A, int64_t lda, const double* B,
          int64_t ldb, double* C, int64_t ldc, bool accumulate) {
  blas(dgemm(), M, N, K, A, lda, B, ldb, C, ldc, accumulate);
}

void gemm(int64_t M, int64_t N, int64_t K, const c10::BFloat16* A, int64_t lda,
          const c10::BFloat16* B, int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  brgemm(M, N, K, lda, ldb, ldc, accumulate, A, B, C, /*is_vnni=*/true);
}

void gemm_release() {
  if (has_brgemm()) at::native::cpublas::brgemm_release();
}

const char* gemm_unavailable_reason() {
  if (dgemm() == nullptr) return "this torch exports no dgemm_ for float64 tile products";
  if (!has_brgemm() && sgemm() == nullptr) {
    return "oneDNN's micro-kernels do not support this processor and this torch exports no sgemm_";
  }
  return nullptr;
}

}  // namespace txl
