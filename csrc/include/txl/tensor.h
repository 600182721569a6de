// What every kernel, on every device, is told about a tensor.
#pragma once

#include <cstdint>

#include "txl/host_device.h"

namespace txl {

enum class Scalar { f32, f64, f16, bf16 };

// A [B, H, T, D] tensor whose last dimension is contiguous; strides in elements, 0 = broadcast.
struct Tensor4 {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_t = 0;

  template <typename T>
  TXL_HOST_DEVICE T* head(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h;
  }
};

}  // namespace txl
