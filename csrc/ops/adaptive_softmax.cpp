// ATen bindings of the adaptive softmax on the CPU: tokens to clusters, projections, threads.
//
// Each cluster is a linear cross entropy of its tokens; all threads share one cluster at a time.
// Projections are torch's own products, on the cluster's tokens alone.
#include "txl/adaptive_softmax.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>

#include "arguments.h"
#include "product.h"
#include "txl/gemm.h"
#include "workspace.h"

namespace txl {
namespace {

using at::Tensor;

struct Cluster {
  Tensor projection, weight, bias;  // undefined where absent; the bias in the accumulation type
};

// The tokens of each cluster, in token order: a counting sort of the targets that are not ignored.
struct Buckets {
  Tensor rows, columns;        // int64: of the head [n], then of each tail
  std::vector<int64_t> first;  // the first position of each cluster, and the end
  bool all_counted;            // the head's rows are 0 … N - 1

  Buckets(const char* op, const Tensor& target, const std::vector<Cluster>& clusters,
          int64_t ignore_index) {
    const auto n_tails = static_cast<int64_t>(clusters.size()) - 1;
    std::vector<int64_t> edges{clusters[0].weight.size(0) - n_tails};
    for (size_t k = 1; k < clusters.size(); ++k)
      edges.push_back(edges.back() + clusters[k].weight.size(0));
    const Tensor given = target.contiguous();
    const auto* token = given.const_data_ptr<int64_t>();
    const int64_t N = target.size(0);
    auto cluster_of = [&](int64_t t) {
      return static_cast<size_t>(std::upper_bound(edges.begin(), edges.end(), t) - edges.begin());
    };
    std::vector<int64_t> count(clusters.size(), 0);
    for (int64_t i = 0; i < N; ++i) {
      if (token[i] == ignore_index) continue;
      TORCH_CHECK_INDEX(token[i] >= 0 && token[i] < edges.back(), op, ": target must be in [0, ",
                        edges.back(), "), got ", token[i]);
      ++count[cluster_of(token[i])];
    }
    first = {0};
    first.push_back(std::accumulate(count.begin(), count.end(), int64_t{0}));
    for (size_t k = 1; k < clusters.size(); ++k) first.push_back(first.back() + count[k]);
    all_counted = first[1] == N;
    rows = at::empty({first.back()}, target.options());
    columns = at::empty_like(rows);
    auto *row = rows.data_ptr<int64_t>(), *column = columns.data_ptr<int64_t>();
    std::vector<int64_t> next(first);
    auto put = [&](size_t k, int64_t i, int64_t c) {
      row[next[k]] = i;
      column[next[k]++] = c;
    };
    for (int64_t i = 0; i < N; ++i) {
      if (token[i] == ignore_index) continue;
      const size_t k = cluster_of(token[i]);
      put(0, i, k == 0 ? token[i] : edges[0] + static_cast<int64_t>(k) - 1);
      if (k > 0) put(k, i, token[i] - edges[k - 1]);
    }
  }

  int64_t size(size_t k) const { return first[k + 1] - first[k]; }
  Tensor rows_of(size_t k) const { return rows.slice(0, first[k], first[k + 1]); }
};

template <typename F>
void over(int64_t n, int64_t threads, F&& f) {
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
  } else {
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
}

// Memory that the clusters of a call use one after the other, because fresh pages cost more than
// most of the work on them. Pages that the next cluster does not need are returned to the system,
// before the gradients of the later clusters are allocated.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes) { memory_.emplace(1, bytes); }

  char* of(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      memory_.emplace(1, bytes);
      bytes_ = bytes;
    }
    memory_->release_after(bytes);
    return memory_->of(0);
  }

 private:
  std::optional<Workspace> memory_;
  int64_t bytes_;
};

// How a cluster is divided, and the memory that this needs.
struct ClusterMemory {
  ClusterPlan plan;
  int64_t shared_bytes, slot_bytes, low_bytes;

  ClusterMemory(Scalar dtype, const ClusterArgs& args, const ClusterGrads& grads, bool hold,
                int64_t threads) {
    const ClusterKernels& kernels = adaptive_softmax_kernels(dtype);
    const bool sums_rounded = dtype == Scalar::bf16 && grads.dweight != nullptr;
    plan = plan_cluster(args, kernels, hold, sums_rounded ? 1 : 0, threads);
    shared_bytes = round_to_page(kernels.shared_bytes(args, plan));
    slot_bytes = round_to_page(kernels.slot_bytes(args, plan, grads));
    low_bytes = sums_rounded && plan.n_blocks > 1 ? args.V * args.d : 0;
  }

