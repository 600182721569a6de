// ATen bindings of rel_shift on the CPU.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "arguments.h"
#include "txl/rel_shift.h"

namespace txl {
namespace {

using at::Tensor;

// A result like `src` with `columns` in its last dimension, computed row by row.
template <typename Kernel>
Tensor shift(const Tensor& src, int64_t columns, RelShiftArgs args, Kernel kernel) {
  auto sizes = src.sizes().vec();
  sizes.back() = columns;
  const Tensor dst = at::empty(sizes, src.options());
  args.n = columns == 0 ? 0 : dst.numel() / columns;
  args.Tq = src.size(-2), args.src = src.data_ptr(), args.dst = dst.data_ptr();
  constexpr int64_t kGrainBytes = 1 << 16;
  const int64_t grain =
      std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, columns * src.element_size()));
  at::parallel_for(0, args.n, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dst;
}

Tensor rel_shift_fwd(const Tensor& x, int64_t n_keys, int64_t offset) {
  RelShiftArgs args{};
  args.R = x.size(-1), args.n_keys = n_keys;
  args.offset = near_offset(offset, x.size(-2), args.n_keys, args.R);
  return shift(x.contiguous(), n_keys, args, rel_shift_kernels(scalar_of("rel_shift", "x", x)).fwd);
}

Tensor rel_shift_bwd(const Tensor& dout, int64_t n_rows, int64_t offset) {
  RelShiftArgs args{};
  args.R = n_rows, args.n_keys = dout.size(-1);
  args.offset = near_offset(offset, dout.size(-2), args.n_keys, args.R);
  return shift(dout.contiguous(), n_rows, args,
               rel_shift_kernels(scalar_of("rel_shift", "dout", dout)).bwd);
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("rel_shift_fwd", &rel_shift_fwd);
  m.impl("rel_shift_bwd", &rel_shift_bwd);
}

}  // namespace txl
