// ATen bindings of rel_shift on CUDA.
#include "txl/rel_shift_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "arguments.h"
#include "device_call.h"

namespace txl {
namespace {

using at::Tensor;

// A result like `src_` with `columns` in its last dimension; `step` and `base` are ShiftArgs'.
Tensor shift(const char* argument, const Tensor& src_, int64_t columns, int64_t step,
             int64_t base) {
  scalar_of("rel_shift", argument, src_);  // raises for unsupported dtypes
  const DeviceCall call(src_);
  const Tensor src = src_.contiguous();
  auto sizes = src.sizes().vec();
  sizes.back() = columns;
  const Tensor dst = at::empty(sizes, src.options());
  ShiftArgs args;
  args.src = src.data_ptr(), args.dst = dst.data_ptr();
  args.n = columns == 0 ? 0 : dst.numel() / columns;
  args.Tq = src.size(-2), args.n_src = src.size(-1), args.n_dst = columns;
  args.step = step, args.base = base;
  DeviceCall::check("rel_shift", rel_shift_cuda(src.element_size(), args, call.stream()));
  return dst;
}

Tensor rel_shift_fwd(const Tensor& x, int64_t n_keys, int64_t offset) {
  return shift("x", x, n_keys, -1, offset);
}

Tensor rel_shift_bwd(const Tensor& dout, int64_t n_rows, int64_t offset) {
  return shift("dout", dout, n_rows, 1, -near_offset(offset, dout.size(-2), dout.size(-1), n_rows));
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CUDA, m) {
  m.impl("rel_shift_fwd", &rel_shift_fwd);
  m.impl("rel_shift_bwd", &rel_shift_bwd);
}

}  // namespace txl
