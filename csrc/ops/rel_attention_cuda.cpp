// ATen bindings of rel_attention on CUDA: few queries, no gradients; tensors to pointers,
// allocation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "arguments.h"
#include "device_call.h"
#include "rel_attention_call.h"
#include "txl/rel_attention_decode.h"

namespace txl {
namespace {

using at::Tensor;

// The kernels count keys, rows and queries in 32 bits.
int count(const char* name, int64_t n) {
  TORCH_CHECK_VALUE(n < (int64_t(1) << 30),
                    "rel_attention: the native backend takes sizes below "
                    "2^30 on CUDA, got ",
                    name, " = ", n);
  return static_cast<int>(n);
}

HeadBias head_bias(const Tensor& given, const Tensor& q, Tensor& home) {
  if (!given.defined()) return {};
  TORCH_CHECK_TYPE(given.scalar_type() == at::kFloat || given.scalar_type() == q.scalar_type(),
                   "rel_attention: biases must be float32 or of q's dtype, got ",
                   given.scalar_type());
  home = given.contiguous();
  return {home.data_ptr(), home.scalar_type() == at::kFloat};
}

Lengths lengths(const Tensor& given, Tensor& home) {
  if (!given.defined()) return {};
  home = given.contiguous();
  return {home.data_ptr(), home.scalar_type() == at::kLong};
}

std::tuple<Tensor, Tensor> rel_attention_fwd(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                             const Tensor& r_, at::TensorList optional_,
                                             at::IntArrayRef rules_,
                                             at::ArrayRef<double> numbers_) {
  const OptionalTensors optional(optional_);
  const Rules rules(rules_);
  const Numbers numbers(numbers_);
  TORCH_CHECK(!optional.q_pos.defined() && !optional.q_start.defined() && numbers.dropout_p == 0 &&
                  numbers.pos_scale == numbers.scale && k_.size(1) == q_.size(1),
              "rel_attention: the native backend does not support this yet on CUDA");
  TORCH_CHECK_VALUE(
      q_.size(2) <= kDecodeQueries && q_.size(3) <= kMaxHeadSize && v_.size(3) <= kMaxHeadSize,
      "rel_attention: the native backend takes up to ", kDecodeQueries,
      " queries and head sizes up to ", kMaxHeadSize, " on CUDA, got Tq = ", q_.size(2),
      ", D = ", q_.size(3), ", Dv = ", v_.size(3));
  const Scalar dtype = scalar_of("rel_attention", "q", q_);
  TORCH_CHECK_TYPE(dtype != Scalar::f64,
                   "rel_attention: the native backend takes no float64 on CUDA");
  for (const Tensor* x : {&k_, &v_, &r_})
    TORCH_CHECK_TYPE(x->scalar_type() == q_.scalar_type(),
                     "rel_attention: q, k, v, r must share a dtype, got ", q_.scalar_type(),
                     " and ", x->scalar_type());
  const DeviceCall call(q_);
  const Tensor q = last_dim_contiguous(q_), k = last_dim_contiguous(k_),
               v = last_dim_contiguous(v_), r = last_dim_contiguous(r_);
  Tensor mem_k, mem_v, r_w_bias, r_r_bias, key_start, key_lens;
  DecodeArgs args;
  args.B = count("B", q.size(0)), args.H = count("H", q.size(1));
  args.Tq = count("Tq", q.size(2)), args.Ts = count("Ts", k.size(2));
  args.D = count("D", q.size(3)), args.Dv = count("Dv", v.size(3));
  args.R = count("R", r.size(2));
  args.q = view4(q), args.k = view4(k), args.v = view4(v), args.r = view4(r);
  if (optional.mem_k.defined()) {
    mem_k = last_dim_contiguous(optional.mem_k), mem_v = last_dim_contiguous(optional.mem_v);
    args.mem_k = view4(mem_k), args.mem_v = view4(mem_v);
    args.Tm = count("Tm", mem_k.size(2));
  }
  count("Tk", int64_t(args.Tm) + args.Ts);
  args.r_w_bias = head_bias(optional.r_w_bias, q, r_w_bias);
  args.r_r_bias = head_bias(optional.r_r_bias, q, r_r_bias);
  args.key_start = lengths(optional.key_start, key_start),
  args.key_lens = lengths(optional.key_lens, key_lens);
  if (optional.mask.defined()) {
    const Tensor* const mask = &optional.mask;
    args.mask = {mask->data_ptr(), mask->stride(0), mask->stride(1), mask->stride(2)};
    args.mask_stride_key = mask->stride(3);
  }
  args.offset = rules.offset, args.clamp = rules.clamp;
  args.rule = rules.keys;
  args.scale = static_cast<float>(numbers.scale),
  args.softcap = static_cast<float>(numbers.softcap);

  const Tensor out = at::empty({args.B, args.H, args.Tq, args.Dv}, q.options());
  const auto floats = q.options().dtype(at::kFloat);
  const Tensor lse = at::empty({args.B, args.H, args.Tq}, floats);
  if (lse.numel() == 0) return {out, lse};
  args.out = out.data_ptr(), args.lse = lse.data_ptr<float>();
  args.plan = plan_decode(args);
  const DecodePlan& plan = args.plan;
  const int64_t split_rows = plan.n_splits == 1 ? 0 : lse.numel() * plan.n_splits;
  const Tensor workspace =
      at::empty({lse.numel() * plan.n_rows + split_rows * (2 + args.Dv)}, floats);
  args.split_stats = workspace.data_ptr<float>();  // first: pairs, on 8 bytes
  args.split_out = args.split_stats + 2 * split_rows;
  args.positions = args.split_out + split_rows * args.Dv;
  DeviceCall::check("rel_attention", rel_attention_decode(dtype, args, call.stream()));
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CUDA, m) {
  m.impl("rel_attention_fwd", &rel_attention_fwd);
}

}  // namespace txl
