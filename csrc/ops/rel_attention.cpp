// ATen bindings of rel_attention on the CPU: tensors to pointers, allocation, threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>

#include "arguments.h"
#include "txl/gemm.h"
#include "txl/rel_attention.h"
#include "workspace.h"

namespace txl {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments of the schema that both directions share.
struct Call {
  Tensor q, k, v, r, mem_k, mem_v, r_w_bias, r_r_bias, key_start, key_lens, mask;
  RelAttentionArgs args;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& r_,
       const OptionalTensor& r_w_bias_, const OptionalTensor& r_r_bias_,
       const OptionalTensor& mem_k_, const OptionalTensor& mem_v_, const OptionalTensor& q_pos,
       const OptionalTensor& key_start_, const OptionalTensor& key_lens_,
       const OptionalTensor& mask_, const OptionalTensor& bias, const OptionalTensor& dropout_seed,
       int64_t offset, bool clamp, bool causal, std::optional<int64_t> window_left,
       std::optional<int64_t> window_right, at::IntArrayRef chunk, double scale, double softcap,
       double dropout_p, bool dead_uniform) {
    TORCH_CHECK(!q_pos && !bias && !dead_uniform,
                "rel_attention: the native backend supports neither q_pos nor bias nor "
                "dead_rows=\"uniform\"");
    const char* missing = gemm_unavailable_reason();
    TORCH_CHECK(missing == nullptr, "rel_attention: the native backend cannot run here: ", missing);
    args.B = q_.size(0), args.H = q_.size(1), args.Tq = q_.size(2), args.D = q_.size(3);
    args.Ts = k_.size(2), args.Tm = mem_k_ ? mem_k_->size(2) : 0, args.Dv = v_.size(3),
    args.R = r_.size(2);
    TORCH_CHECK_VALUE(args.D <= 256 && args.Dv <= 256,
                      "rel_attention: the native backend supports head sizes up to 256, got ",
                      std::max(args.D, args.Dv));
    for (const auto& [tensor, home] : {std::pair{&q_, &q}, {&k_, &k}, {&v_, &v}, {&r_, &r}}) {
      TORCH_CHECK_TYPE(tensor->scalar_type() == q_.scalar_type(),
                       "rel_attention: q, k, v, r must share a dtype, got ", q_.scalar_type(),
                       " and ", tensor->scalar_type());
      *home = last_dim_contiguous(*tensor);
    }
    args.q = view4(q), args.k = view4(k), args.v = view4(v), args.r = view4(r);
    if (mem_k_) {
      mem_k = last_dim_contiguous(*mem_k_), mem_v = last_dim_contiguous(*mem_v_);
      args.mem_k = view4(mem_k), args.mem_v = view4(mem_v);
    }
    args.r_per_batch = r.size(0) > 1, args.r_per_head = r.size(1) > 1;
    args.r_w_bias = bias_pointer(r_w_bias_, r_w_bias),
    args.r_r_bias = bias_pointer(r_r_bias_, r_r_bias);
    args.key_start = length_pointer(key_start_, key_start),
    args.key_lens = length_pointer(key_lens_, key_lens);
    if (mask_) {
      mask = *mask_;
      args.mask = {mask.data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2)};
      args.mask_stride_key = mask.stride(3);
    }
    args.offset = near_offset(offset, args.Tq, args.Tk(), args.R), args.clamp = clamp;
    args.rule = key_rule(causal, window_left, window_right, chunk);
    args.scale = scale, args.softcap = softcap, args.dropout_p = dropout_p;
    if (dropout_p > 0)
      args.dropout_seed = static_cast<uint64_t>(dropout_seed.value().item<int64_t>());
  }

  bool empty() const { return args.B * args.H * args.Tq == 0; }
  // Work below this many multiply-adds is not worth waking other threads.
  int64_t threads() const {
    const double work = 3.0 * static_cast<double>(args.B * args.H * args.Tq) *
                        static_cast<double>(args.Tk() * args.D);
    return at::in_parallel_region() || work < 5e5 ? 1 : at::get_num_threads();
  }

 private:
  const void* bias_pointer(const OptionalTensor& given, Tensor& home) const {
    if (!given) return nullptr;
    home = given->to(acc_dtype(q)).contiguous();
    return home.data_ptr();
  }
  const int64_t* length_pointer(const OptionalTensor& given, Tensor& home) const {
    if (!given) return nullptr;
    home = given->to(at::kLong).clamp(0, args.Tk()).contiguous();
    return home.const_data_ptr<int64_t>();
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

std::tuple<Tensor, Tensor> rel_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r,
    const OptionalTensor& r_w_bias, const OptionalTensor& r_r_bias, const OptionalTensor& mem_k,
    const OptionalTensor& mem_v, const OptionalTensor& q_pos, const OptionalTensor& key_start,
    const OptionalTensor& key_lens, const OptionalTensor& mask, const OptionalTensor& bias,
    const OptionalTensor& dropout_seed, int64_t offset, bool clamp, bool causal,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, at::IntArrayRef chunk,
    double scale, double softcap, double dropout_p, bool dead_uniform) {
  Call call(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, key_start, key_lens, mask, bias,
            dropout_seed, offset, clamp, causal, window_left, window_right, chunk, scale, softcap,
            dropout_p, dead_uniform);
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
  const int64_t right = args.rule.causal ? 0 : args.rule.window_right;
  return args.rule.window_left + right < kBwdKeyBlock ? kKeyBlock : kBwdKeyBlock;
}

