// Tile products by oneDNN's micro-kernels (ATen's brgemm), else by the BLAS that torch carries.
#include "txl/gemm.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>
#include <dlfcn.h>

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
void blas(BlasGemm<T> gemm, int64_t M, int64_t N, int64_t K, const T* A, int64_t lda, const T* B,
          int64_t ldb, T* C, int64_t ldc, bool accumulate) {
  const int m = static_cast<int>(N), n = static_cast<int>(M), k = static_cast<int>(K);
  const int la = static_cast<int>(ldb), lb = static_cast<int>(lda), lc = static_cast<int>(ldc);
  const T alpha = 1, beta = accumulate ? 1 : 0;
  gemm("N", "N", &m, &n, &k, &alpha, B, &la, A, &lb, &beta, C, &lc);
}

}  // namespace

// oneDNN serves tiles from AVX-512 on. By processor, never by timing: one machine, the same bits.
bool has_brgemm() {
  static const bool yes = at::get_cpu_capability() == "AVX512";
  return yes;
}

bool has_packed_products() {
  static const bool yes = has_brgemm() && __builtin_cpu_supports("avx512bf16");
  return yes;
}

int64_t packed_step() {
  static const int64_t step = at::cpu::init_amx() && __builtin_cpu_supports("amx-bf16") ? 16 : 2;
  return step;
}

void gemm_by_blas(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B,
                  int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  blas(sgemm(), M, N, K, A, lda, B, ldb, C, ldc, accumulate);
}

void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
          float* C, int64_t ldc, bool accumulate) {
  if (has_brgemm()) {
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
    return "this processor has no AVX-512 and this torch exports no sgemm_";
  }
  return nullptr;
}

}  // namespace txl