  int64_t bytes() const { return shared_bytes + plan.n_slots * slot_bytes + low_bytes; }
};

int64_t threads_for(const ClusterArgs& args) {
  const double work = static_cast<double>(args.n * args.V) * static_cast<double>(args.d);
  return at::in_parallel_region() || work < 5e5 ? 1 : at::get_num_threads();
}

// The sizes of a cluster's call. Rows of width 0 count as rows of one zero: products need a column.
ClusterArgs sizes_of(const Cluster& cluster, int64_t n_tokens) {
  ClusterArgs args;
  args.n = n_tokens, args.V = cluster.weight.size(0);
  args.d = std::max<int64_t>(1, cluster.weight.size(1));
  return args;
}

// The tokens of one cluster, and the arguments of its kernels.
struct ClusterCall {
  Scalar dtype;
  Tensor rows, x, weight, lse, logit;  // lse [2, n]: the largest logit, log Σ exp(logit - largest)
  ClusterArgs args;

  ClusterCall(Scalar dtype, const Tensor& hidden, const Cluster& cluster, const Buckets& buckets,
              size_t k)
      : dtype(dtype), rows(buckets.rows_of(k)), x(hidden), weight(cluster.weight) {
    const bool in_order = k == 0 && buckets.all_counted;
    args = sizes_of(cluster, buckets.size(k));
    if (!in_order) args.rows = rows.const_data_ptr<int64_t>();
    if (weight.size(1) == 0) {
      x = at::zeros({args.n, 1}, hidden.options());
      weight = at::zeros({args.V, 1}, weight.options());
      args.rows = nullptr;
    } else if (cluster.projection.defined()) {
      x = product(in_order ? hidden : hidden.index_select(0, rows), cluster.projection.t())
              .to(hidden.scalar_type());
      args.rows = nullptr;
    }
    args.x = x.const_data_ptr();
    args.columns = buckets.columns.const_data_ptr<int64_t>() + buckets.first[k];
    args.weight = weight.const_data_ptr();
    args.bias = cluster.bias.defined() ? cluster.bias.const_data_ptr() : nullptr;
    lse = at::empty({2, args.n}, hidden.options().dtype(acc_dtype(hidden)));
    logit = at::empty({args.n}, lse.options());
  }

  // Computes losses, or gradients from the log-sum-exp of an earlier call, or both.
  void run(const ClusterGrads& grads, const Tensor& scale, bool losses, bool gradients,
           Scratch& scratch) const {
    if (args.n == 0) return;
    const ClusterTokens tokens{lse[0].data_ptr(), lse[1].data_ptr(),
                               losses ? logit.data_ptr() : nullptr,
                               scale.defined() ? scale.const_data_ptr() : nullptr};
    const int64_t threads = threads_for(args);
    const ClusterKernels& kernels = adaptive_softmax_kernels(dtype);
    const ClusterMemory memory(dtype, args, grads, losses && gradients, threads);
    const ClusterPlan& plan = memory.plan;
    const int64_t slot_bytes = memory.slot_bytes;
    char *shared = scratch.of(memory.bytes()), *slots = shared + memory.shared_bytes;
    ClusterGrads out = grads;
    if (memory.low_bytes > 0)
      out.dweight_low = reinterpret_cast<uint8_t*>(slots + plan.n_slots * slot_bytes);
    for (int64_t block = 0; block < plan.n_blocks; ++block) {
      const int64_t tiles = plan.tiles_of(std::min(plan.block, args.n - block * plan.block));
      over(tiles, threads, [&](int64_t tile) { kernels.pack(args, plan, block, tile, shared); });
      if (losses) {
        over(plan.n_slots, threads, [&](int64_t slot) {
          kernels.logits(args, plan, block, slot, shared, slots + slot * slot_bytes);
        });
        kernels.combine(args, plan, tokens, block, shared);
      } else {
        kernels.restore(args, plan, tokens, block, shared);
      }
      if (!gradients) continue;
      over(plan.n_slots, threads, [&](int64_t slot) {
        kernels.gradients(args, plan, tokens, out, block, slot, shared, slots + slot * slot_bytes);
      });
      if (grads.dx == nullptr) continue;
      over(tiles, threads,
           [&](int64_t tile) { kernels.reduce(args, plan, out, block, tile, slots, slot_bytes); });
    }
  }
};

