// The probe of tile products that benchmarks quote as the machine's limit.
#include "txl/probe_gemm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>

#include <chrono>

#include "txl/gemm.h"

namespace txl {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Best rate over repetitions of `product(thread)`, each thread on matrices of its own.
template <typename F>
double best_rate(double flop, double seconds, F&& product) {
  const int64_t threads = at::get_num_threads();
  const int64_t repeats = std::max<int64_t>(1, static_cast<int64_t>(2e8 / flop));
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto run = Clock::now();
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        for (int64_t i = 0; i < repeats; ++i) product(thread);
      }
      gemm_release();
    });
    best = std::max(best, static_cast<double>(threads * repeats) * flop / seconds_since(run) / 1e9);
  } while (seconds_since(start) < seconds);
  return best;
}

}  // namespace

double probe_gemm(const std::string& kind, int64_t M, int64_t N, int64_t K, double seconds) {
  TORCH_CHECK_VALUE(kind == "brgemm_f32" || kind == "brgemm_bf16" || kind == "sgemm",
                    "probe_gemm: kind must be brgemm_f32, brgemm_bf16 or sgemm, got ", kind);
  const double flop = 2.0 * static_cast<double>(M * N) * static_cast<double>(K);
  const int64_t threads = at::get_num_threads();
  const at::Tensor A = at::randn({threads, M, K}), B = at::randn({threads, K, N});
  const at::Tensor C = at::empty({threads, M, N});
  auto c = [&](int64_t thread) { return C.data_ptr<float>() + thread * M * N; };
  if (kind == "brgemm_bf16") {
    if (!has_packed_products()) return 0;
    const at::Tensor A16 = A.to(at::kBFloat16), B16 = B.to(at::kBFloat16);
    const auto *a = A16.const_data_ptr<at::BFloat16>(), *b = B16.const_data_ptr<at::BFloat16>();
    return best_rate(flop, seconds, [&](int64_t t) {
      gemm(M, N, K, a + t * M * K, K, b + t * K * N, N, c(t), N, false);
    });
  }
  const auto *a = A.const_data_ptr<float>(), *b = B.const_data_ptr<float>();
  if (kind == "sgemm") {
    return best_rate(flop, seconds, [&](int64_t t) {
      gemm_by_blas(M, N, K, a + t * M * K, K, b + t * K * N, N, c(t), N, false);
    });
  }
  if (!has_brgemm()) return 0;
  return best_rate(flop, seconds, [&](int64_t t) {
    gemm(M, N, K, a + t * M * K, K, b + t * K * N, N, c(t), N, false);
  });
}

}  // namespace txl
