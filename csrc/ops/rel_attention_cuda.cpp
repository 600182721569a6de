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

// The kernels count keys, rows of r and query rows in 32 bits.
int count(const char* name, int64_t n) {
  TORCH_CHECK_VALUE(n < (int64_t(1) << 30),
                    "rel_attention: the native backend supports sizes below 2^30 on CUDA, got ",
                    name, " = ", n);
  return static_cast<int>(n);
}

HeadBias head_bias(Tensor& bias) {
  if (!bias.defined()) return {};
  bias = bias.contiguous();
  return {bias.data_ptr(), bias.scalar_type() == at::kFloat};
}

RowNumbers row_numbers(const Tensor& x) {
  if (!x.defined()) return {};
  const int64_t stride_i = x.dim() == 2 ? x.stride(1) : 0;
  return {x.data_ptr(), x.scalar_type() == at::kLong, x.stride(0), stride_i};
}

DecodeArgs decode_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r,
                       OptionalTensors& optional, const Rules& rules, const Numbers& numbers) {
  check_call(q, k, v, r, optional);
  TORCH_CHECK_VALUE(q.size(2) <= kDecodeQueries,
                    "rel_attention: the native backend supports up to ", kDecodeQueries,
                    " queries on CUDA, got ", q.size(2));
  TORCH_CHECK(numbers.dropout_p == 0,
              "rel_attention: the native backend does not support dropout_p on CUDA");
  DecodeArgs args;
  args.B = count("B", q.size(0)), args.H = count("H", q.size(1)), args.Hk = count("Hk", k.size(1));
  args.Tq = count("Tq", q.size(2)), args.Ts = count("Ts", k.size(2)),
  args.R = count("R", r.size(2));
  args.D = count("D", q.size(3)), args.Dv = count("Dv", v.size(3)),
  args.Dp = count("Dp", r.size(3));
  if (optional.mem_k.defined()) {
    args.Tm = count("Tm", optional.mem_k.size(2));
    args.mem_k = view4(optional.mem_k), args.mem_v = view4(optional.mem_v);
  }
  count("Tm + Ts", int64_t(args.Tm) + args.Ts);
  count("B · H · Tq", q.size(0) * q.size(1) * q.size(2));
  args.q = view4(q), args.k = view4(k), args.v = view4(v), args.r = view4(r);
  args.q_pos = optional.q_pos.defined() ? view4(optional.q_pos) : args.q;
  args.r_w_bias = head_bias(optional.r_w_bias), args.r_r_bias = head_bias(optional.r_r_bias);
  args.q_start = row_numbers(optional.q_start);
  args.key_start = row_numbers(optional.key_start), args.key_lens = row_numbers(optional.key_lens);
  if (optional.mask.defined())
    args.mask = view4(optional.mask), args.mask_stride_key = optional.mask.stride(3);
  args.offset = rules.offset, args.clamp = rules.clamp, args.rule = rules.keys;
  args.scale = static_cast<float>(numbers.scale);
  args.pos_scale = static_cast<float>(numbers.pos_scale);
  args.softcap = static_cast<float>(numbers.softcap);
  return args;
}

std::tuple<Tensor, Tensor> rel_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& r, at::TensorList tensors,
                                             at::IntArrayRef rules, at::ArrayRef<double> numbers) {
  OptionalTensors optional(tensors);
  const Scalar dtype = scalar_of("rel_attention", "q", q);
  TORCH_CHECK_TYPE(dtype != Scalar::f64,
                   "rel_attention: the native backend does not support float64 on CUDA");
  const DeviceCall call(q);
  DecodeArgs args = decode_args(q, k, v, r, optional, Rules(rules), Numbers(numbers));
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
