// torch ring of the adaptive softmax on the CPU: tokens to clusters, projections, threads.
//
// Each cluster is a linear cross entropy of the tokens in it; all threads share one cluster at a
// time. Projections are torch's own products, on the cluster's tokens alone.
#include "txl/adaptive_softmax.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
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

// The tokens of each cluster, in token order: a counting sort of the targets that count.
struct Buckets {
  Tensor rows, columns;        // int64: of the head [n], then of each tail
  std::vector<int64_t> first;  // where each cluster's begin; one more for the end
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

// Memory that the clusters of a call use one after the other: fresh pages cost more than most of
// what is done with them. What the next one does not need goes back to the system, before the
// gradients that are still to come take as much.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes) { memory_.emplace(1, bytes); }

  char* of(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      memory_.emplace(1, bytes);
      bytes_ = bytes;
    }
    memory_->give_back_behind(bytes);
    return memory_->of(0);
  }

 private:
  std::optional<Workspace> memory_;
  int64_t bytes_;
};

// How a cluster is cut, and the memory that takes.
struct ClusterMemory {
  ClusterPlan plan;
  int64_t shared_bytes, slot_bytes, low_bytes;

  ClusterMemory(const ClusterKernels& kernels, const ClusterArgs& args, const ClusterGrads& grads,
                bool hold, bool sums_rounded, int64_t threads)
      : plan(plan_cluster(args, kernels, hold, sums_rounded ? 1 : 0, threads)),
        shared_bytes(round_to_page(kernels.shared_bytes(args, plan))),
        slot_bytes(round_to_page(kernels.slot_bytes(args, plan, grads))),
        low_bytes(sums_rounded && plan.n_blocks > 1 ? args.V * args.d : 0) {}

  int64_t bytes() const { return shared_bytes + plan.n_slots * slot_bytes + low_bytes; }
};

int64_t threads_for(const ClusterArgs& args) {
  const double work = static_cast<double>(args.n * args.V) * static_cast<double>(args.d);
  return at::in_parallel_region() || work < 5e5 ? 1 : at::get_num_threads();
}

// One cluster's tokens, ready for its kernels.
struct ClusterCall {
  const ClusterKernels& kernels;
  Tensor rows, x, lse, logit;
  ClusterArgs args;

  ClusterCall(Scalar dtype, const Tensor& hidden, const Cluster& cluster, const Buckets& buckets,
              size_t k)
      : kernels(adaptive_softmax_kernels(dtype)), rows(buckets.rows_of(k)), x(hidden) {
    const bool in_order = k == 0 && buckets.all_counted;
    args.n = buckets.size(k), args.V = cluster.weight.size(0), args.d = cluster.weight.size(1);
    if (!in_order) args.rows = rows.const_data_ptr<int64_t>();
    if (cluster.projection.defined()) {
      x = product(in_order ? hidden : hidden.index_select(0, rows), cluster.projection.t())
              .to(hidden.scalar_type());
      args.rows = nullptr;
    }
    args.x = x.const_data_ptr();
    args.columns = buckets.columns.const_data_ptr<int64_t>() + buckets.first[k];
    args.weight = cluster.weight.const_data_ptr();
    args.bias = cluster.bias.defined() ? cluster.bias.const_data_ptr() : nullptr;
    lse = at::empty({args.n}, hidden.options().dtype(acc_dtype(hidden)));
    logit = at::empty_like(lse);
  }

  // Losses, or gradients from the log-sum-exp of losses made before, or both.
  void run(const ClusterGrads& grads, const Tensor& scale, bool losses, bool gradients,
           Scratch& scratch) const {
    if (args.n == 0) return;
    const ClusterTokens tokens{lse.data_ptr(), losses ? logit.data_ptr() : nullptr,
                               scale.defined() ? scale.const_data_ptr() : nullptr};
    const bool rounded = grads.dweight != nullptr && x.scalar_type() != acc_dtype(x);
    const int64_t threads = threads_for(args);
    const ClusterMemory memory(kernels, args, grads, losses && gradients, rounded, threads);
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
  // As much as the cluster that takes most where all gradients are wanted: memory that grows
  // from cluster to cluster leaves what it was behind, in the allocator's hands.
  Scratch scratch(bool losses, bool gradients) const {
    const bool rounded = gradients && hidden.scalar_type() != acc_dtype(hidden);
    ClusterGrads grads;
    if (gradients) grads.dx = hidden.data_ptr();  // asked for, not written
    int64_t bytes = 0;
    for (size_t k = 0; k < clusters.size(); ++k) {
      ClusterArgs args;
      args.n = buckets.size(k), args.V = clusters[k].weight.size(0);
      args.d = clusters[k].weight.size(1);
      const ClusterMemory memory(adaptive_softmax_kernels(dtype), args, grads, losses && gradients,
                                 rounded, threads_for(args));
      if (args.n > 0) bytes = std::max(bytes, memory.bytes());
    }
    return Scratch(bytes);
  }
  at::TensorOptions acc_options() const { return hidden.options().dtype(acc_dtype(hidden)); }
};

// A cluster's values of type acc_t, scattered to token order: f(token's place, value).
template <typename F>
void scatter(const ClusterCall& call, F&& f) {
  const auto* row = call.rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < call.args.n; ++i) f(row[i], i);
}

