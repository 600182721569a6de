// few_row_linear on the CPU: x · weightᵀ for few rows of x, in the time of reading the weight once.
#pragma once

#include <cstdint>

#include "txl/tensor.h"

namespace txl {

// The dtype of a weight: x's dtype or one of the others.
enum class LinearWeight { same, int8, f16, bf16 };
constexpr int kLinearWeights = 4;

// One number for each row of the weight, contiguous; data null if absent.
struct PerOutput {
  const void* data = nullptr;
  Scalar dtype = Scalar::f32;
};

// out[m, n] = scale[n] · Σ_k x[m, k] · weight[n, k] + bias[n], without scale and bias where absent.
struct FewRowLinearArgs {
  int64_t M = 0, N = 0, K = 0;
  const void* x = nullptr;       // [M, K] in the accumulation type, adjacent columns
  int64_t ld_x = 0;              // elements from one row of x to the next
  const void* weight = nullptr;  // [N, K], adjacent columns
  int64_t ld_weight = 0;         // elements from one row of the weight to the next
  PerOutput bias, scale;
  void* out = nullptr;  // [M, N] in the dtype of x before it was widened, contiguous
};

// Rows of the weight that are read together: the unit in which threads divide N.
constexpr int64_t kWeightRows = 4;

// One dtype's kernels: `widen` converts `n` elements of x to the accumulation type. `run`, by the
// weight's dtype, computes the outputs of rows [begin, end) of the weight; null if not supported.
struct FewRowLinearKernels {
  void (*widen)(const void* x, void* wide, int64_t n);
  void (*run[kLinearWeights])(const FewRowLinearArgs&, int64_t begin, int64_t end);
};

const FewRowLinearKernels& few_row_linear_kernels(Scalar dtype);

}  // namespace txl