// All tensors of one call.
struct Call {
  Scalar dtype;
  Tensor hidden;
  std::vector<Cluster> clusters;
  Buckets buckets;

  Call(const char* op, const Tensor& hidden_, const Tensor& target, at::TensorList flat,
       int64_t ignore_index)
      : dtype(scalar_of(op, "hidden", hidden_)),
        hidden(hidden_.contiguous()),
        clusters(unflatten(op, hidden_, flat)),
        buckets(op, target, clusters, ignore_index) {}

  static std::vector<Cluster> unflatten(const char* op, const Tensor& hidden, at::TensorList flat) {
    const char* missing = gemm_unavailable_reason();
    TORCH_CHECK(missing == nullptr, op, ": the native backend cannot run here: ", missing);
    TORCH_CHECK_VALUE(!flat.empty() && flat.size() % 3 == 0, op,
                      ": clusters must hold three tensors each, got ", flat.size());
    std::vector<Cluster> clusters;
    for (size_t k = 0; k < flat.size(); k += 3) {
      Cluster cluster;
      if (present(flat[k])) cluster.projection = flat[k].contiguous();
      cluster.weight = flat[k + 1].contiguous();
      if (present(flat[k + 2])) cluster.bias = flat[k + 2].to(acc_dtype(hidden)).contiguous();
      for (const Tensor& x : {cluster.projection, cluster.weight}) {
        TORCH_CHECK_TYPE(!x.defined() || x.scalar_type() == hidden.scalar_type(), op,
                         ": hidden and weights must share a dtype, got ", hidden.scalar_type(),
                         " and ", x.defined() ? x.scalar_type() : at::kFloat);
      }
      clusters.push_back(cluster);
    }
    return clusters;
  }

  int64_t N() const { return hidden.size(0); }
  // Enough for every cluster with all gradients requested: memory that grew from cluster to cluster
  // would leave its earlier pieces in the allocator's hands.
  Scratch scratch(bool losses, bool gradients) const {
    ClusterGrads grads;
    char requested = 0;  // only the address counts
    if (gradients) grads.dx = grads.dweight = &requested;
    int64_t bytes = 0;
    for (size_t k = 0; k < clusters.size(); ++k) {
      const ClusterArgs args = sizes_of(clusters[k], buckets.size(k));
      if (args.n == 0) continue;
      const ClusterMemory memory(dtype, args, grads, losses && gradients, threads_for(args));
      bytes = std::max(bytes, memory.bytes());
    }
    return Scratch(bytes);
  }
  at::TensorOptions acc_options() const { return hidden.options().dtype(acc_dtype(hidden)); }
};

// Adds a cluster's losses to nll [N].
void add_losses(const ClusterCall& call, const Tensor& nll) {
  AT_DISPATCH_FLOATING_TYPES(nll.scalar_type(), "adaptive_nll", [&] {
    const auto* row = call.rows.const_data_ptr<int64_t>();
    const auto *max = call.lse.const_data_ptr<scalar_t>(), *log_sum = max + call.args.n,
               *logit = call.logit.const_data_ptr<scalar_t>();
    auto* to = nll.data_ptr<scalar_t>();
    for (int64_t i = 0; i < call.args.n; ++i) to[row[i]] += (max[i] - logit[i]) + log_sum[i];
  });
}

// Gradients of one call, computed cluster by cluster. If they `keep_range`, those of float16
// tensors stay float32, for a factor that comes later.
class Gradients {
 public:
  Gradients(const Call& call, at::TensorList flat, const c10::List<bool>& needed, bool keep_range)
      : call_(call), flat_(flat), needed_(needed), keep_range_(keep_range) {
    if (needed.get(0) && call.hidden.numel() > 0)
      dhidden_ = at::zeros(call.hidden.sizes(), call.acc_options());
    out_.resize(flat.size());
    if (needed.size() == flat.size() + 1) return;
    // One flag more: the tails' weights are rows of one table, after the shortlist. Their gradients
    // are returned as that table, in the place of the first tail's.
    const auto n_tails = static_cast<int64_t>(call.clusters.size()) - 1;
    next_row_.push_back(flat[1].size(0) - n_tails);
    for (size_t k = 1; k < call.clusters.size(); ++k)
      next_row_.push_back(next_row_.back() + flat[3 * k + 1].size(0));
    table_ = at::empty({next_row_.back(), flat[4].size(1)}, sum_options(flat[4]));
    advise_huge_pages(table_.data_ptr(), static_cast<int64_t>(table_.nbytes()));
  }

