// ATen bindings of rel_attention on the CPU: tensors to pointers, allocation, threads.
#include <ATen/EmptyTensor.h>
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

// q_start, key_start and key_lens beyond these limits act as the limits.
constexpr int64_t kFarthest = int64_t{1} << 31;

// The arguments of the schema that both directions share, as kernels read them.
struct Call {
  OptionalTensors optional;
  RelAttentionArgs args;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r, at::TensorList tensors,
       at::IntArrayRef rules_, at::ArrayRef<double> numbers)
      : optional(tensors) {
    static const char* const missing = gemm_unavailable_reason();
    TORCH_CHECK(missing == nullptr, "rel_attention: the native backend cannot run here: ", missing);
    check_call(q, k, v, r, optional);
    set_rows(q, k, v, r);
    const Rules rules(rules_);
    args.clamp = rules.clamp, args.rule = rules.keys;
    set_numbers(Numbers(numbers));
    set_positions(rules.offset);
    args.r_w_bias = bias_pointer(optional.r_w_bias, acc_dtype(q));
    args.r_r_bias = bias_pointer(optional.r_r_bias, acc_dtype(q));
    set_masks();
  }

  bool empty() const { return args.B * args.H * args.Tq == 0; }
  // Work below this many multiply-adds is not worth waking other threads.
  int64_t threads() const {
    const double work = 3.0 * static_cast<double>(args.B * args.H * args.Tq) *
                        static_cast<double>(args.Tk * args.D);
    return at::in_parallel_region() || work < 5e5 ? 1 : at::get_num_threads();
  }

 private:
  void set_rows(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& r) {
    args.B = q.size(0), args.H = q.size(1), args.Tq = q.size(2), args.D = q.size(3);
    args.Hk = k.size(1), args.Dv = v.size(3), args.R = r.size(2), args.Dp = r.size(3);
    args.has_q_pos = optional.q_pos.defined();
    args.q = view4(q), args.q_pos = args.has_q_pos ? view4(optional.q_pos) : args.q;
    args.r_per_batch = r.size(0) != 1, args.r_per_head = r.size(1) != 1;
    args.r = view4(r);
    if (optional.mem_k.defined() && optional.mem_k.numel() > 0)
      add_run(optional.mem_k, optional.mem_v);
    add_run(k, v);
  }

  void add_run(const Tensor& k, const Tensor& v) {
    args.runs[args.n_runs++] = {args.Tk, k.size(2), view4(k), view4(v)};
    args.Tk += k.size(2);
  }

  void set_numbers(const Numbers& numbers) {
    args.scale = numbers.scale, args.pos_scale = numbers.pos_scale;
    args.softcap = numbers.softcap, args.dropout_p = numbers.dropout_p;
    if (args.dropout_p > 0) {
      TORCH_CHECK(optional.dropout_seed.defined(), "rel_attention: dropout needs a seed");
      args.dropout_seed = static_cast<uint64_t>(optional.dropout_seed.item<int64_t>());
    }
  }

  void set_positions(int64_t offset) {
    if (!optional.q_start.defined()) {
      args.offset = near_offset(offset, args.Tq, args.Tk, args.R);
      return;
    }
    // Sums with q_start do not overflow; RelAttentionArgs::row_offset clamps them.
    args.offset = std::clamp(offset, -kOpen, kOpen);
    args.q_start = integers(optional.q_start, -kFarthest, kFarthest, q_start_);
  }

  static const void* bias_pointer(Tensor& bias, at::ScalarType dtype) {
    if (!bias.defined()) return nullptr;
    if (bias.scalar_type() != dtype) bias = bias.to(dtype);
    bias = bias.contiguous();
    return bias.data_ptr();
  }

  void set_masks() {
    args.key_start = bounds(optional.key_start, key_start_);
    args.key_lens = bounds(optional.key_lens, key_lens_);
    if (args.key_start.stride_i != 0 || args.key_lens.stride_i != 0) {
      const int64_t entries = (args.Tq + kRangeRows - 1) / kRangeRows;
      key_table_.resize(static_cast<size_t>(args.B * entries));
      fill_key_table(args, key_table_.data());
      args.key_table = key_table_.data();
    }
    if (optional.mask.defined()) {
      const Tensor& mask = optional.mask;
      args.mask = {mask.data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2)};
      args.mask_stride_key = mask.stride(3);
    }
  }

  KeyBounds bounds(const Tensor& x, std::vector<int64_t>& home) const {
    if (!x.defined()) return {};
    const bool per_query = x.dim() == 2;
    return {integers(x, 0, args.Tk, home), per_query ? args.Tq : 1, per_query ? 1 : 0};
  }

  // The elements of an int32 or int64 tensor of any strides, clamped to [least, most].
  static const int64_t* integers(const Tensor& x, int64_t least, int64_t most,
                                 std::vector<int64_t>& home) {
    home.reserve(static_cast<size_t>(x.numel()));
    auto copy = [&](auto* data) {
      const int64_t n = x.dim() > 1 ? x.size(1) : 1, step = x.dim() > 1 ? x.stride(1) : 0;
      for (int64_t b = 0; b < x.size(0); ++b) {
        for (int64_t i = 0; i < n; ++i)
          home.push_back(std::clamp<int64_t>(data[b * x.stride(0) + i * step], least, most));
      }
    };
    if (x.scalar_type() == at::kInt) {
      copy(x.const_data_ptr<int32_t>());
    } else {
      copy(x.const_data_ptr<int64_t>());
    }
    return home.data();
  }

  std::vector<int64_t> q_start_, key_start_, key_lens_;
  std::vector<KeyRange> key_table_;
};

