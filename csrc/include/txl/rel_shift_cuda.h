// rel_shift on CUDA: one copying kernel for both directions and every dtype.
#pragma once

#include <cstdint>

namespace txl {

// n rows in matrices of Tq, both sides contiguous: with i = row mod Tq,
// dst[row, c] = src[row, c + step · i + base], zero where src has no such column.
struct ShiftArgs {
  const void* src = nullptr;  // [n, n_src]
  void* dst = nullptr;        // [n, n_dst]
  int64_t n = 0, Tq = 1, n_src = 0, n_dst = 0;
  int64_t step = 0, base = 0;  // forward -1, offset; backward 1, -offset
};

// Enqueues on `stream` (a cudaStream_t). Null, or what CUDA says went wrong.
const char* rel_shift_cuda(int64_t element_bytes, ShiftArgs args, void* stream);

}  // namespace txl
