// The description of a tensor that kernels on every device receive.
#pragma once

#include <cstdint>

#include "txl/host_device.h"

namespace txl {

constexpr int kMaxHeadSize = TXL_MAX_HEAD_SIZE;  // set by CMakeLists.txt

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
