// ATen bindings of few_row_linear on the CPU.
#include "txl/few_row_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "arguments.h"

namespace txl {
namespace {

using at::Tensor;
constexpr const char* kOp = "few_row_linear";

LinearWeight kind_of(const Tensor& x, const Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  if (dtype == x.scalar_type()) return LinearWeight::same;
  if (dtype == at::kChar) return LinearWeight::int8;
  const bool is_16_bit = dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && is_16_bit, kOp, ": weight must be ",
                   x.scalar_type(), " or int8, for float32 x also of 16 bits, got ", dtype);
  return dtype == at::kHalf ? LinearWeight::f16 : LinearWeight::bf16;
}

// A bias or scale as the kernels read it; `kept` owns the memory, a copy if strides require one.
PerOutput per_output(const char* name, const std::optional<Tensor>& values, int64_t N,
                     Tensor& kept) {
  if (!values.has_value()) return {};
  TORCH_CHECK_VALUE(values->dim() == 1 && values->size(0) == N, kOp, ": ", name,
                    " must have shape [", N, "], got ", values->sizes());
  kept = values->contiguous();
  return {kept.const_data_ptr(), scalar_of(kOp, name, kept)};
}

Tensor few_row_linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& weight_scale) {
  const Scalar dtype = scalar_of(kOp, "x", x);
  const LinearWeight kind = kind_of(x, weight);
  TORCH_CHECK_VALUE(x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(-1), kOp,
                    ": x must have shape [..., K] and weight [N, K], got ", x.sizes(), " and ",
                    weight.sizes());
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  const Tensor out = at::empty(sizes, x.options());
  if (out.numel() == 0) return out;

  const FewRowLinearKernels& kernels = few_row_linear_kernels(dtype);
  FewRowLinearArgs args;
  args.N = weight.size(0), args.K = weight.size(1), args.M = out.numel() / args.N;
  Tensor rows = x.contiguous();
  args.ld_x = args.K;
  if (args.M > 1 || acc_dtype(x) != x.scalar_type()) {
    const Tensor given = rows;
    args.ld_x = ((args.K + 15) / 16 | 1) * 16;  // rows that are pages apart would share cache sets
    rows = at::empty({args.M, args.ld_x}, x.options().dtype(acc_dtype(x)));
    const int64_t given_bytes = args.K * given.element_size();
    const int64_t bytes = args.ld_x * rows.element_size();
    for (int64_t m = 0; m < args.M; ++m) {
      kernels.widen(static_cast<const char*>(given.const_data_ptr()) + m * given_bytes,
                    static_cast<char*>(rows.data_ptr()) + m * bytes, args.K);
    }
  }
  const Tensor table = weight.stride(1) == 1 ? weight : weight.contiguous();
  Tensor kept_bias, kept_scale;
  args.bias = per_output("bias", bias, args.N, kept_bias);
  args.scale = per_output("weight_scale", weight_scale, args.N, kept_scale);
  args.x = rows.const_data_ptr(), args.out = out.data_ptr();
  args.weight = table.const_data_ptr(), args.ld_weight = table.stride(0);

  constexpr int64_t kGrainBytes = 1 << 16;
  const int64_t unit = kWeightRows * args.K * table.element_size();
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, unit));
  const auto run = kernels.run[static_cast<int>(kind)];
  const int64_t n_units = (args.N + kWeightRows - 1) / kWeightRows;
  at::parallel_for(0, n_units, grain, [&](int64_t begin, int64_t end) {
    run(args, begin * kWeightRows, std::min(args.N, end * kWeightRows));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("few_row_linear_fwd", &few_row_linear_fwd);
}

}  // namespace txl
