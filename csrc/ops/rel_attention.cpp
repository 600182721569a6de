// ATen bindings of rel_attention on the CPU: tensors to pointers, allocation, threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>

#include "arguments.h"
#include "rel_attention_call.h"
#include "txl/gemm.h"
#include "txl/rel_attention.h"
#include "workspace.h"

namespace txl {
namespace {

using at::Tensor;

// The arguments of the schema that both directions share, and what kernels read of them. The
// public function has checked the arguments; checks here are those that memory safety depends on.
struct Call {
  OptionalTensors optional;
  Tensor q, k, v, r;
  RelAttentionArgs args;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& r_,
       at::TensorList optional_, at::IntArrayRef rules_, at::ArrayRef<double> numbers_)
      : optional(optional_), q(q_), k(k_), v(v_), r(r_) {
    const char* missing = gemm_unavailable_reason();
    TORCH_CHECK(missing == nullptr, "rel_attention: the native backend cannot run here: ", missing);
    const Rules rules(rules_);
    const Numbers numbers(numbers_);
    args.B = q.size(0), args.H = q.size(1), args.Tq = q.size(2), args.D = q.size(3);
    args.Ts = k.size(2), args.Tm = optional.mem_k.defined() ? optional.mem_k.size(2) : 0;
    args.Dv = v.size(3), args.R = r.size(2);
    TORCH_CHECK(!optional.q_pos.defined() && !optional.q_start.defined() &&
                    numbers.pos_scale == numbers.scale && k.size(1) == args.H,
                "rel_attention: the native backend does not support this yet");
    TORCH_CHECK_VALUE(args.D <= kMaxHeadSize && args.Dv <= kMaxHeadSize,
                      "rel_attention: head sizes must be at most ", kMaxHeadSize);
    args.q = rows_of("q", q), args.k = rows_of("k", k);
    args.v = rows_of("v", v), args.r = rows_of("r", r);
    if (optional.mem_k.defined()) {
      args.mem_k = rows_of("mem_k", optional.mem_k), args.mem_v = rows_of("mem_v", optional.mem_v);
    }
    args.r_per_batch = r.size(0) > 1, args.r_per_head = r.size(1) > 1;
    args.r_w_bias = bias_pointer(optional.r_w_bias);
    args.r_r_bias = bias_pointer(optional.r_r_bias);
    args.key_start = length_pointer(optional.key_start);
    args.key_lens = length_pointer(optional.key_lens);
    if (optional.mask.defined()) {
      const Tensor& mask = optional.mask;
      args.mask = {mask.data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2)};
      args.mask_stride_key = mask.stride(3);
    }
    args.offset = near_offset(rules.offset, args.Tq, args.Tk(), args.R), args.clamp = rules.clamp;
    args.rule = rules.keys;
    args.scale = numbers.scale, args.softcap = numbers.softcap, args.dropout_p = numbers.dropout_p;
    if (args.dropout_p > 0)
      args.dropout_seed = static_cast<uint64_t>(optional.dropout_seed.item<int64_t>());
  }

  bool empty() const { return args.B * args.H * args.Tq == 0; }
  // Work below this many multiply-adds is not worth waking other threads.
  int64_t threads() const {
    const double work = 3.0 * static_cast<double>(args.B * args.H * args.Tq) *
                        static_cast<double>(args.Tk() * args.D);
    return at::in_parallel_region() || work < 5e5 ? 1 : at::get_num_threads();
  }

 private:
  Tensor4 rows_of(const char* name, const Tensor& x) const {
    TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type(), "rel_attention: ", name,
                     " must have q's dtype, ", q.scalar_type(), ", got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.stride(-1) == 1 || x.size(-1) == 1, "rel_attention: the last dimension of ",
                      name, " must be contiguous");
    return view4(x);
  }
  const void* bias_pointer(Tensor& bias) const {
    if (!bias.defined()) return nullptr;
    bias = bias.to(acc_dtype(q)).contiguous();
    return bias.data_ptr();
  }
  const int64_t* length_pointer(Tensor& lengths) const {
    if (!lengths.defined()) return nullptr;
    TORCH_CHECK(lengths.dim() == 1, "rel_attention: the native backend does not support this yet");
    lengths = lengths.to(at::kLong).clamp(0, args.Tk()).contiguous();
    return lengths.const_data_ptr<int64_t>();
  }
};

// Runs f(chunk, workspace) for every chunk; each thread continues with the next chunk that is left.
template <typename F>
void run_chunks(const RelAttentionPlan& plan, int64_t threads, int64_t workspace_bytes, F&& f) {
  threads = std::min(threads, plan.n_chunks());
  const Workspace workspace(threads, workspace_bytes);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t chunk = next++; chunk < plan.n_chunks(); chunk = next++)
        f(chunk, workspace.of(thread));
    }
  });
}