// Adds a cluster's losses to nll [N]; keeps its log-sum-exp in lse [N] if that is given.
void add_losses(const ClusterCall& call, const Tensor& nll, Tensor* lse) {
  AT_DISPATCH_FLOATING_TYPES(nll.scalar_type(), "adaptive_nll", [&] {
    const auto *from = call.lse.const_data_ptr<scalar_t>(),
               *logit = call.logit.const_data_ptr<scalar_t>();
    auto *to = nll.data_ptr<scalar_t>(), *kept = lse ? lse->data_ptr<scalar_t>() : nullptr;
    scatter(call, [&](int64_t row, int64_t i) {
      to[row] += from[i] - logit[i];
      if (kept) kept[row] = from[i];
    });
  });
}

// Gradients of one call, made cluster by cluster.
class Gradients {
 public:
  Gradients(const Call& call, at::TensorList flat, const c10::List<bool>& needed)
      : call_(call), flat_(flat), needed_(needed) {
    if (needed.get(0)) dhidden_ = at::zeros(call.hidden.sizes(), call.acc_options());
    out_.resize(flat.size());
    if (needed.size() == flat.size() + 1) return;
    // One flag more: the tails' weights are rows of one table, behind the head's words. Their
    // gradients are handed back as that table, in the first tail's place.
    const auto n_tails = static_cast<int64_t>(call.clusters.size()) - 1;
    next_row_.push_back(flat[1].size(0) - n_tails);
    for (size_t k = 1; k < call.clusters.size(); ++k)
      next_row_.push_back(next_row_.back() + flat[3 * k + 1].size(0));
    table_ = at::empty({next_row_.back(), flat[4].size(1)}, flat[4].options());
    advise_huge_pages(table_.data_ptr(), static_cast<int64_t>(table_.nbytes()));
  }

  // `scale`: [N], the gradient of each token's loss. As ClusterCall::run.
  void run(size_t k, const ClusterCall& cluster, const Tensor& scale, bool losses,
           Scratch& scratch) {
    const Tensor& projection = call_.clusters[k].projection;
    const bool projected = projection.defined();
    ClusterGrads grads;
    Tensor dx;
    if (projected && (dhidden_.defined() || wants(3 * k))) {
      dx = at::empty({cluster.args.n, cluster.args.d}, call_.acc_options());
      grads.dx = dx.data_ptr();
    } else if (dhidden_.defined()) {
      grads.dx = dhidden_.data_ptr();
      grads.dx_rows = cluster.rows.const_data_ptr<int64_t>();
    }
    Tensor dbias;
    if (wants(3 * k + 1)) {
      out_[3 * k + 1] = gradient_of(k, cluster.args.n);
      grads.dweight = out_[3 * k + 1].data_ptr();
    }
    if (wants(3 * k + 2)) {
      dbias = at::zeros({cluster.args.V}, call_.acc_options());
      grads.dbias = dbias.data_ptr();
    }
    const bool gradients = grads.dx != nullptr || grads.dweight != nullptr || dbias.defined();
    if (losses || gradients)
      cluster.run(grads, scale.index_select(0, cluster.rows), losses, gradients, scratch);
    if (dbias.defined()) out_[3 * k + 2] = dbias.to(flat_[3 * k + 2].scalar_type());
    if (dx.defined()) through_projection(k, cluster, dx);
  }

  std::vector<Tensor> take() {
    std::vector<Tensor> all{dhidden_.defined() ? dhidden_.to(call_.hidden.scalar_type()) : none()};
    for (size_t i = 0; i < out_.size(); ++i) {
      const bool of_table = table_.defined() && i > 3 && i % 3 == 1;
      if (of_table) out_[i] = i == 4 ? table_ : Tensor();
      all.push_back(out_[i].defined() ? out_[i] : none());
    }
    return all;
  }

 private:
  bool wants(size_t index) const { return needed_.get(index + 1) && present(flat_[index]); }
  Tensor none() const { return at::empty({0}, call_.hidden.options()); }  // never one shared

