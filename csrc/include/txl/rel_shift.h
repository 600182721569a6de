// rel_shift on the CPU: the relative shift alone, and its adjoint.
#pragma once

#include <cstdint>

#include "txl/rel_attention.h"

namespace txl {

// n rows in matrices of Tq: [n, R] against [n, n_keys], both contiguous:
// with i = row mod Tq, out[row, j] = x[row, j - i + offset], zero where no such column exists.
struct RelShiftArgs {
  int64_t n, Tq, R, n_keys, offset;
  const void* src;
  void* dst;
};

// Rows [begin, end) of the n rows (each matrix has Tq of them).
struct RelShiftKernels {
  void (*fwd)(const RelShiftArgs&, int64_t begin, int64_t end);
  void (*bwd)(const RelShiftArgs&, int64_t begin, int64_t end);  // src is dout, dst is dx
};

const RelShiftKernels& rel_shift_kernels(Scalar dtype);

}  // namespace txl
