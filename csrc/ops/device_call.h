// A call on an accelerator without its headers: the device made current, and its stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace txl {

class DeviceCall {
 public:
  explicit DeviceCall(const at::Tensor& x)
      : guard_(x.device()),
        stream_(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device())) {}

  // What kernels are enqueued on: torch's current stream of the device.
  void* stream() const { return stream_.native_handle(); }

  static void check(const char* op, const char* error) {
    TORCH_CHECK(error == nullptr, op, ": the launch of a CUDA kernel failed: ", error);
  }

 private:
  c10::DeviceGuard guard_;
  c10::Stream stream_;
};

}  // namespace txl
