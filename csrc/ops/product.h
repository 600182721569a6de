// What the adaptive ops share: absent tensors, and torch's own product for their projections.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include "arguments.h"
#include "txl/gemm.h"

namespace txl {

// An empty tensor stands for an absent one in a list.
inline bool present(const at::Tensor& x) {
  return x.dim() != 1 || x.size(0) != 0;
}

// a · b in the dtype that this processor multiplies best; b has the caller's dtype.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  const bool widen =
      b.scalar_type() == at::kHalf || (b.scalar_type() == at::kBFloat16 && !has_packed_products());
  const auto dtype = widen ? at::kFloat : b.scalar_type();
  return at::mm(a.to(dtype), b.to(dtype));
}

}  // namespace txl
