// How fast tile products can go here: the limit that benchmarks are held against.
#pragma once

#include <cstdint>
#include <string>

namespace txl {

// GFLOP/s of C[M, N] = A[M, K] · B[K, N] from cache on all of ATen's threads, the best of several
// short runs over about `seconds`. kind: "brgemm_f32", "brgemm_bf16" or "sgemm"; 0 where it cannot
// run.
double probe_gemm(const std::string& kind, int64_t M, int64_t N, int64_t K, double seconds);

}  // namespace txl