  // `scale`: [N], the gradient of each token's loss. As ClusterCall::run.
  void run(size_t k, const ClusterCall& cluster, const Tensor& scale, bool losses,
           Scratch& scratch) {
    const bool projected = call_.clusters[k].projection.defined();
    const bool has_width = call_.clusters[k].weight.size(1) > 0;
    ClusterGrads grads;
    Tensor dx;
    if (has_width && projected && (dhidden_.defined() || wants(3 * k))) {
      dx = at::empty({cluster.args.n, cluster.args.d}, call_.acc_options());
      grads.dx = dx.data_ptr();
    } else if (has_width && dhidden_.defined()) {
      grads.dx = dhidden_.data_ptr();
      grads.dx_rows = cluster.rows.const_data_ptr<int64_t>();
    }
    if (wants(3 * k + 1)) {
      out_[3 * k + 1] = gradient_of(k, cluster.args.n);
      grads.dweight = out_[3 * k + 1].data_ptr();
    }
    if (wants(3 * k + 2)) {
      out_[3 * k + 2] = at::zeros({cluster.args.V}, call_.acc_options());
      grads.dbias = out_[3 * k + 2].data_ptr();
    }
    const bool gradients =
        grads.dx != nullptr || grads.dweight != nullptr || grads.dbias != nullptr;
    if (losses || gradients)
      cluster.run(grads, scale.index_select(0, cluster.rows), losses, gradients, scratch);
    if (dx.defined()) through_projection(k, cluster, dx);
  }

  std::vector<Tensor> take() {
    std::vector<Tensor> all{rounded(dhidden_, call_.hidden, needed_.get(0))};
    for (size_t i = 0; i < out_.size(); ++i) {
      if (table_.defined() && i > 3 && i % 3 == 1) {
        out_[i].reset();
        all.push_back(rounded(i == 4 ? table_ : Tensor(), flat_[i], false));
      } else {
        all.push_back(rounded(out_[i], flat_[i], needed_.get(i + 1)));
      }
    }
    return all;
  }

 private:
  bool wants(size_t index) const { return needed_.get(index + 1) && flat_[index].numel() > 0; }

  // The dtype of the gradient of `x` while it is summed, and the dtype in which it is returned.
  at::TensorOptions sum_options(const Tensor& x) const {
    return x.options().dtype(x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type());
  }
  at::ScalarType returned_dtype(const Tensor& x) const {
    return c10::typeMetaToScalarType((keep_range_ ? sum_options(x) : x.options()).dtype());
  }

  // Takes a sum and returns it in the dtype of the gradient of `x`. An undefined sum becomes the
  // gradient of a tensor without elements if `needed`, else an empty tensor, never a shared one.
  Tensor rounded(Tensor sum, const Tensor& x, bool needed) const {
    const at::ScalarType dtype = returned_dtype(x);
    if (sum.defined()) return sum.to(dtype);
    return at::empty(needed ? x.sizes() : at::IntArrayRef{0}, x.options().dtype(dtype));
  }

  Tensor gradient_of(size_t k, int64_t n) const {
    const Tensor& weight = call_.clusters[k].weight;
    Tensor grad;
    if (k > 0 && table_.defined()) {
      grad = table_.slice(0, next_row_[k - 1], next_row_[k]);
    } else {
      grad = at::empty(weight.sizes(), sum_options(weight));
      advise_huge_pages(grad.data_ptr(), static_cast<int64_t>(grad.nbytes()));
    }
    if (n == 0) grad.zero_();
    return grad;
  }

