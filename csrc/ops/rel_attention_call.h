// The grouped arguments of rel_attention's schema by name, for the bindings of every device. The
// groups and their order are those of txl_kernels/_rel_attention_call.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

// An absent tensor is undefined.
struct OptionalTensors {
  at::Tensor r_w_bias, r_r_bias;   // [H, D], [H, Dp]
  at::Tensor mem_k, mem_v;         // [B, Hk, Tm, D], [B, Hk, Tm, Dv]
  at::Tensor q_pos;                // [B, H, Tq, Dp]
  at::Tensor q_start;              // int32 or int64 [B]
  at::Tensor key_start, key_lens;  // int32 or int64 [B] or [B, Tq]
  at::Tensor mask;                 // bool [B, H, Tq, Tk]
  at::Tensor dropout_seed;         // int64, one element

  explicit OptionalTensors(at::TensorList list) {
    at::Tensor* const fields[] = {&r_w_bias, &r_r_bias,  &mem_k,    &mem_v, &q_pos,
                                  &q_start,  &key_start, &key_lens, &mask,  &dropout_seed};
    TORCH_CHECK_VALUE(list.size() == std::size(fields), "rel_attention: optional must have ",
                      std::size(fields), " tensors, got ", list.size());
    for (size_t n = 0; n < list.size(); ++n) {
      const at::Tensor& x = list[n];
      if (x.dim() != 1 || x.numel() != 0) *fields[n] = x;
    }
  }
};

// Checks that memory safety depends on; the public function has checked the arguments completely.
// Absent tensors are undefined.
class CallChecks {
 public:
  explicit CallChecks(const at::Tensor& q) : q_(q) {}

  // A tensor of q's dtype whose last dimension is contiguous.
  void rows(const char* name, const at::Tensor& x, at::IntArrayRef shape) const {
    place(name, x, shape);
    TORCH_CHECK_TYPE(x.scalar_type() == q_.scalar_type(), "rel_attention: ", name,
                     " must have q's dtype, ", q_.scalar_type(), ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.stride(-1) == 1 || x.size(-1) == 1 || x.numel() == 0,
                      "rel_attention: the last dimension of ", name, " must be contiguous");
  }
  void bias(const char* name, const at::Tensor& x, at::IntArrayRef shape) const {
    if (!x.defined()) return;
    place(name, x, shape);
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == q_.scalar_type(),
                     "rel_attention: ", name, " must be float32 or have q's dtype, got ",
                     x.scalar_type());
  }
  // [B], or [B, Tq] if `per_query` allows it.
  void integers(const char* name, const at::Tensor& x, bool per_query) const {
    if (!x.defined()) return;
    const int64_t shape[] = {q_.size(0), q_.size(2)};
    place(name, x, {shape, per_query && x.dim() == 2 ? size_t{2} : size_t{1}});
    TORCH_CHECK_TYPE(x.scalar_type() == at::kInt || x.scalar_type() == at::kLong,
                     "rel_attention: ", name, " must be int32 or int64, got ", x.scalar_type());
  }
  void mask(const at::Tensor& x, int64_t Tk) const {
    if (!x.defined()) return;
    place("mask", x, {q_.size(0), q_.size(1), q_.size(2), Tk});
    TORCH_CHECK_TYPE(x.scalar_type() == at::kBool, "rel_attention: mask must be bool, got ",
                     x.scalar_type());
  }

 private:
  void place(const char* name, const at::Tensor& x, at::IntArrayRef shape) const {
    TORCH_CHECK_VALUE(x.defined(), "rel_attention: ", name, " is missing");
    TORCH_CHECK_VALUE(x.device() == q_.device(), "rel_attention: ", name, " must be on ",
                      q_.device(), ", got ", x.device());
    TORCH_CHECK_VALUE(x.sizes() == shape, "rel_attention: ", name, " must have shape ", shape,
                      ", got ", x.sizes());
  }

  const at::Tensor& q_;
};

inline void check_call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& r, const OptionalTensors& optional) {
  for (const at::Tensor* x : {&q, &k, &v, &r})
    TORCH_CHECK_VALUE(x->dim() == 4, "rel_attention: q, k, v, r must have 4 dimensions");
  const int64_t B = q.size(0), H = q.size(1), Tq = q.size(2), D = q.size(3);
  const int64_t Hk = k.size(1), Ts = k.size(2), Dv = v.size(3), Dp = r.size(3);
  for (const int64_t size : {D, Dv, Dp})
    TORCH_CHECK_VALUE(1 <= size && size <= kMaxHeadSize, "rel_attention: head sizes must be 1 to ",
                      kMaxHeadSize, ", got ", size);
  TORCH_CHECK_VALUE(Hk > 0 ? H % Hk == 0 : H == 0, "rel_attention: q must have a multiple of k's ",
                    Hk, " heads, got ", H);
  TORCH_CHECK_VALUE(r.size(2) > 0, "rel_attention: r must have at least one row");
  const CallChecks checks(q);
  checks.rows("q", q, {B, H, Tq, D});
  checks.rows("k", k, {B, Hk, Ts, D});
  checks.rows("v", v, {B, Hk, Ts, Dv});
  checks.rows("r", r, {r.size(0) == 1 ? 1 : B, r.size(1) == 1 ? 1 : H, r.size(2), Dp});
  checks.rows("q_pos", optional.q_pos.defined() ? optional.q_pos : q, {B, H, Tq, Dp});
  int64_t Tm = 0;
  if (optional.mem_k.defined() || optional.mem_v.defined()) {
    Tm = optional.mem_k.defined() && optional.mem_k.dim() == 4 ? optional.mem_k.size(2) : 0;
    checks.rows("mem_k", optional.mem_k, {B, Hk, Tm, D});
    checks.rows("mem_v", optional.mem_v, {B, Hk, Tm, Dv});
  }
  checks.bias("r_w_bias", optional.r_w_bias, {H, D});
  checks.bias("r_r_bias", optional.r_r_bias, {H, Dp});
  checks.integers("q_start", optional.q_start, /*per_query=*/false);
  checks.integers("key_start", optional.key_start, /*per_query=*/true);
  checks.integers("key_lens", optional.key_lens, /*per_query=*/true);
  checks.mask(optional.mask, Tm + Ts);
}

struct Rules {
  int64_t offset;
  bool clamp;
  KeyRule keys;

  explicit Rules(at::IntArrayRef list) {
    TORCH_CHECK_VALUE(list.size() == 7, "rel_attention: rules must have 7 integers, got ",
                      list.size());
    offset = list[0], clamp = list[1] != 0;
    keys.window_left = std::min(list[2], kOpen), keys.window_right = std::min(list[3], kOpen);
    keys.chunk_size = list[4], keys.chunk_left = list[5], keys.chunk_phase = list[6];
  }
};

struct Numbers {
  double scale, pos_scale, softcap, dropout_p;

  explicit Numbers(at::ArrayRef<double> list) {
    TORCH_CHECK_VALUE(list.size() == 4, "rel_attention: numbers must have 4 elements, got ",
                      list.size());
    scale = list[0], pos_scale = list[1], softcap = list[2], dropout_p = list[3];
  }
};

}  // namespace txl