// at::empty without the dispatcher, which takes half of its time.
Tensor empty_cpu(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false);
}

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

// Few queries: each thread continues with the next items that are left, and the thread that
// finishes a unit's last block merges the unit.
void attend_few_queries(const Call& call, const FewQueryKernels& kernels) {
  const RelAttentionArgs& args = call.args;
  const FewQueryPlan plan = plan_few_queries(args);
  const int64_t n_items = plan.n_items(args), n_units = args.n_units();
  const int64_t threads = std::min(call.threads(), n_items);
  // Adjacent items read the same rows of `r`.
  const int64_t step = std::clamp<int64_t>(n_items / (8 * threads), 1, args.B);
  const int64_t scratch = round_to_page(kernels.workspace(args, plan));
  const int64_t size = kernels.result_size(args);
  const Workspace workspace(1, threads * scratch + n_items * size);
  char* const results = workspace.of(0) + threads * scratch;
  std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(n_units));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t end) {
    for (; thread < end; ++thread) {
      for (int64_t first = next.fetch_add(step); first < n_items; first = next.fetch_add(step)) {
        for (int64_t item = first; item < std::min(first + step, n_items); ++item) {
          const int64_t unit = plan.unit_of(args, item), block = plan.block_of(args, item);
          char* const of_unit = results + unit * plan.n_blocks * size;
          kernels.block(args, plan, unit, block, workspace.of(0) + thread * scratch,
                        of_unit + block * size);
          if (++finished[static_cast<size_t>(unit)] == plan.n_blocks)
            kernels.merge(args, plan, unit, of_unit, size);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> rel_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Tensor& r, at::TensorList optional,
                                             at::IntArrayRef rules, at::ArrayRef<double> numbers) {
  Call call(q, k, v, r, optional, rules, numbers);
  RelAttentionArgs& args = call.args;
  const Tensor out = empty_cpu({args.B, args.H, args.Tq, args.Dv}, q.scalar_type());
  const Tensor lse = empty_cpu({args.B, args.H, args.Tq}, acc_dtype(q));
  if (call.empty()) return {out, lse};
  args.out = view4(out), args.lse = lse.data_ptr();
  const Scalar dtype = scalar_of("rel_attention", "q", q);
  // The backward recomputes the scores by the products of the other kernel: rounding errors that
  // its scores share with lse cancel in its probabilities.
  const bool needs_grad = q.requires_grad() || k.requires_grad() || v.requires_grad();
  if (!needs_grad && has_few_queries(args, dtype)) {
    attend_few_queries(call, rel_attention_few_query_kernels(dtype));
    return {out, lse};
  }
  const FwdKernels& kernels = rel_attention_fwd_kernels(dtype);
  const RelAttentionPlan plan =
      plan_rel_attention(args, kFwdKeyBlock, kernels.item_bytes(args), call.threads());
  run_chunks(plan, call.threads(), kernels.workspace(args, plan),
             [&](int64_t c, char* workspace) { kernels.chunk(args, plan, c, workspace); });
  return {out, lse};
}

// With a narrow window or short documents, the borders of small blocks divide the keys of many
// tiles: 14% of the time at 128 keys.
int64_t bwd_key_block(const RelAttentionArgs& args) {
  int64_t keys = args.rule.window_left + args.rule.window_right;
  if (args.key_table != nullptr) {
    const int64_t n = args.B * ((args.Tq + kRangeRows - 1) / kRangeRows);
    int64_t sum = 0;
    for (int64_t entry = 0; entry < n; ++entry)
      sum += std::max<int64_t>(0, args.key_table[entry].end - args.key_table[entry].begin);
    keys = std::min(keys, sum / n);
  }
  return keys < kBwdKeyBlock ? kKeyBlock : kBwdKeyBlock;
}

// Key and value gradients need slots for partial sums only if two chunks share a unit.
bool cuts_a_unit(const RelAttentionPlan& plan) {
  for (const int64_t border : plan.chunks) {
    if (border % plan.unit_items() != 0) return true;
  }
  return false;
}

// The results of the backward, in the schema's order.
enum Gradient : size_t { kQ, kK, kV, kR, kRWBias, kRRBias, kMemK, kMemV, kQPos, kGradients };

// The gradients that are requested, uninitialised (zeros if the call is empty); the others are of
// size 0, each a tensor of its own, because outputs of an operator must not alias. The biases'
// gradients have the accumulation type.
std::vector<Tensor> empty_gradients(const Call& call, const Tensor* const (&inputs)[kGradients],
                                    const c10::List<bool>& needs_grad) {
  TORCH_CHECK_VALUE(needs_grad.size() == kGradients, "rel_attention: needs_grad must have ",
                    size_t{kGradients}, " flags, got ", needs_grad.size());
  const auto options = inputs[kQ]->options();
  std::vector<Tensor> grads;
  for (size_t n = 0; n < kGradients; ++n) {
    if (!needs_grad.get(n) || !inputs[n]->defined()) {
      grads.push_back(at::empty({0}, options));
      continue;
    }
    const bool is_bias = n == kRWBias || n == kRRBias;
    const auto own = options.dtype(is_bias ? acc_dtype(*inputs[kQ]) : inputs[n]->scalar_type());
    const at::IntArrayRef sizes = inputs[n]->sizes();
    grads.push_back(call.empty() ? at::zeros(sizes, own) : at::empty(sizes, own));
  }
  return grads;
}

void* pointer(const Tensor& x) {
  return x.numel() == 0 ? nullptr : x.data_ptr();
}

RelAttentionGrads grad_pointers(const RelAttentionArgs& args, const std::vector<Tensor>& grads) {
  RelAttentionGrads pointers;
  pointers.dq = pointer(grads[kQ]), pointers.dq_pos = pointer(grads[kQPos]);
  const int segment = args.n_runs - 1;
  if (segment > 0) pointers.dk[0] = pointer(grads[kMemK]), pointers.dv[0] = pointer(grads[kMemV]);
  pointers.dk[segment] = pointer(grads[kK]), pointers.dv[segment] = pointer(grads[kV]);
  pointers.dr = pointer(grads[kR]);
  pointers.dr_w_bias = pointer(grads[kRWBias]), pointers.dr_r_bias = pointer(grads[kRRBias]);
  return pointers;
}

void compute_gradients(const Call& call, const RelAttentionGrads& grads, const Tensor& q) {
  const RelAttentionArgs& args = call.args;
  const BwdKernels& kernels = rel_attention_bwd_kernels(scalar_of("rel_attention", "q", q));
  const RelAttentionPlan plan =
      plan_rel_attention(args, bwd_key_block(args), kernels.item_bytes(args), call.threads());
  const auto options = q.options().dtype(acc_dtype(q));
  const int64_t chunks = plan.n_chunks(), parked = cuts_a_unit(plan) ? 2 * chunks : 0;
  const Tensor park_k = at::empty({parked, args.Tk, args.D}, options);
  const Tensor park_v = at::empty({parked, args.Tk, args.Dv}, options);
  const int64_t table_slots = grads.dr == nullptr ? 0 : args.n_groups() + chunks - 1;
  const Tensor park_r = at::empty({table_slots, args.tables_per_group(), args.R, args.Dp}, options);
  const Tensor park_bias =
      at::empty({args.n_units() + chunks - 1, args.heads_per_key(), args.D + args.Dp}, options);
  const RelAttentionPartials partials{pointer(park_k), pointer(park_v), pointer(park_r),
                                      pointer(park_bias)};
  run_chunks(plan, call.threads(), kernels.workspace(args, plan), [&](int64_t c, char* workspace) {
    kernels.chunk(args, plan, grads, partials, c, workspace);
  });
  at::parallel_for(0, finish_items(args), 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      kernels.finish(args, plan, grads, partials, item);
  });
}

std::vector<Tensor> rel_attention_bwd(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                      const Tensor& k, const Tensor& v, const Tensor& r,
                                      at::TensorList optional, at::IntArrayRef rules,
                                      at::ArrayRef<double> numbers, const Tensor& out,
                                      const Tensor& lse_, const c10::List<bool>& needs_grad) {
  Call call(q, k, v, r, optional, rules, numbers);
  RelAttentionArgs& args = call.args;
  const Tensor lse = lse_.contiguous();
  const OptionalTensors given(optional);  // the biases in their own dtype
  const Tensor* const inputs[kGradients] = {
      &q, &k, &v, &r, &given.r_w_bias, &given.r_r_bias, &given.mem_k, &given.mem_v, &given.q_pos};
  std::vector<Tensor> grads = empty_gradients(call, inputs, needs_grad);
  if (!call.empty()) {
    const CallChecks checks(q);
    checks.rows("out", out, {args.B, args.H, args.Tq, args.Dv});
    checks.rows("dout", dout, {args.B, args.H, args.Tq, args.Dv});
    TORCH_CHECK_VALUE(lse.sizes() == at::IntArrayRef({args.B, args.H, args.Tq}) &&
                          lse.scalar_type() == acc_dtype(q),
                      "rel_attention: lse must be the forward's");
    args.out = view4(out), args.lse = lse.data_ptr();
    RelAttentionGrads pointers = grad_pointers(args, grads);
    pointers.dout = view4(dout);
    if (dlse.dim() != 1 || dlse.numel() != 0) {
      TORCH_CHECK_VALUE(dlse.sizes() == lse.sizes() && dlse.scalar_type() == lse.scalar_type(),
                        "rel_attention: dlse must have the shape and dtype of lse");
      pointers.dlse = {dlse.data_ptr(), dlse.stride(0), dlse.stride(1), dlse.stride(2)};
    }
    compute_gradients(call, pointers, q);
  }
  for (const size_t n : {kRWBias, kRRBias}) {
    if (inputs[n]->defined()) grads[n] = grads[n].to(inputs[n]->scalar_type());
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("rel_attention_fwd", &rel_attention_fwd);
  m.impl("rel_attention_bwd", &rel_attention_bwd);
}

}  // namespace txl