  Tensor gradient_of(size_t k, int64_t n) const {
    const Tensor& weight = call_.clusters[k].weight;
    Tensor grad;
    if (k > 0 && table_.defined()) {
      grad = table_.slice(0, next_row_[k - 1], next_row_[k]);
    } else {
      grad = at::empty_like(weight);
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
      out_[3 * k] = product(dx.t(), hidden).to(projection.scalar_type());
    }
  }

  const Call& call_;
  at::TensorList flat_;
  const c10::List<bool>& needed_;
  Tensor dhidden_;
  // The gradients of tails that are one table; its rows behind the head's words and each tail.
  Tensor table_;
  std::vector<int64_t> next_row_;
  std::vector<Tensor> out_;
};

std::tuple<Tensor, Tensor> adaptive_nll_fwd(const Tensor& hidden, const Tensor& target,
                                            at::TensorList clusters, int64_t ignore_index) {
  const Call call("adaptive_nll", hidden, target, clusters, ignore_index);
  const Tensor nll = at::zeros({call.N()}, call.acc_options());
  const Tensor lse = at::zeros({2, call.N()}, call.acc_options());
  Scratch scratch = call.scratch(/*losses=*/true, /*gradients=*/false);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    const ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    cluster.run({}, {}, /*losses=*/true, /*gradients=*/false, scratch);
    Tensor kept = lse[k == 0 ? 0 : 1];
    add_losses(cluster, nll, &kept);
  }
  return {nll, lse};
}

std::tuple<Tensor, std::vector<Tensor>> adaptive_nll_bwd(const Tensor& dnll, const Tensor& hidden,
                                                         const Tensor& target,
                                                         at::TensorList clusters,
                                                         int64_t ignore_index, const Tensor& lse,
                                                         const c10::List<bool>& needs_grad) {
  const Call call("adaptive_nll", hidden, target, clusters, ignore_index);
  Gradients gradients(call, clusters, needs_grad);
  const Tensor scale = dnll.to(acc_dtype(hidden)).contiguous();
  Scratch scratch = call.scratch(/*losses=*/false, /*gradients=*/true);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    cluster.lse = lse[k == 0 ? 0 : 1].index_select(0, cluster.rows);
    gradients.run(k, cluster, scale, /*losses=*/false, scratch);
  }
  std::vector<Tensor> all = gradients.take();
  const Tensor dhidden = all[0];
  all.erase(all.begin());
  return {dhidden, all};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> adaptive_loss_fwd(
    const Tensor& hidden, const Tensor& target, at::TensorList clusters, int64_t ignore_index,
    bool mean, const c10::List<bool>& needs_grad) {
  const Call call("adaptive_loss", hidden, target, clusters, ignore_index);
  const auto counted = static_cast<double>(std::max<int64_t>(1, call.buckets.size(0)));
  // float16 cannot hold what a mean over many tokens leaves of a small gradient, nor every sum:
  // half of the factor now, half with backward's.
  const bool halved = mean && hidden.scalar_type() == at::kHalf;
  const double rest = halved ? 1 / std::sqrt(counted) : 1;
  const double share = mean ? 1 / counted : 1;
  const Tensor nll = at::zeros({call.N()}, call.acc_options());
  const Tensor scale = at::full({call.N()}, share / rest, call.acc_options());
  const bool any = std::any_of(needs_grad.begin(), needs_grad.end(), [](bool b) { return b; });
  Gradients gradients(call, clusters, needs_grad);
  Scratch scratch = call.scratch(/*losses=*/true, /*gradients=*/any);
  for (size_t k = 0; k < call.clusters.size(); ++k) {
    const ClusterCall cluster(call.dtype, call.hidden, call.clusters[k], call.buckets, k);
    if (any) {
      gradients.run(k, cluster, scale, /*losses=*/true, scratch);
    } else {
      cluster.run({}, {}, /*losses=*/true, /*gradients=*/false, scratch);
    }
    add_losses(cluster, nll, nullptr);
  }
  const Tensor loss = (nll.sum(at::kDouble) * share).to(nll.scalar_type());
  return {loss, at::full({}, rest, nll.options()), gradients.take()};
}

void adaptive_loss_bwd(const Tensor& dloss, const Tensor& rest, at::TensorList grads) {
  const double factor = dloss.item<double>() * rest.item<double>();
  if (factor == 1) return;
  for (const Tensor& grad : grads) grad.mul_(factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(txl_native, CPU, m) {
  m.impl("adaptive_nll_fwd", &adaptive_nll_fwd);
  m.impl("adaptive_nll_bwd", &adaptive_nll_bwd);
  m.impl("adaptive_loss_fwd", &adaptive_loss_fwd);
  m.impl("adaptive_loss_bwd", &adaptive_loss_bwd);
}

}  // namespace txl
