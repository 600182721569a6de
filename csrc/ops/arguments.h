// From a schema's arguments to the arguments of kernels, for the bindings of every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

inline Scalar scalar_of(const char* op, const char* argument, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Scalar::f32;
    case at::kDouble:
      return Scalar::f64;
    case at::kHalf:
      return Scalar::f16;
    case at::kBFloat16:
      return Scalar::bf16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", argument,
                       " must be float32, float64, float16 or bfloat16, got ", x.scalar_type());
  }
}

inline at::ScalarType acc_dtype(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor4 view4(const at::Tensor& x) {
  auto stride = [&](int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); };
  return {x.data_ptr(), stride(0), stride(1), x.stride(2)};
}

// The offset of `r`, or the closest one at which every pair of a query and a key reads the same row
// or, as at `offset`, a row outside of `r` on the same side. Sums with it do not overflow.
inline int64_t near_offset(int64_t offset, int64_t Tq, int64_t Tk, int64_t R) {
  return std::clamp(offset, -Tk, R + Tq);
}

}  // namespace txl