  void through_projection(size_t k, const ClusterCall& cluster, const Tensor& dx) {
    const Tensor& projection = call_.clusters[k].projection;
    if (dhidden_.defined()) {
      dhidden_.index_add_(0, cluster.rows, product(dx, projection).to(dhidden_.scalar_type()));
    }
    if (wants(3 * k)) {
      const Tensor hidden = call_.hidden.index_select(0, cluster.rows);
      out_[3 * k] = product(dx.t(), hidden);
    }
  }

  const Call& call_;
  at::TensorList flat_;
  const c10::List<bool>& needed_;
  bool keep_range_;
  Tensor dhidden_;
  // The gradients of tails that are one table; its first row after the shortlist and each tail.
  Tensor table_;
  std::vector<int64_t> next_row_;
  std::vector<Tensor> out_;
};

std::tuple<Tensor, Tensor> adaptive_nll_fwd(const Tensor& hidden, const Tensor& target,
                                            at::TensorList clusters, int64_t ignore_index) {
  const Call call("adaptive_nll", hidden, target, clusters, ignore_index);
  const Tensor nll = at::zeros({call.N()}, call.acc_options());
  const Tensor lse = at::zeros({2, 2, call.N()}, call.acc_options());
  Scratch scratch = call.scratch(/*losses=*/true, /*gradients=*/false);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    const ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    cluster.run({}, {}, /*losses=*/true, /*gradients=*/false, scratch);
    add_losses(cluster, nll);
    lse[k == 0 ? 0 : 1].index_copy_(1, cluster.rows, cluster.lse);
  }
  return {nll, lse};
}

std::tuple<Tensor, std::vector<Tensor>> adaptive_nll_bwd(const Tensor& dnll, const Tensor& hidden,
                                                         const Tensor& target,
                                                         at::TensorList clusters,
                                                         int64_t ignore_index, const Tensor& lse,
                                                         const c10::List<bool>& needs_grad) {
  const Call call("adaptive_nll", hidden, target, clusters, ignore_index);
  Gradients gradients(call, clusters, needs_grad, /*keep_range=*/false);
  const Tensor scale = dnll.to(acc_dtype(hidden)).contiguous();
  Scratch scratch = call.scratch(/*losses=*/false, /*gradients=*/true);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    cluster.lse = lse[k == 0 ? 0 : 1].index_select(1, cluster.rows);
    gradients.run(k, cluster, scale, /*losses=*/false, scratch);
  }
  std::vector<Tensor> all = gradients.take();
  const Tensor dhidden = all[0];
  all.erase(all.begin());
  return {dhidden, all};
}

std::tuple<Tensor, std::vector<Tensor>> adaptive_loss_fwd(const Tensor& hidden,
                                                          const Tensor& target,
                                                          at::TensorList clusters,
                                                          int64_t ignore_index, bool mean,
                                                          const c10::List<bool>& needs_grad) {
  const Call call("adaptive_loss", hidden, target, clusters, ignore_index);
  const auto counted = static_cast<double>(std::max<int64_t>(1, call.buckets.size(0)));
  const double share = mean ? 1 / counted : 1;
  const Tensor nll = at::zeros({call.N()}, call.acc_options());
  const Tensor scale = at::full({call.N()}, share, call.acc_options());
  const bool any = std::any_of(needs_grad.begin(), needs_grad.end(), [](bool b) { return b; });
  Gradients gradients(call, clusters, needs_grad, /*keep_range=*/true);
  Scratch scratch = call.scratch(/*losses=*/true, /*gradients=*/any);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    const ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    if (any) {
      gradients.run(k, cluster, scale, /*losses=*/true, scratch);
    } else {
      cluster.run({}, {}, /*losses=*/true, /*gradients=*/false, scratch);
    }
    add_losses(cluster, nll);
  }
  const Tensor loss = nll.sum(at::kDouble).mul_(share).to(nll.scalar_type());
  return {loss, gradients.take()};
}

void adaptive_loss_bwd(const Tensor& dloss, at::TensorList grads) {
  if (dloss.item<double>() == 1) return;
  // By the tensor: torch rounds a C++ number to the gradients' dtype first.
  for (const Tensor& grad : grads) grad.mul_(dloss);
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("adaptive_nll_fwd", &adaptive_nll_fwd);
  m.impl("adaptive_nll_bwd", &adaptive_nll_bwd);
  m.impl("adaptive_loss_fwd", &adaptive_loss_fwd);
  m.impl("adaptive_loss_bwd", &adaptive_loss_bwd);
}

}  // namespace txl
