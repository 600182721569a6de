// The one matrix product under every CPU kernel: small row-major tiles, called by one thread.
#pragma once

#include <cstdint>

namespace c10 {
struct BFloat16;
}

namespace txl {

// C[M, N] = A[M, K] · B[K, N]  (+ C if `accumulate`), all row-major with leading dimensions in
// columns. Leading dimensions may be odd and pointers unaligned; N must not exceed `ldc`.
void gemm(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
          float* C, int64_t ldc, bool accumulate);
void gemm(int64_t M, int64_t N, int64_t K, const double* A, int64_t lda, const double* B,
          int64_t ldb, double* C, int64_t ldc, bool accumulate);

// B in pairs of rows: [K/2, N, 2], K even; `ldb` counts columns (pairs).
void gemm(int64_t M, int64_t N, int64_t K, const c10::BFloat16* A, int64_t lda,
          const c10::BFloat16* B, int64_t ldb, float* C, int64_t ldc, bool accumulate);

// The float32 product by torch's BLAS, whatever `gemm` prefers here.
void gemm_by_blas(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B,
                  int64_t ldb, float* C, int64_t ldc, bool accumulate);

// What decides between them: micro-kernels at all, and for packed bfloat16 (they also exist,
// slowly, where the processor has no such products).
bool has_brgemm();
bool has_packed_products();
// The inner dimension of packed products had best be a multiple of this: of pairs, or of 16 where
// tile registers multiply, which a remainder slows down by 2.5 to 20 times.
int64_t packed_step();

// Each thread calls this after its last product: it hands back the tile registers where there are.
void gemm_release();

// Null where products can run; else one sentence for people.
const char* gemm_unavailable_reason();

}  // namespace txl