std::tuple<Tensor, Tensor> rel_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& r, at::TensorList optional,
                                             at::IntArrayRef rules, at::ArrayRef<double> numbers) {
  Call call(q, k, v, r, optional, rules, numbers);
  RelAttentionArgs& args = call.args;
  const Tensor out = at::empty({args.B, args.H, args.Tq, args.Dv}, q.options());
  const Tensor lse = at::empty({args.B, args.H, args.Tq}, q.options().dtype(acc_dtype(q)));
  if (call.empty()) return {out, lse};
  args.out = view4(out), args.lse = lse.data_ptr();
  const FwdKernels& kernels = rel_attention_fwd_kernels(scalar_of("rel_attention", "q", q));
  const RelAttentionPlan plan = plan_rel_attention(args, kFwdKeyBlock, call.threads());
  run_chunks(plan, call.threads(), kernels.workspace(args, plan),
             [&](int64_t c, char* workspace) { kernels.chunk(args, plan, c, workspace); });
  return {out, lse};
}

// With a narrow window, the borders of small blocks divide the keys of many tiles: 14% of the
// time at 128 keys.
int64_t bwd_key_block(const RelAttentionArgs& args) {
  const int64_t right = args.rule.window_right;
  return args.rule.window_left + right < kBwdKeyBlock ? kKeyBlock : kBwdKeyBlock;
}

// Key and value gradients need slots for partial sums only if two chunks share a pair.
bool cuts_a_pair(const RelAttentionPlan& plan) {
  for (const int64_t border : plan.chunks) {
    if (border % plan.n_tiles != 0) return true;
  }
  return false;
}

// The gradients of q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos.
std::vector<Tensor> rel_attention_bwd(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                      const Tensor& k, const Tensor& v, const Tensor& r,
                                      at::TensorList optional, at::IntArrayRef rules,
                                      at::ArrayRef<double> numbers, const Tensor& out,
                                      const Tensor& lse_, const c10::List<bool>& needs_grad) {
  Call call(q, k, v, r, optional, rules, numbers);
  RelAttentionArgs& args = call.args;
  TORCH_CHECK(dlse.dim() == 1 && dlse.numel() == 0, "rel_attention: no dlse yet");
  const Tensor lse = lse_.contiguous();
  args.out = view4(out), args.lse = lse.data_ptr();

  auto none = [&] {
    return at::empty({0}, q.options());
  };  // never one shared: outputs must not alias
  auto gradient = [&](size_t index, const Tensor& like, bool accumulated = false) {
    if (!needs_grad.get(index) || !like.defined()) return none();
    const auto options = accumulated ? like.options().dtype(acc_dtype(q)) : like.options();
    return call.empty() ? at::zeros(like.sizes(), options) : at::empty(like.sizes(), options);
  };
  // In the dtypes of the arguments, before the biases were converted.
  const OptionalTensors given(optional);
  const Tensor dq = gradient(0, q), dk = gradient(1, k), dv = gradient(2, v), dr = gradient(3, r);
  const Tensor dr_w_bias = gradient(4, given.r_w_bias, true);
  const Tensor dr_r_bias = gradient(5, given.r_r_bias, true);
  const Tensor dmem_k = gradient(6, given.mem_k), dmem_v = gradient(7, given.mem_v);
  auto pointer = [](const Tensor& x) { return x.numel() == 0 ? nullptr : x.data_ptr(); };
  auto typed = [](const Tensor& x, const Tensor& like) {
    return like.defined() ? x.to(like.scalar_type()) : x;
  };

  if (!call.empty()) {
    const BwdKernels& kernels = rel_attention_bwd_kernels(scalar_of("rel_attention", "q", q));
    const RelAttentionPlan plan = plan_rel_attention(args, bwd_key_block(args), call.threads());
    const RelAttentionGrads grads{view4(dout), pointer(dq),        pointer(dk),
                                  pointer(dv), pointer(dmem_k),    pointer(dmem_v),
                                  pointer(dr), pointer(dr_w_bias), pointer(dr_r_bias)};
    const auto options = q.options().dtype(acc_dtype(q));
    const int64_t chunks = plan.n_chunks(), parked = cuts_a_pair(plan) ? 2 * chunks : 0;
    const Tensor park_k = at::empty({parked, args.Tk(), args.D}, options);
    const Tensor park_v = at::empty({parked, args.Tk(), args.Dv}, options);
    const int64_t table_slots = dr.numel() == 0 ? 0 : args.n_groups() + chunks - 1;
    const Tensor park_r = at::empty({table_slots, args.R, args.D}, options);
    const Tensor park_bias = at::empty({args.n_pairs() + chunks - 1, 2, args.D}, options);
    const RelAttentionPartials partials{pointer(park_k), pointer(park_v), pointer(park_r),
                                        pointer(park_bias)};
    run_chunks(plan, call.threads(), kernels.workspace(args, plan),
               [&](int64_t c, char* workspace) {
                 kernels.chunk(args, plan, grads, partials, c, workspace);
               });
    at::parallel_for(0, finish_items(args), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item)
        kernels.finish(args, plan, grads, partials, item);
    });
  }
  return {dq,
          dk,
          dv,
          dr,
          typed(dr_w_bias, given.r_w_bias),
          typed(dr_r_bias, given.r_r_bias),
          dmem_k,
          dmem_v,
          none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("rel_attention_fwd", &rel_attention_fwd);
  m.impl("rel_attention_bwd", &rel_attention_bwd);
}

}  // namespace txl
