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

// The public function has checked the arguments; checks here are those that memory safety depends
// on.
void check_place(const char* name, const Tensor& x, const Tensor& q, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.device() == q.device(), "rel_attention: ", name, " must be on ", q.device(),
                    ", got ", x.device());
  TORCH_CHECK_VALUE(x.sizes() == shape, "rel_attention: ", name, " must have shape ", shape,
                    ", got ", x.sizes());
}

Tensor4 rows_of(const char* name, const Tensor& x, const Tensor& q, at::IntArrayRef shape) {
  check_place(name, x, q, shape);
  TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type(), "rel_attention: ", name,
                   " must have q's dtype, ", q.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.stride(3) == 1 || x.size(3) == 1, "rel_attention: the last dimension of ",
                    name, " must be contiguous");
  return view4(x);
}

HeadBias head_bias(const char* name, Tensor& bias, const Tensor& q, at::IntArrayRef shape) {
  if (!bias.defined()) return {};
  check_place(name, bias, q, shape);
  const bool is_float = bias.scalar_type() == at::kFloat;
  TORCH_CHECK_TYPE(is_float || bias.scalar_type() == q.scalar_type(), "rel_attention: ", name,
                   " must be float32 or of q's dtype, got ", bias.scalar_type());
  bias = bias.contiguous();
  return {bias.data_ptr(), is_float};
}

RowNumbers row_numbers(const char* name, const Tensor& x, const Tensor& q, bool per_query) {
  if (!x.defined()) return {};
  const int64_t shape[] = {q.size(0), q.size(2)};
  check_place(name, x, q, {shape, per_query && x.dim() == 2 ? 2u : 1u});
  const bool is_wide = x.scalar_type() == at::kLong;
  TORCH_CHECK_TYPE(is_wide || x.scalar_type() == at::kInt, "rel_attention: ", name,
                   " must be int32 or int64, got ", x.scalar_type());
  return {x.data_ptr(), is_wide, x.stride(0), x.dim() == 2 ? x.stride(1) : 0};
}

DecodeArgs decode_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r,
                       OptionalTensors& optional, const Rules& rules, const Numbers& numbers) {
  for (const Tensor* x : {&q, &k, &v, &r})
    TORCH_CHECK_VALUE(x->dim() == 4, "rel_attention: q, k, v, r must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), Hk = k.size(1), Tq = q.size(2), Ts = k.size(2);
  const int64_t D = q.size(3), Dv = v.size(3), Dp = r.size(3), R = r.size(2);
  const Tensor& mem_k = optional.mem_k;
  const int64_t Tm = mem_k.defined() && mem_k.dim() == 4 ? mem_k.size(2) : 0;
  TORCH_CHECK_VALUE(Tq <= kDecodeQueries && std::max({D, Dv, Dp}) <= kMaxHeadSize,
                    "rel_attention: the native backend supports up to ", kDecodeQueries,
                    " queries and head sizes up to ", kMaxHeadSize, " on CUDA, got Tq = ", Tq,
                    ", D = ", D, ", Dv = ", Dv, ", Dp = ", Dp);
  TORCH_CHECK(numbers.dropout_p == 0,
              "rel_attention: the native backend does not support dropout_p on CUDA");
  TORCH_CHECK_VALUE(Hk > 0 && H % Hk == 0, "rel_attention: q must have a multiple of k's ", Hk,
                    " heads, got ", H, " heads");
  DecodeArgs args;
  args.B = count("B", B), args.H = count("H", H), args.Hk = count("Hk", Hk);
  args.Tq = count("Tq", Tq), args.Tm = count("Tm", Tm), args.Ts = count("Ts", Ts);
  args.D = count("D", D), args.Dv = count("Dv", Dv), args.Dp = count("Dp", Dp);
  args.R = count("R", R);
  const int64_t Tk = count("Tm + Ts", Tm + Ts);
  count("B · H · Tq", B * H * Tq);
  args.q = rows_of("q", q, q, {B, H, Tq, D}), args.k = rows_of("k", k, q, {B, Hk, Ts, D});
  args.v = rows_of("v", v, q, {B, Hk, Ts, Dv});
  const int64_t r_batch = r.size(0) == 1 ? 1 : B, r_heads = r.size(1) == 1 ? 1 : H;
  args.r = rows_of("r", r, q, {r_batch, r_heads, R, Dp});
  if (mem_k.defined() || optional.mem_v.defined()) {
    args.mem_k = rows_of("mem_k", mem_k, q, {B, Hk, Tm, D});
    args.mem_v = rows_of("mem_v", optional.mem_v, q, {B, Hk, Tm, Dv});
  }
  const Tensor& q_pos = optional.q_pos.defined() ? optional.q_pos : q;
  args.q_pos = rows_of("q_pos", q_pos, q, {B, H, Tq, Dp});
  args.r_w_bias = head_bias("r_w_bias", optional.r_w_bias, q, {H, D});
  args.r_r_bias = head_bias("r_r_bias", optional.r_r_bias, q, {H, Dp});
  args.q_start = row_numbers("q_start", optional.q_start, q, false);
  args.key_start = row_numbers("key_start", optional.key_start, q, true);
  args.key_lens = row_numbers("key_lens", optional.key_lens, q, true);
  if (optional.mask.defined()) {
    const Tensor& mask = optional.mask;
    check_place("mask", mask, q, {B, H, Tq, Tk});
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "rel_attention: mask must be bool");
    args.mask = view4(mask), args.mask_stride_key = mask.stride(3);
  }
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
