// The matrix product that all CPU kernels share: small row-major tiles, computed by one thread.
#pragma once

#include <cstdint>

namespace c10 {
struct BFloat16;
}

namespace txl {

// C[M, N] = A[M, K] · B[K, N]  (+ C if `accumulate`). All matrices are row-major; leading
// dimensions count columns. `lda >= K`, `ldb >= N` and `ldc >= N` must hold: BLAS refuses other
// values and leaves C unwritten. Pointers may be unaligned, leading dimensions odd.
//
// ATen generates machine code for each (M, N, K, lda, ldb, ldc, accumulate) and keeps it for the
// lifetime of the thread. Callers therefore use few distinct values of each.
void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
          float* C, int64_t ldc, bool accumulate);
void gemm(int64_t M, int64_t N, int64_t K, const double* A, int64_t lda, const double* B,
          int64_t ldb, double* C, int64_t ldc, bool accumulate);

// B consists of pairs of rows, [K/2, N, 2]. K is even; `ldb` counts columns of pairs.
void gemm(int64_t M, int64_t N, int64_t K, const c10::BFloat16* A, int64_t lda,
          const c10::BFloat16* B, int64_t ldb, float* C, int64_t ldc, bool accumulate);

// The float32 product by torch's BLAS, whichever library `gemm` would choose.
void gemm_by_blas(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B,
                  int64_t ldb, float* C, int64_t ldc, bool accumulate);

// Whether oneDNN's micro-kernels compute float32 products on this processor.
bool has_brgemm();
// Whether this processor has instructions for packed bfloat16 products.
bool has_packed_products();
// The inner dimension of packed products should be a multiple of this number: 2 (pairs of rows), or
// 16 on processors with tile registers, where a remainder makes the product 2.5 to 20 times slower.
int64_t packed_step();

// Each thread calls this after its last product. It releases the tile registers, if there are any.
void gemm_release();

// Null if products can run on this machine; otherwise one sentence that says why not.
const char* gemm_unavailable_reason();

}  // namespace txl
