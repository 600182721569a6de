// Large tensors of zeros, such as a table's gradient, of which few rows will ever be written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>

#include "workspace.h"

namespace txl {

// Zeros on huge pages that the system clears when they are first written: what nobody writes costs
// nothing. Below a few pages, and where the system gives no memory, zeros like any others.
inline at::Tensor fresh_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes =
      c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (bytes < 2 * kHugePage) return at::zeros(sizes, options);
  const auto length = static_cast<size_t>(bytes + kHugePage);
  void* mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return at::zeros(sizes, options);
  char* begin = static_cast<char*>(mapped);
  begin += (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  advise_huge_pages(begin, bytes);
  c10::DataPtr data = at::InefficientStdFunctionContext::makeDataPtr(
      begin, [mapped, length](void*) { munmap(mapped, length); }, at::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data),
                       c10::GetCPUAllocator(), /*resizable=*/true);
  return at::empty({0}, options).set_(std::move(storage), 0, sizes);
}

}  // namespace txl