// Key and value gradients need slots for partial sums only if two chunks share a pair.
bool cuts_a_pair(const RelAttentionPlan& plan) {
  for (const int64_t border : plan.chunks) {
    if (border % plan.n_tiles != 0) return true;
  }
  return false;
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients rel_attention_bwd(const Tensor& dout_, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& r, const OptionalTensor& r_w_bias,
                            const OptionalTensor& r_r_bias, const OptionalTensor& mem_k,
                            const OptionalTensor& mem_v, const OptionalTensor& q_pos,
                            const OptionalTensor& key_start, const OptionalTensor& key_lens,
                            const OptionalTensor& mask, const OptionalTensor& bias,
                            const OptionalTensor& dropout_seed, int64_t offset, bool clamp,
                            bool causal, std::optional<int64_t> window_left,
                            std::optional<int64_t> window_right, at::IntArrayRef chunk,
                            double scale, double softcap, double dropout_p, bool dead_uniform,
                            const Tensor& out_, const Tensor& lse_, c10::List<bool> needs_grad) {
  Call call(q, k, v, r, r_w_bias, r_r_bias, mem_k, mem_v, q_pos, key_start, key_lens, mask, bias,
            dropout_seed, offset, clamp, causal, window_left, window_right, chunk, scale, softcap,
            dropout_p, dead_uniform);
  RelAttentionArgs& args = call.args;
  const Tensor dout = last_dim_contiguous(dout_), out = last_dim_contiguous(out_),
               lse = lse_.contiguous();
  args.out = view4(out), args.lse = lse.data_ptr();

  auto none = [&] {
    return at::empty({0}, q.options());
  };  // never one shared: outputs must not alias
  auto gradient = [&](size_t index, const OptionalTensor& like, bool accumulated = false) {
    if (!needs_grad.get(index) || !like) return none();
    const auto options = accumulated ? like->options().dtype(acc_dtype(q)) : like->options();
    return call.empty() ? at::zeros(like->sizes(), options) : at::empty(like->sizes(), options);
  };
  const Tensor dq = gradient(0, q), dk = gradient(1, k), dv = gradient(2, v), dr = gradient(3, r);
  const Tensor dr_w_bias = gradient(4, r_w_bias, true), dr_r_bias = gradient(5, r_r_bias, true);
  const Tensor dmem_k = gradient(6, mem_k), dmem_v = gradient(7, mem_v);
  auto pointer = [](const Tensor& x) { return x.numel() == 0 ? nullptr : x.data_ptr(); };
  auto typed = [](const Tensor& x, const OptionalTensor& like) {
    return like ? x.to(like->scalar_type()) : x;
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
  return {dq,     dk,     dv,     dr,    typed(dr_w_bias, r_w_bias), typed(dr_r_bias, r_r_bias),
          dmem_k, dmem_v, none(), none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("rel_attention_fwd", &rel_attention_fwd);
  m.impl("rel_attention_bwd", &rel_attention_bwd);
}

}  // namespace txl
